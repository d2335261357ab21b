"""What a run of an ablation left, and what several runs of a setting have in common."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .studies import Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One finished run."""

    validation: float
    """Accuracy on the validation images, percent."""
    test: float | None
    """Accuracy on the test images of the same model, percent; None under protocol tune."""
    trainable: int
    """Trained values, the head included."""
    seconds_per_epoch: float
    """Training time of an epoch, without evaluation: the median; of the digits, the fastest."""


Runs = Mapping[tuple[str, int], Measured]
"""Name of a setting and seed -> what was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A setting over the seeds that are finished."""

    setting: Setting
    seeds: tuple[int, ...]
    runs: tuple[Measured, ...]
    """One for each of the seeds."""

    @property
    def validation(self) -> tuple[float, ...]:
        """Percent, by seed."""
        return tuple(run.validation for run in self.runs)

    @property
    def test(self) -> tuple[float, ...]:
        """Percent, by seed; empty where not all of them were tested."""
        found = tuple(run.test for run in self.runs if run.test is not None)
        return found if len(found) == len(self.runs) else ()

    @property
    def mean(self) -> float | None:
        """Mean validation accuracy, percent; None before the first run."""
        return mean(self.validation)


def summarise(settings: Sequence[Setting], seeds: Sequence[int], runs: Runs) -> list[Summary]:
    """Gather the runs of each setting."""
    found = []
    for setting in settings:
        own = tuple(seed for seed in seeds if (setting.name, seed) in runs)
        of_seeds = tuple(runs[setting.name, seed] for seed in own)
        found.append(Summary(setting=setting, seeds=own, runs=of_seeds))
    return found


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation (n - 1); None of less than two values."""
    return statistics.stdev(values) if len(values) > 1 else None
