"""What a search can be asked for."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...cli import require
from .checks import require_different, require_gpus
from .run import Positional, RunConfig, TrainOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig(TrainOptions):
    """Choose learning rate and weight decay on validation images; no test image is read.

    One run under protocol tune for each pair of the grid. Finished ones are skipped and interrupted
    ones resume: the command can be repeated. `run` and `sweep` take the choice by --choices.
    """

    method: Annotated[str, Positional]
    """Row of the paper's tables, see `run`."""

    dataset: Annotated[str, Positional]
    """One dataset, see `run`."""

    output: Path = Path("searches")
    """Folder for all searches; one goes to OUTPUT/DATASET/METHOD, with a folder for each trial and
    choice.json."""

    learning_rates: tuple[float, ...] | None = None
    """Peaks of the schedule to try; by default the grid that the method's source publishes, scaled
    to the batch size."""

    weight_decays: tuple[float, ...] | None = None
    """Weight decays to try; by default those that the method's source publishes."""

    seed: int | None = None
    """Seed of every trial; the recipe's by default."""

    gpus: tuple[int, ...] | None = None
    """GPUs to use, one trial at a time each; all by default."""

    print_jobs: bool = False
    """Print the command of every trial that is left on a line of its own, for an array job, and run
    nothing; the search itself, started afterwards, makes the choice."""

    def __post_init__(self) -> None:
        advice = "give the values to try by --learning-rates and --weight-decays"
        for option in ("learning_rate", "weight_decay"):
            value = getattr(self, option)
            require(value is None, f"--{option.replace('_', '-')}", value, "none", advice)
        protocol, usual = self.protocol, "auto or tune, the protocol of a search"
        require(protocol in ("auto", "tune"), "--protocol", protocol, usual, "leave it out")
        require(self.choices is None, "--choices", self.choices, "none", "a search makes them")
        _require_grid("--learning-rates", self.learning_rates, above=0.0)
        _require_grid("--weight-decays", self.weight_decays, above=-math.inf)
        require_gpus(self.gpus)
        # The options of all trials are checked as those of one.
        self.trial()

    def trial(self, rate: float | None = None, decay: float | None = None) -> RunConfig:
        """Return the configuration of one trial; None stands for the recipe's value."""
        return self.run_of(
            dataset=self.dataset,
            method=self.method,
            seed=self.seed,
            protocol="tune",
            learning_rate=rate,
            weight_decay=decay,
        )


def _require_grid(option: str, values: tuple[float, ...] | None, *, above: float) -> None:
    if values is None:
        return
    require_different(option, values)
    shown = ", ".join(map(str, values))
    usable = all(math.isfinite(value) and value >= 0 and value > above for value in values)
    bound = "numbers above 0" if above == 0 else "numbers from 0"
    require(usable, option, shown, bound, "change them")
