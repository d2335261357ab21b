"""What the demo's commands can be asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...cli import require
from .checks import MAX_SEED, require_seed

T = TypeVar("T")

EPOCHS, ROW_EPOCHS = 20, 5
"""Passes over the training images: of the demo's three methods, of the rows of the tables."""

MAX_FOLDS = 4
"""Folds of the training images."""


def _set_defaults(config: object, **values: object) -> None:
    """Give values to what was not asked for."""
    for name, value in values.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)


def _require_count(name: str, value: int) -> None:
    require(value >= 1, name, value, "an integer of 1 or more", "ask for at least one")


def _require_different(name: str, values: Sequence[object], usable: bool, what: str) -> None:
    """Check a list of settings; `usable` says whether each of them is one of `what`."""
    require(len(values) > 0, name, "no value", f"different {what}", f"leave {name} out or give one")
    shown = ", ".join(map(str, values))
    different = len(set(values)) == len(values)
    require(usable and different, name, shown, f"different {what}", "change them")


def _require_methods(methods: tuple[str, ...] | None) -> None:
    """Check a list of rows as far as that needs no recipes."""
    if methods is not None:
        _require_different("--methods", methods, all(methods), "names of rows, or all")


def given(value: T | None) -> T:
    """Return the value of an option whose default depends on others, and has been put in."""
    assert value is not None
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Compare linear probe, VPT-deep and TCPA on 1,797 handwritten digits, in about two minutes."""

    output: Path = Path("demo_output")
    """Folder for metrics, figures and the TCPA adapter; an earlier demo in it is replaced. With
    --methods: metrics and the table, as methods.md and methods.csv."""

    methods: tuple[str, ...] | None = None
    """Rows of the paper's tables to compare in place of the three, by the names of `tcpa-train
    run`, or all; all take about ten minutes on two CPU cores."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every method per seed; a seed decides initial values and order of the images."""

    epochs: int | None = None
    """Passes over the training images; by default 20, and 5 with --methods, as in their tuning."""

    device: str = "auto"
    """Where to train: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""

    quick: bool = False
    """Only see that all works: one seed, two epochs, 300 images. The figures mean nothing."""

    def __post_init__(self) -> None:
        _set_defaults(self, epochs=ROW_EPOCHS if self.methods else EPOCHS)
        _require_count("--epochs", given(self.epochs))
        usable = all(0 <= seed <= MAX_SEED for seed in self.seeds)
        _require_different("--seeds", self.seeds, usable, "integers from 0 to 2**63 - 1")
        _require_methods(self.methods)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """Choose learning rate and weight decay of the demo's methods: one grid for all, on four folds.

    The test images are not used. About a quarter of an hour on two CPU cores.
    """

    output: Path | None = None
    """File to write: accuracies of the whole grid, and the best pair of every method; by default
    tuned.json. With --methods tuned_rows.json: what it already holds of them is kept."""

    methods: tuple[str, ...] | None = None
    """Rows of the paper's tables to tune in place of the three methods, or all: first the rates
    with the smallest decay, then the other decays with the best rate."""

    learning_rates: tuple[float, ...] | None = None
    """Learning rates to try, peaks of the schedule; by default 0.01, 0.03, 0.1 and 0.3, with
    --methods 0.001, 0.005, 0.02, 0.1 and 0.3."""

    weight_decays: tuple[float, ...] = (0.0001, 0.5)
    """Weight decays to try with every learning rate; the official recipe for CUB has 0.5."""

    folds: int | None = None
    """Folds of the training images to measure on, the last ones in the file; by default all 4, and
    1 with --methods."""

    epochs: int | None = None
    """Passes over the training images, as in the demo: by default 20, with --methods 5."""

    device: str = "auto"
    """Where to train: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        if self.methods is None:
            _set_defaults(self, output=Path("tuned.json"), learning_rates=(0.01, 0.03, 0.1, 0.3))
            _set_defaults(self, folds=MAX_FOLDS, epochs=EPOCHS)
        else:
            _set_defaults(self, output=Path("tuned_rows.json"), folds=1, epochs=ROW_EPOCHS)
            _set_defaults(self, learning_rates=(0.001, 0.005, 0.02, 0.1, 0.3))
        _require_methods(self.methods)
        _require_count("--epochs", given(self.epochs))
        folds, remedy = given(self.folds), "leave it out for the default"
        require(1 <= folds <= MAX_FOLDS, "--folds", folds, f"1 to {MAX_FOLDS}", remedy)
        usable = all(0 < rate < 10 for rate in given(self.learning_rates))
        expected = "numbers between 0 and 10"
        _require_different("--learning-rates", given(self.learning_rates), usable, expected)
        usable = all(0 <= decay < 10 for decay in self.weight_decays)
        expected = "numbers from 0 to less than 10"
        _require_different("--weight-decays", self.weight_decays, usable, expected)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Pretrain the demo's small ViT on generated images and write its weights.

    About six minutes on two CPU cores. Set OMP_WAIT_POLICY=PASSIVE if the machine does other work.
    """

    output: Path = Path("demo_vit.safetensors")
    """File to write, safetensors."""

    seed: int = 0
    """Chooses the formulas, the images, the initial weights and the order."""

    images_per_class: int = 256
    """Training images of each of the 128 formulas."""

    epochs: int = 12
    """Passes over the training images."""

    batch_size: int = 128
    """Images in a step."""

    learning_rate: float = 1e-3
    """Peak of the schedule (AdamW)."""

    weight_decay: float = 0.05
    """Weight decay of the matrices (AdamW)."""

    def __post_init__(self) -> None:
        for name in ("images_per_class", "epochs", "batch_size"):
            _require_count("--" + name.replace("_", "-"), getattr(self, name))
        rate, decay = self.learning_rate, self.weight_decay
        between = "a number between 0 and 10"
        require(0 < rate < 10, "--learning-rate", rate, between, "the default is 0.001")
        require(0 <= decay < 10, "--weight-decay", decay, f"0 or {between}", "the default is 0.05")
        require_seed("--seed", self.seed)
