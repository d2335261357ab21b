"""The rows of the paper's tables on the digits: their three choices, at the size of the demo.

A row brings its token prompts, its prompt on the image and its tuning. All rows have the demo's
loop, optimiser and schedule, torch's initial values of the head, and, where prompts stand in front
of the blocks, as many rows of them, without dropout: what is compared is the choices.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tcpa

from ...cli import require
from ..files import read_json
from ..registry import METHODS
from .backbone import load_backbone
from .engine import Method, wrap_backbone
from .tasks import PROMPT_ROWS, PROMPTS

ALL = "all"

TUNED_ROWS = Path(__file__).with_name("tuned_rows.json")

REGISTRY_WIDTH = 768
"""Width of the backbone for which the rows state their sizes."""

ADAPTED = (
    f"{PROMPT_ROWS} prompt rows a block wherever there are any, without dropout (pools of "
    f"{PROMPT_ROWS // 2} and {PROMPT_ROWS // 2} with top-5, E2VPT {PROMPT_ROWS // 2} tokens and "
    f"{PROMPT_ROWS // 2} key-value prompts); frames, and the bottleneck of AdaptFormer, in "
    "proportion; Sidetune's AlexNet from random values, on enlarged images; every row with AdamW "
    "and the same schedule in place of its own, and with the same linear head"
)
"""What differs from the registry, for readers of the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """A row on the digits."""

    name: str
    """In the registry."""
    label: str
    """As the papers write it."""
    prompts: tcpa.PromptConfig | None
    input_prompt: tcpa.InputConfig | None
    tuning: tcpa.TuningConfig

    def method(self, learning_rate: float, weight_decay: float, name: str | None = None) -> Method:
        """Return the row with optimiser settings; `name` in place of its own."""
        return Method(
            name=name or self.name,
            prompts=self.prompts,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            input_prompt=self.input_prompt,
            tuning=self.tuning,
        )


def choices_of(name: str) -> Choices:
    """Return a row of the registry at the size of the demo."""
    row = METHODS[name]
    return Choices(
        name=name,
        label=row.label,
        prompts=_prompts(row.prompts("digits")),
        input_prompt=row.input_prompt,
        tuning=_tuning(row.tuning),
    )


def _prompts(config: tcpa.PromptConfig | None) -> tcpa.PromptConfig | None:
    if isinstance(config, tcpa.TCPAConfig):
        transform = config.prompt_transform
        return dataclasses.replace(_our_pools(), prompt_transform=transform)
    if isinstance(config, tcpa.E2VPTConfig):
        half = PROMPT_ROWS // 2
        return dataclasses.replace(config, length=half, kv_length=half, dropout=0.0)
    if config is not None:
        return dataclasses.replace(config, length=PROMPT_ROWS, dropout=0.0)
    return None


def _our_pools() -> tcpa.TCPAConfig:
    config = PROMPTS["TCPA"]
    assert isinstance(config, tcpa.TCPAConfig)
    return config


def _tuning(config: tcpa.TuningConfig) -> tcpa.TuningConfig:
    changes: dict[str, Any] = {"head": "linear"}
    if isinstance(config, tcpa.SideTuning):
        # The demo downloads nothing.
        changes["pretrained"] = False
    if isinstance(config, tcpa.AdaptFormerTuning):
        width = load_backbone().embed_dim
        changes["bottleneck"] = max(config.bottleneck * width // REGISTRY_WIDTH, 1)
    return dataclasses.replace(config, **changes)


def find_rows(names: Sequence[str]) -> tuple[list[Choices], dict[str, str]]:
    """Return the rows that can be put on the demo's backbone, and of the others the reason.

    Args:
        names: of the registry, or "all".

    Raises:
        UsageError: there is no such row, or one that was asked for by name cannot be had.
    """
    for name in names:
        near = difflib.get_close_matches(name, (ALL, *METHODS), n=1)
        hint = f"did you mean {near[0]}?" if near else "choose one of these"
        known = name == ALL or name in METHODS
        require(known, "--methods", repr(name), ", ".join((ALL, *METHODS)), hint)
    rows, reasons = [], {}
    for name in dict.fromkeys(METHODS if ALL in names else names):
        row = choices_of(name)
        try:
            wrap_backbone(row.prompts, row.input_prompt, row.tuning)
        except ValueError as error:
            reasons[name] = str(error)
            usable = name not in names
            expected = f"a row that the demo's backbone can have ({error})"
            require(usable, "--methods", repr(name), expected, "leave it out")
        else:
            rows.append(row)
    return rows, reasons


def tuned_settings(path: Path = TUNED_ROWS) -> dict[str, Any]:
    """Return what `tune-demo --methods` recorded, row by row; nothing if it has not run."""
    found = read_json(path)
    usable = found is None or (isinstance(found, dict) and isinstance(found.get("rows"), dict))
    require(usable, str(path), "other data", "what tune-demo --methods writes", "delete the file")
    return {} if found is None else found["rows"]


def describe(row: Choices) -> dict[str, Any]:
    """Return a row's choices as JSON data, to tell whether a record is still of the same row."""
    return json.loads(json.dumps(dataclasses.asdict(row)))
