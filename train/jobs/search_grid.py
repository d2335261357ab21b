"""The pairs of learning rate and weight decay that a search tries, and where they come from."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ...cli import UsageError
from ..data.vtab_tasks import VTAB
from ..options.search import SearchConfig
from ..recipes.recipe import SCRIPTS, Recipe, decompose
from ..recipes.rows import METHODS

ONLY_VTAB = 0.05
"""Lowest rate of VPT's SGD grid, which it adds for VTAB-1k."""

OWN = "given by hand"


@dataclass(frozen=True, slots=True)
class Grid:
    """What is tried."""

    learning_rates: tuple[float, ...]
    """Peaks of the schedule at the recipe's batch size, ascending."""

    weight_decays: tuple[float, ...]
    """Ascending."""

    source: str
    """Who published it."""

    def pairs(self) -> Iterator[tuple[float, float]]:
        """Yield every rate with every decay."""
        yield from product(self.learning_rates, self.weight_decays)


def grid_of(config: SearchConfig, usual: Recipe) -> Grid:
    """Return the grid of a search.

    Args:
        config: may give rates, decays or both.
        usual: the recipe, whose grid is taken where none is given.

    Raises:
        UsageError: nobody has published a grid for the method, and none was given.
    """
    rates, decays, source = published(usual)
    if not rates and config.learning_rates is None:
        raise _unpublished(usual, "--learning-rates")
    if not decays and config.weight_decays is None:
        raise _unpublished(usual, "--weight-decays")
    given = [
        name
        for name, values in (("rates", config.learning_rates), ("decays", config.weight_decays))
        if values is not None
    ]
    if given:
        source = OWN if len(given) == 2 else f"{source}; {given[0]} {OWN}"
    return Grid(
        tuple(sorted(config.learning_rates or rates)),
        tuple(sorted(decays if config.weight_decays is None else config.weight_decays)),
        source,
    )


def published(usual: Recipe) -> tuple[list[float], list[float], str]:
    """Return the rates at the batch size and the decays that a search tries, and their source.

    Both are empty where the method's source publishes no grid.
    """
    row, _ = decompose(usual.method)
    if METHODS[row].training is None:
        rates = {script.learning_rate for script in SCRIPTS.values()}
        decays = {script.weight_decay for script in SCRIPTS.values()}
        told = "values of the official TCPA scripts; no grid is published"
        return sorted(rates), sorted(decays), told
    scale = usual.batch_size / usual.rate_batch if usual.rate_batch else 1.0
    rates = [
        rate * scale
        for rate in usual.learning_rate_grid
        if rate != ONLY_VTAB or usual.dataset in VTAB
    ]
    return rates, list(usual.weight_decay_grid), f"grid of {usual.source}"


def _unpublished(usual: Recipe, option: str) -> UsageError:
    return UsageError(
        f"{option}: got none for {usual.method}, expected values, as its source publishes no grid; "
        f"the recipe has a peak rate of {usual.peak_rate:g} and a decay of {usual.weight_decay:g}"
    )
