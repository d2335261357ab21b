"""`tcpa-train search`: one run for each pair of a grid, and the choice among them."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from ...cli import UsageError
from ..data.vtab_tasks import VTAB
from ..engine.interruption import raise_on_signal
from ..engine.rundir import LOG
from ..options.search import SearchConfig
from ..recipes.choices import Choice, choice_path, conditions_of, write_choice
from ..recipes.recipe import SCRIPTS, Recipe, decompose
from ..recipes.rows import METHODS
from ..recipes.runspec import resolve
from ..report.tables import TextTable, formatted, to_grid
from ..storage import read_json, write_json
from .scheduler import Job, carry_out, devices_of, look_at

ONLY_VTAB = 0.05
"""Lowest rate of VPT's SGD grid, which it adds for VTAB-1k."""

OWN = "given by hand"


@dataclass(frozen=True, slots=True)
class SearchGrid:
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


def grid_of(config: SearchConfig, usual: Recipe) -> SearchGrid:
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
    asked = {"rates": config.learning_rates, "decays": config.weight_decays}
    given = [name for name, values in asked.items() if values is not None]
    if given:
        source = OWN if len(given) == 2 else f"{source}; {given[0]} {OWN}"
    return SearchGrid(
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


DIVERGED = "diverged.json"
"""Beside the choice: trials whose loss was not finite, which no further attempt would change."""

SAID = "the loss is not finite"
"""What a run says then."""

RULE = (
    "highest accuracy on the validation images after the last epoch; of equal ones the lowest "
    "learning rate, then the highest weight decay"
)


def search(config: SearchConfig) -> Choice | None:
    """Carry out all trials that are left, write the choice and return it; None with print_jobs.

    Raises:
        UsageError: trials failed (the others were carried out); nobody has published a grid and
            none was given; an option does not fit; or no trial ended with a finite loss.
        Interrupted: SIGINT, SIGTERM or SIGHUP asked it to end; the trials have saved and ended.
    """
    grid = grid_of(config, resolve(config.trial()))
    runs = [config.trial(rate, decay) for rate, decay in grid.pairs()]
    trials = [Job(run, resolve(run)) for run in runs]
    path = choice_path(config.output, config.dataset, trials[0].spec.method)
    diverged = _Diverged(path.with_name(DIVERGED), trials)
    left, damaged = look_at([trial for trial in trials if trial not in diverged])
    if config.print_jobs:
        for job in left:
            print(shlex.join(job.command))
        return None
    devices = devices_of(config)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    finished = len(trials) - len(left) - len(damaged)
    console.print(
        f"{len(trials)} trials, {finished} of them finished; {grid.source}; {len(devices)} at a "
        f"time on {', '.join(devices)}",
        soft_wrap=True,
    )
    with raise_on_signal("stopped; the same command resumes the trials that are not finished"):
        failed = damaged + carry_out(left, devices, console)
    failed = diverged.take(failed)
    accuracies = {trial: _accuracy(trial) for trial in trials}
    shown = _table(grid, accuracies, diverged)
    console.print(to_grid(shown, shown.title))
    if failed:
        first, reason = failed[0]
        raise UsageError(
            f"{len(failed)} of {len(trials)} trials failed, the first of them {first.folder} "
            f"({reason}; see {first.folder / LOG}); run the same command again to resume them"
        )
    choice = _choose(grid, accuracies)
    write_choice(path, choice)
    console.print(
        f"{config.method} on {config.dataset}: learning rate {choice.learning_rate:g}, weight "
        f"decay {choice.weight_decay:g}, {choice.val_accuracy:.2f} % on the validation images; "
        f"{path}; to use it: --choices {config.output}",
        soft_wrap=True,
    )
    return choice


def _accuracy(trial: Job) -> float | None:
    try:
        found = trial.result()
    except UsageError:
        # A damaged one, which is told of as failed.
        found = None
    return None if found is None else found["accuracy"]


class _Diverged:
    """The trials whose loss was not finite, in a file, each with what decided it."""

    def __init__(self, path: Path, trials: Sequence[Job]) -> None:
        self._path, self._known = path, dict[str, Any]()
        found = read_json(path)
        for trial in trials if isinstance(found, dict) else ():
            # Trials of other options restart.
            if found.get(trial.folder.name) == _description(trial):
                self._known[trial.folder.name] = found[trial.folder.name]

    def __contains__(self, trial: Job) -> bool:
        return trial.folder.name in self._known

    def take(self, failed: list[tuple[Job, str]]) -> list[tuple[Job, str]]:
        """Note those that failed for that reason, and return the others."""
        others = []
        for job, reason in failed:
            if SAID in _last_attempt(job):
                self._known[job.folder.name] = _description(job)
            else:
                others.append((job, reason))
        if len(others) < len(failed):
            write_json(self._path, self._known)
        return others


def _description(job: Job) -> dict[str, Any]:
    """Return what decides a run as it is read from a file: JSON has no tuples."""
    return json.loads(json.dumps(job.spec.describe()))


def _last_attempt(job: Job) -> str:
    """Return the end of a log as one line."""
    try:
        text = (job.folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return " ".join(" ".join(text.splitlines()[-3:]).split())


def _choose(grid: SearchGrid, accuracies: dict[Job, float | None]) -> Choice:
    finite = {trial: found for trial, found in accuracies.items() if found is not None}
    if not finite:
        raise UsageError(
            f"--learning-rates: got {', '.join(map(str, grid.learning_rates))}, expected one with "
            "which the loss stays finite; give lower ones, or use --precision fp32"
        )
    best = max(finite, key=lambda t: (finite[t], -t.spec.learning_rate, t.spec.weight_decay))
    spec = best.spec
    return Choice(
        dataset=spec.dataset,
        method=spec.method,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        val_accuracy=finite[best],
        seed=spec.seed,
        epochs=spec.epochs,
        grid=grid.source,
        rule=RULE,
        conditions=conditions_of(_description(best)),
        trials=[
            {
                "learning_rate": trial.spec.learning_rate,
                "weight_decay": trial.spec.weight_decay,
                "val_accuracy": accuracy,
                "folder": trial.folder.name,
            }
            for trial, accuracy in accuracies.items()
        ],
    )


def _table(grid: SearchGrid, accuracies: dict[Job, float | None], diverged: _Diverged) -> TextTable:
    """Return the accuracies, a line for each rate."""
    lines: dict[float, list[str]] = {rate: [f"{rate:g}"] for rate in grid.learning_rates}
    for trial, accuracy in accuracies.items():
        shown = "not finite" if trial in diverged else formatted(accuracy, ".2f")
        lines[trial.spec.learning_rate].append(shown)
    return TextTable(
        title="Accuracy on the validation images, %",
        header=["learning rate", *(f"decay {decay:g}" for decay in grid.weight_decays)],
        rows=list(lines.values()),
    )
