"""What the demo compares: three methods of its own, and the rows of the paper's tables.

A row brings its token prompts, its prompt on the image and its tuning, at the size of the demo.
All have the demo's loop, optimizer and schedule, torch's initial values of the head, and, where
prompts stand in front of the blocks, as many rows of them, without dropout: what is compared is the
choices.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tcpa

from ...cli import require
from ..options.checks import require_known
from ..recipes.rows import METHODS
from ..storage import read_json
from .backbone import NORMALIZATION, WIDTH, load_backbone
from .digits import NUM_CLASSES

ALL = "all"
PROMPT_ROWS = 20
HALF = PROMPT_ROWS // 2

TUNED = Path(__file__).with_name("tuned.json")
TUNED_ROWS = Path(__file__).with_name("tuned_rows.json")

POOLS = tcpa.TCPAConfig(
    cls_pool_size=HALF,
    image_pool_size=HALF,
    cls_top_k=5,
    image_top_k=5,
    prompt_transform="identity",
    prompt_dropout=0.0,
    random_selection_epochs=1,
)

POOL_SETTINGS = ("cls_top_k", "image_top_k", "random_selection_epochs")
"""Settings of the pools that rows with TCPA take over."""

PROMPTS: dict[str, tcpa.PromptConfig | None] = {
    "linear probe": None,
    "VPT-deep": tcpa.VPTConfig(length=PROMPT_ROWS),
    "TCPA": POOLS,
}
"""What is compared. VPT-deep and TCPA have as many prompt rows in every block, prompts that are
trained directly and no dropout, so that the coordination is all that tells them apart."""

REGISTRY_WIDTH = 768
"""Width of the backbone for which the rows state their sizes."""

ADAPTED = (
    f"{PROMPT_ROWS} prompt rows a block wherever there are any, without dropout (pools of {HALF} "
    f"and {HALF} with top-5, E2VPT {HALF} tokens and {HALF} key-value prompts); frames, and the "
    "bottleneck of AdaptFormer, in proportion; Sidetune's AlexNet from random values, on enlarged "
    "images; every row with AdamW and the same schedule in place of its own, and with the same "
    "linear head"
)
"""What differs from the recipes, for readers of the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoMethod:
    """One way to adapt the frozen backbone."""

    name: str
    prompts: tcpa.PromptConfig | None
    learning_rate: float = math.nan
    weight_decay: float = math.nan
    input_prompt: tcpa.InputConfig | None = None
    tuning: tcpa.TuningConfig = field(default_factory=tcpa.HeadTuning)

    def tuned(self, learning_rate: float, weight_decay: float) -> "DemoMethod":
        """Return it with optimizer settings, which are a part of its name."""
        name = f"{self.name}, rate {learning_rate:g}, decay {weight_decay:g}"
        return replace(self, name=name, learning_rate=learning_rate, weight_decay=weight_decay)


OPTIMIZER = ("learning_rate", "weight_decay")
"""Fields of a method that tuning decides."""


def chosen_methods() -> tuple[DemoMethod, ...]:
    """Return the methods, each with the optimizer settings that `tune-demo` recorded for it."""
    chosen = json.loads(TUNED.read_text(encoding="utf-8"))["chosen"]
    return tuple(
        DemoMethod(name=name, prompts=prompts, **chosen[name]) for name, prompts in PROMPTS.items()
    )


def probe_strength() -> float:
    """Return the inverse penalty that `tune-demo` recorded for logistic regression."""
    return json.loads(TUNED.read_text(encoding="utf-8"))["probe_strength"]


def wrap_backbone(method: DemoMethod) -> tcpa.PromptedViT:
    """Put a method on a fresh copy of the shipped backbone.

    Raises:
        ValueError: that cannot be done; the message says why.
    """
    return tcpa.wrap(
        load_backbone(),
        method.prompts,
        input_prompt=method.input_prompt,
        tuning=method.tuning,
        num_classes=NUM_CLASSES,
        normalization=NORMALIZATION,
        # No images of ours are among those that a side network's weights come from.
        load_weights=False,
    )


def row_of(name: str) -> DemoMethod:
    """Return a row of the tables at the size of the demo, without optimizer settings."""
    row = METHODS[name]
    prompts = row.prompts("digits")
    if prompts is not None:
        prompts = prompts.resized(PROMPT_ROWS)
        own = {field: getattr(POOLS, field) for field in POOL_SETTINGS}
        prompts = prompts.replace(**own) if prompts.has(*POOL_SETTINGS) else prompts
    tuning = row.tuning.without_download().scaled_to(WIDTH, REGISTRY_WIDTH).replace(head="linear")
    return DemoMethod(name=name, prompts=prompts, input_prompt=row.input_prompt, tuning=tuning)


def find_rows(names: Sequence[str]) -> tuple[list[DemoMethod], dict[str, str]]:
    """Return the rows that can be put on the demo's backbone, and of the others the reason.

    Args:
        names: rows of the tables, or "all".

    Raises:
        UsageError: there is no such row, or one that was asked for by name cannot be had.
    """
    for name in names:
        require_known("--methods", name, (ALL, *METHODS))
    rows, reasons = [], {}
    for name in METHODS if ALL in names else names:
        row = row_of(name)
        try:
            wrap_backbone(row)
        except ValueError as error:
            reasons[name] = str(error)
            expected = f"a row that the demo's backbone can have ({error})"
            require(name not in names, "--methods", repr(name), expected, "leave it out")
        else:
            rows.append(row)
    return rows, reasons


def tuned_settings(path: Path = TUNED_ROWS) -> dict[str, Any]:
    """Return what `tune-demo --methods` recorded, row by row; nothing if it has not run."""
    found = read_json(path)
    usable = found is None or (isinstance(found, dict) and isinstance(found.get("rows"), dict))
    require(usable, str(path), "other data", "what tune-demo --methods writes", "delete the file")
    return {} if found is None else found["rows"]


def describe(row: DemoMethod) -> dict[str, Any]:
    """Return a row's choices as JSON data, to tell whether a record is still of the same row."""
    choices = {name: value for name, value in asdict(row).items() if name not in OPTIMIZER}
    return json.loads(json.dumps(choices | {"label": METHODS[row.name].label}))
