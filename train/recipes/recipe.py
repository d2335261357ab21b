"""Recipes: everything that decides the training of one method on one dataset.

Sources: the scripts sh/VFPT_TCPA_*.sh of the official TCPA repository (commit dce8b3a), which exist
for VFPT + TCPA on the ten HTA datasets alone, and for other methods those that `rows` names.
"""

import csv
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

import tcpa
from tcpa.checks import did_you_mean

from ...cli import require
from ...methods import INPUT_PROMPTS, TUNINGS
from ..data.vtab_tasks import SEEDS, VTAB
from ..options.run import RecipesConfig
from .rows import METHODS, Method
from .training import PLAIN, Training

PUBLISHED_METHOD = "vfpt+tcpa"


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """What differs between the official scripts besides `TCPAConfig.official`."""

    label: str
    """Column of the paper's Table 1."""
    name: str
    """The script is sh/VFPT_TCPA_NAME.sh."""
    learning_rate: float
    weight_decay: float


SCRIPTS: dict[str, Script] = {
    dataset: Script(label=label, name=name, learning_rate=rate, weight_decay=decay)
    for dataset, label, name, rate, decay in (
        ("dtd", "DTD", "dtd", 0.01, 0.1),
        ("cub", "CUB", "cub", 0.0015, 0.5),
        ("nabirds", "Bird", "birds", 0.001, 0.5),
        ("stanford_dogs", "Dog", "dogs", 0.004, 0.5),
        ("flower102", "Flower", "flower", 0.014, 1.4),
        ("food101", "Food", "food", 0.005, 0.1),
        ("cifar100", "Cifar100", "cifar100", 0.004, 0.1),
        ("cifar10", "Cifar10", "cifar10", 0.005, 0.1),
        ("gtsrb", "GTSRB", "gtsrb", 0.001, 0.1),
        ("svhn", "SVHN", "svhn", 0.002, 0.1),
    )
}
STAND_IN = "food101"
"""Whose optimiser settings a dataset without a script takes."""


VTAB_BATCHES = {"e2vpt": 64}
"""Row -> batch size of its source on VTAB-1k, where that is another."""

NONE, USUAL_TUNING = "none", "head"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(Training):
    """A complete description of the training of one method on one dataset."""

    dataset: str
    method: str
    """The method's full name, which `recipe` takes."""
    label: str
    """Column of the paper's Table 1; the dataset's name where it has none."""
    source: str
    """Where the method and its settings come from."""
    script: str
    """File of the official TCPA repository; "" without one."""
    note: str
    """What no source says and was taken from elsewhere; "" for a published recipe."""
    prompts: tcpa.PromptConfig | None
    """Token prompts."""
    input_name: str = NONE
    """Name of `input_prompt`'s kind."""
    input_prompt: tcpa.InputConfig | None = None
    tuning_name: str = USUAL_TUNING
    """Name of `tuning`'s kind."""
    tuning: tcpa.TuningConfig = field(default_factory=tcpa.HeadTuning)
    prune_tokens: float = 0.0
    """E2VPT: share of the tokens of a block that is pruned."""
    prune_segments: float = 0.0
    """E2VPT: share of the segments of a token that is pruned."""
    resize: int = 256
    """Shorter side to which an image is resized, pixels."""
    crop: int = 224
    """Side of the square that the model sees, pixels."""
    seed: int = 3407
    chosen: str = ""
    """Grid from which a search chose rate and decay on validation images; "" for none."""
    pretrained_flag: str = "imagenet22k"
    """The scripts' name of their backbone weights."""

    @property
    def peak_rate(self) -> float:
        """Highest learning rate at the batch size."""
        scale = self.batch_size / self.rate_batch if self.rate_batch else 1.0
        return self.learning_rate * scale

    @property
    def mixes(self) -> bool:
        """Whether images are mixed; global batches must then be even."""
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


def recipe(dataset: str, method: str = PUBLISHED_METHOD) -> Recipe:
    """Return the recipe of a method on a dataset.

    Args:
        dataset: one of `tcpa.HTA_DATASETS`, or the name of a dataset of the user's own.
        method: one of `METHODS`, or a name that `compose` gives.

    Raises:
        UsageError: no such method or choice.

    Source:
        `Recipe.source`; `Recipe.note` says what was assumed.
    """
    row, changes = decompose(method)
    require_row(row, "--method")
    found = METHODS[row]
    script = SCRIPTS.get(dataset) if row == PUBLISHED_METHOD or found.training is None else None
    source = SCRIPTS.get(dataset) or SCRIPTS[STAND_IN]
    training = found.training or Training(
        learning_rate=source.learning_rate, weight_decay=source.weight_decay
    )
    made = Recipe(
        **{name: getattr(training, name) for name in Training.__dataclass_fields__},
        dataset=dataset,
        method=method,
        label=SCRIPTS[dataset].label if dataset in SCRIPTS else dataset,
        source=found.source,
        script=f"sh/VFPT_TCPA_{script.name}.sh" if script else "",
        note=_note(dataset, found, changes),
        prompts=found.prompts(dataset),
        input_name=_name_of(found.input_prompt, INPUT_PROMPTS),
        input_prompt=found.input_prompt,
        tuning_name=_name_of(found.tuning, TUNINGS),
        tuning=found.tuning,
    )
    made = _changed(made, found, changes)
    return _on_vtab(made, row) if dataset in VTAB else made


def require_row(row: str, option: str) -> None:
    """Raise UsageError, for the option that names it, if there is no such row."""
    hint = did_you_mean(row, METHODS, "choose one of these")
    require(row in METHODS, option, repr(row), " or ".join(METHODS), hint)


def _on_vtab(made: Recipe, row: str) -> Recipe:
    """Squares of the model's size, neither augmentation nor mixing, the first of VPT's seeds."""
    batch = VTAB_BATCHES.get(row, made.batch_size)
    plain: dict[str, Any] = {"augment": False, **PLAIN}
    return replace(made, resize=made.crop, batch_size=batch, seed=SEEDS[0], **plain)


def compose(
    method: str, *, input_prompt: str | None = None, tuning: str | None = None, parity: bool = False
) -> str:
    """Return the full name of a row with another prompt on the image, another tuning, or the bugs
    of its source: `vpt-deep_input-vp_tuning-bias`."""
    parts = [method]
    parts += [f"input-{input_prompt}"] if input_prompt is not None else []
    parts += [f"tuning-{tuning}"] if tuning is not None else []
    return "_".join([*parts, "parity"] if parity else parts)


def decompose(method: str) -> tuple[str, dict[str, str]]:
    """Return the row of a full name and what replaces its choices: "input", "tuning", "parity".

    Raises:
        UsageError: a choice is not known.
    """
    row, *parts = method.split("_")
    changes: dict[str, str] = {}
    for part in parts:
        kind, _, name = part.partition("-")
        known = {"input": (NONE, *INPUT_PROMPTS), "tuning": tuple(TUNINGS), "parity": ("",)}
        usable, words = kind in known, "input-NAME, tuning-NAME or parity"
        require(usable, "--method", repr(part), words, "write ROW_input-NAME_tuning-NAME")
        option = {"input": "--input-prompt", "tuning": "--tuning"}.get(kind, "--method")
        hint = did_you_mean(name, known[kind], "choose one of these")
        require(name in known[kind], option, repr(name), " or ".join(known[kind]), hint)
        changes[kind] = name
    return row, changes


def _name_of(config: object, kinds: Mapping[str, type]) -> str:
    return next((name for name, kind in kinds.items() if kind is type(config)), NONE)


def _changed(made: Recipe, row: Method, changes: Mapping[str, str]) -> Recipe:
    """Put the choices of a full name in place of those of the row."""
    changed: dict[str, Any] = {}
    if "parity" in changes:
        got = f"parity with {row.label}"
        expected = "a method whose source has a bug that is corrected here"
        require(bool(row.parity), "--parity", got, expected, "leave it out")
        changed |= row.parity
    if "input" in changes:
        name = changes["input"]
        chosen = None if name == NONE else INPUT_PROMPTS[name]()
        changed |= {"input_name": name, "input_prompt": chosen}
    if "tuning" in changes:
        name = changes["tuning"]
        changed |= {"tuning_name": name, "tuning": TUNINGS[name]()}
    return replace(made, **changed)


CORRECTED = "corrected: "
"""Begins the part of a row's note that says which bug of its source is not repeated."""


def _note(dataset: str, row: Method, changes: Mapping[str, str]) -> str:
    notes = []
    if dataset not in SCRIPTS and row.training is None:
        bare = ", without augmentation and mixing" if dataset in VTAB else ""
        notes.append(f"no recipe is published for this dataset; that of {STAND_IN} was taken{bare}")
    if row.note:
        parts = row.note.split("; ")
        repeated = "parity" in changes
        notes += [p for p in parts if not (repeated and p.startswith(CORRECTED))]
    if changes.keys() & {"input", "tuning"}:
        notes.append(f"trained as {row.label}, of which a choice was replaced")
    if "parity" in changes:
        notes.append("repeats the known bugs of its source")
    return "; ".join(notes)


COLUMNS: dict[str, Callable[[Recipe, tcpa.TCPAConfig], object]] = {
    "dataset_label": lambda r, p: r.label,
    "dataset_flag": lambda r, p: r.dataset,
    "script": lambda r, p: r.script,
    "lr": lambda r, p: r.learning_rate,
    "weight_decay": lambda r, p: r.weight_decay,
    "batch_size": lambda r, p: r.batch_size,
    "epochs": lambda r, p: r.epochs,
    "topk_cls": lambda r, p: p.cls_top_k,
    "topk_image": lambda r, p: p.image_top_k,
    "pool_size_cls": lambda r, p: p.cls_pool_size,
    "pool_size_image": lambda r, p: p.image_pool_size,
    "len_prompts_cls": lambda r, p: p.cls_prompt_length,
    "len_prompts_image": lambda r, p: p.image_prompt_length,
    "pool_loss_w": lambda r, p: p.match_weight,
    "random_epoch": lambda r, p: p.random_selection_epochs,
    "prompt_dropout": lambda r, p: p.prompt_dropout,
    "mixup_alpha": lambda r, p: r.mixup_alpha,
    "cutmix_alpha": lambda r, p: r.cutmix_alpha,
    "mix_prob": lambda r, p: r.mix_prob,
    "label_smoothing": lambda r, p: r.label_smoothing,
    "IPrompt": lambda r, p: p.image_prompt,
    "random_prompt": lambda r, p: p.token_noise > 0,
    "ADVP": lambda r, p: p.value_affine,
    "simam": lambda r, p: p.simam,
    # No configuration of ours gives prompts to every token alike.
    "RDVP": lambda r, p: True,
    "TDVP": lambda r, p: p.coordination == "token",
    "resize": lambda r, p: r.resize,
    "crop": lambda r, p: r.crop,
    "seed": lambda r, p: r.seed,
    "optimizer": lambda r, p: r.optimizer,
    "warmup_fraction": lambda r, p: r.warmup_fraction,
    "num_prompt_tokens_per_layer": lambda r, p: p.num_prompts,
    "pretrained_flag": lambda r, p: r.pretrained_flag,
}
"""Official name of a hyper-parameter -> its value in a recipe with TCPA."""


def recipe_rows() -> list[dict[str, str]]:
    """Return the recipes of VFPT + TCPA on the HTA datasets, official names to printed values."""
    rows = []
    for dataset in SCRIPTS:
        found = recipe(dataset)
        prompts: Any = found.prompts
        row = {name: _cell(value(found, prompts)) for name, value in COLUMNS.items()}
        rows.append(row)
    return rows


def _cell(value: object) -> str:
    """Print flags as 0 and 1 and whole numbers without a point, as the scripts do."""
    if isinstance(value, bool | float):
        return f"{float(value):g}"
    return str(value)


def print_recipes(config: RecipesConfig) -> None:
    """Print the recipes: what differs and what is common, or every cell as CSV."""
    rows = recipe_rows()
    if config.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        print(text.getvalue(), end="")
        return
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    common = {name for name in COLUMNS if len({row[name] for row in rows}) == 1}
    table = Table(title="VFPT + TCPA, as in the official scripts")
    for name in COLUMNS:
        if name not in common:
            table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in COLUMNS if name not in common))
    console.print(table)
    console.print("For all: " + ", ".join(f"{n}={rows[0][n]}" for n in COLUMNS if n in common))
    console.print(f"Methods: {', '.join(METHODS)}.")
