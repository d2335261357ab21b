"""Recipes: everything that the official scripts fix for one of the ten HTA datasets.

Source: the scripts sh/VFPT_TCPA_*.sh of the official TCPA repository (commit dce8b3a). They exist
for VFPT + TCPA alone; every other method takes the same optimiser settings, and its recipe says so.
"""

import csv
import difflib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

import tcpa

from ..cli import require
from .config import RecipesConfig

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A complete description of the training of one method on one dataset."""

    dataset: str
    method: str
    label: str
    """Column of the paper's Table 1; the dataset's name where it has none."""
    script: str
    """File of the official repository; "" without one."""
    note: str
    """What no source says and was taken from elsewhere; "" for a published recipe."""
    prompts: tcpa.PromptConfig | None
    learning_rate: float
    """Peak of the schedule."""
    weight_decay: float
    """On every trained value, biases and prompts included."""
    batch_size: int = 128
    """Images of a step, over all devices."""
    epochs: int = 100
    optimizer: str = "AdamW"
    warmup_fraction: float = 0.2
    """Share of all steps over which the learning rate rises; a cosine to zero follows."""
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 0.0
    mix_prob: float = 0.5
    """Share of the batches that are mixed."""
    label_smoothing: float = 0.1
    resize: int = 256
    """Shorter side to which an image is resized, pixels."""
    crop: int = 224
    """Side of the square that the model sees, pixels."""
    seed: int = 3407
    pretrained_flag: str = "imagenet22k"
    """The scripts' name of their backbone weights."""


def _token_prompts(fourier: bool) -> tcpa.VPTConfig:
    """The VFPT baseline of the official code; without its transform it is VPT-Deep."""
    config = tcpa.VPTConfig.official_vfpt()
    return config if fourier else replace(config, fourier_fraction=0.0, init="xavier")


def _coordinated(dataset: str, transform: str) -> tcpa.TCPAConfig:
    official = dataset in SCRIPTS
    config = tcpa.TCPAConfig.official(dataset) if official else tcpa.TCPAConfig()
    return replace(config, prompt_transform=transform)


METHODS: dict[str, Callable[[str], tcpa.PromptConfig | None]] = {
    "linear": lambda dataset: None,
    "vpt-deep": lambda dataset: _token_prompts(fourier=False),
    "vfpt": lambda dataset: _token_prompts(fourier=True),
    "vpt+tcpa": lambda dataset: _coordinated(dataset, "identity"),
    "vfpt+tcpa": lambda dataset: _coordinated(dataset, "fourier"),
}
"""Method -> its prompts on a dataset."""


def recipe(dataset: str, method: str = PUBLISHED_METHOD) -> Recipe:
    """Return the recipe of a method on a dataset.

    Args:
        dataset: one of `tcpa.HTA_DATASETS`, or the name of a dataset of the user's own.
        method: one of `METHODS`.

    Raises:
        UsageError: no such method.

    Source:
        Official scripts for VFPT + TCPA on the HTA datasets; `Recipe.note` says what was assumed
        elsewhere.
    """
    near = difflib.get_close_matches(method, METHODS, n=1)
    hint = f"did you mean {near[0]}?" if near else "choose one of these"
    require(method in METHODS, "--method", repr(method), " or ".join(METHODS), hint)
    script = SCRIPTS.get(dataset)
    source = script or SCRIPTS[STAND_IN]
    return Recipe(
        dataset=dataset,
        method=method,
        label=script.label if script else dataset,
        script=f"sh/VFPT_TCPA_{script.name}.sh" if script else "",
        note=_note(dataset, method),
        prompts=METHODS[method](dataset),
        learning_rate=source.learning_rate,
        weight_decay=source.weight_decay,
    )


def _note(dataset: str, method: str) -> str:
    notes = []
    if dataset not in SCRIPTS:
        notes.append(f"no recipe is published for this dataset; that of {STAND_IN} was taken")
    if method != PUBLISHED_METHOD:
        text = f"hyper-parameters of {method} are unpublished; those of {PUBLISHED_METHOD} were"
        notes.append(f"{text} taken")
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
        assert isinstance(found.prompts, tcpa.TCPAConfig)
        row = {name: _cell(value(found, found.prompts)) for name, value in COLUMNS.items()}
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
    console.print(f"Methods: {', '.join(METHODS)}. Only {PUBLISHED_METHOD} has published settings.")
