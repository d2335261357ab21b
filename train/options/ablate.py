"""What an ablation can be asked for."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from ...cli import require
from .checks import require_different, require_known, require_seed
from .run import Positional, Protocol, RunConfig, TrainOptions

DEMO = "demo"

STUDIES = (
    "components",
    "pools",
    "top-k",
    "length",
    "match-weight",
    "selection",
    "normalization",
    "fourier",
)

DEMO_OPTIONS = ("output", "protocol", "epochs", "learning_rate", "weight_decay", "device")
"""What the digits take of the options of `run`."""

POOL_OPTIONS = ("pool_size", "top_k", "match_weight", "random_selection_epochs", "prompt_dropout")
"""Options of `run` that change the prompts from which the studies start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AblateConfig(TrainOptions):
    """Vary the parts of TCPA one at a time, with several seeds: a table and a picture per study.

    Settings are compared on validation images; test accuracies are printed beside them and choose
    nothing. Finished runs are skipped and interrupted ones resume, so that the command can be
    repeated, with further studies or seeds too.
    """

    recipe: Annotated[str, Positional]
    """A dataset, see `run`, or demo: the digits of `tcpa-train demo`, which need no download."""

    study: tuple[str, ...] = STUDIES
    """What to vary: components (VPT, + R-TCPA, + T-TCPA), pools (CLS pool x image pool), top-k,
    length (prompt rows of an entry), match-weight, selection (nearest or farthest), normalization
    (over all or visible prompts), fourier (none, of both pools jointly, of each pool)."""

    method: str | None = None
    """Row with TCPA from which the studies start; vpt+tcpa by default. A study changes its token
    prompts alone; the demo has vpt+tcpa only."""

    output: Path = Path("ablation")
    """Folder for all runs, OUTPUT/RECIPE/METHOD/PROTOCOL-seedN, and for the tables and pictures,
    OUTPUT/RECIPE/STUDY.md, .csv and .png."""

    protocol: Protocol = "val"
    """val: choose the epoch on validation images (demo: the last epoch), then test once; tune:
    validate once and never test. Other protocols are refused: they would compare settings on the
    test images."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every setting for each of them. demo: seed n is validated on fold n modulo 4 of
    the training images."""

    pool_sizes: tuple[int, ...] | None = None
    """Sizes of either pool in `pools`; by default 5, 10, 20 and 30, demo 2, 5, 10 and 20."""

    top_ks: tuple[int, ...] | None = None
    """Entries that a token sees in `top-k`; by default 1, 2, 5, 10, 20 as far as the pools go, and
    all of a pool."""

    lengths: tuple[int, ...] = (1, 2, 4)
    """Prompt rows of an entry in `length`."""

    match_weights: tuple[float, ...] = (0.0, 0.001, 0.01, 0.1, 0.5)
    """Weights of the match distance in the loss in `match-weight`."""

    cells: tuple[str, ...] | None = None
    """Train these settings alone, by the names that --print-jobs prints, and write no table."""

    print_jobs: bool = False
    """Print the command of every run on a line of its own, for an array job, and run nothing; the
    same command without it, started afterwards, makes the tables."""

    quick: bool = False
    """demo: only see that all works: the first seed, one epoch, 300 images. The figures mean
    nothing."""

    def __post_init__(self) -> None:
        require_different("--study", self.study)
        for name in self.study:
            require_known("--study", name, STUDIES, "choose some of these")
        reason = "val or tune: settings are compared on validation images, never on test images"
        usable = self.protocol in ("val", "tune")
        require(usable, "--protocol", self.protocol, reason, "leave it out")
        require_different("--seeds", self.seeds)
        for seed in self.seeds:
            require_seed("--seeds", seed)
        for option in ("pool_sizes", "top_ks", "lengths", "match_weights", "cells"):
            _require_values(option, getattr(self, option))
        if self.recipe == DEMO:
            self._require_demo()
        require(not self.quick or self.recipe == DEMO, "--quick", self.recipe, DEMO, "leave it out")
        # The options of all runs are checked as those of one.
        self.base()

    def _require_demo(self) -> None:
        for field in fields(TrainOptions):
            value, usual = getattr(self, field.name), self.__dataclass_fields__[field.name].default
            option = f"--{field.name.replace('_', '-')}"
            usable = field.name in DEMO_OPTIONS or value == usual
            shown = ", ".join(f"--{name.replace('_', '-')}" for name in DEMO_OPTIONS)
            require(usable, option, f"{value} with RECIPE demo", shown, "leave it out")
        usable, row = self.method in (None, "vpt+tcpa"), "vpt+tcpa, which the demo has"
        require(usable, "--method", repr(self.method), row, "leave it out")

    @property
    def base_method(self) -> str:
        """Row from which the studies start."""
        return self.method or "vpt+tcpa"

    def base(self, seed: int | None = None) -> RunConfig:
        """Return the configuration of the run from which the studies start."""
        dataset = "cub" if self.recipe == DEMO else self.recipe
        return self.run_of(dataset=dataset, method=self.base_method, seed=seed)


def _require_values(option: str, values: tuple | None) -> None:
    name = f"--{option.replace('_', '-')}"
    if values is not None:
        require_different(name, values)
    if values is None or option == "cells":
        return
    least = 0 if option == "match_weights" else 1
    usable = all(least <= value < math.inf for value in values)
    shown = ", ".join(map(str, values))
    require(usable, name, shown, f"numbers from {least}", "change them")
