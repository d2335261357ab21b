"""`tcpa-train search`: one run for each pair of a grid, and the choice among them."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ...cli import UsageError
from ..engine.folder import LOG
from ..engine.interruption import Interrupted, raised
from ..options.search import SearchConfig
from ..recipes.choices import Choice, choice_path, conditions_of, write_choice
from ..recipes.runspec import resolve
from ..storage import read_json, write_json
from .search_grid import Grid, grid_of
from .sweep import Job, carry_out, devices_of, look_at

DIVERGED = "diverged.json"
"""Beside the choice: trials whose loss was not finite, which no further attempt would change."""

SAID = "the loss is not finite"
"""What a run says then."""

RULE = (
    "highest accuracy on the validation images after the last epoch; of equal ones the lowest "
    "learning rate, then the highest weight decay"
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One pair of the grid."""

    rate: float
    decay: float
    job: Job

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.job.folder.name


def search(config: SearchConfig) -> Choice | None:
    """Carry out all trials that are left, write the choice and return it; None with print_jobs.

    Raises:
        UsageError: trials failed (the others were carried out); nobody has published a grid and
            none was given; an option does not fit; or no trial ended with a finite loss.
        Interrupted: SIGINT, SIGTERM or SIGHUP asked it to end; the trials have saved and ended.
    """
    grid = grid_of(config, resolve(config.trial()))
    trials = [
        Trial(rate, decay, Job(run, resolve(run)))
        for rate, decay in grid.pairs()
        for run in [config.trial(rate, decay)]
    ]
    path = choice_path(config.output, config.dataset, trials[0].job.spec.method)
    diverged = _Diverged(config, trials)
    left, damaged = look_at([trial.job for trial in trials if trial not in diverged])
    if config.print_jobs:
        for job in left:
            print(shlex.join(job.command))
        return None
    devices = devices_of(config)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    finished = len(trials) - len(left) - len(damaged)
    console.print(
        f"{len(trials)} trials, {finished} of them finished; {grid.source}; {len(devices)} at a "
        f"time on {', '.join(map(str, devices))}",
        soft_wrap=True,
    )
    try:
        with raised():
            failed = damaged + carry_out(left, devices, console)
    except Interrupted as ended:
        text = "stopped; the same command goes on with the trials that are not finished"
        raise Interrupted(ended.number, text) from None
    failed = diverged.take(failed)
    accuracies = {t.name: found["accuracy"] for t in trials if (found := _result(t)) is not None}
    console.print(_table(grid, trials, accuracies, diverged))
    if failed:
        first, reason = failed[0]
        raise UsageError(
            f"{len(failed)} of {len(trials)} trials failed, the first of them {first.folder} "
            f"({reason}; see {first.folder / LOG}); run the same command again to go on with them"
        )
    choice = _choose(config, grid, trials, accuracies)
    write_choice(path, choice)
    console.print(
        f"{config.method} on {config.dataset}: learning rate {choice.learning_rate:g}, weight "
        f"decay {choice.weight_decay:g}, {choice.val_accuracy:.2f} % on the validation images; "
        f"{path}; to use it: --choices {config.output}",
        soft_wrap=True,
    )
    return choice


def _result(trial: Trial) -> dict[str, Any] | None:
    try:
        return trial.job.result()
    except UsageError:
        # A damaged one, which is told of as failed.
        return None


class _Diverged:
    """The trials whose loss was not finite, in a file, each with what decided it."""

    def __init__(self, config: SearchConfig, trials: Sequence[Trial]) -> None:
        self._trials = {trial.name: trial for trial in trials}
        method = trials[0].job.spec.method
        self._path = choice_path(config.output, config.dataset, method).with_name(DIVERGED)
        found = read_json(self._path)
        # Trials of other options are tried anew.
        self._known: dict[str, Any] = {
            name: description
            for name, description in (found if isinstance(found, dict) else {}).items()
            if name in self._trials and description == self._description(name)
        }

    def __contains__(self, trial: Trial) -> bool:
        return trial.name in self._known

    def take(self, failed: list[tuple[Job, str]]) -> list[tuple[Job, str]]:
        """Note those that failed for that reason, and return the others."""
        others = []
        for job, reason in failed:
            if SAID in _last_attempt(job):
                self._known[job.folder.name] = self._description(job.folder.name)
            else:
                others.append((job, reason))
        if len(others) < len(failed):
            write_json(self._path, self._known)
        return others

    def _description(self, name: str) -> Any:
        job = self._trials[name].job
        # As it is read from a file: JSON has no tuples.
        return _as_json(job.spec.describe())


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def _last_attempt(job: Job) -> str:
    """Return the end of a log as one line."""
    try:
        text = (job.folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return " ".join(" ".join(text.splitlines()[-3:]).split())


def _choose(
    config: SearchConfig, grid: Grid, trials: Sequence[Trial], accuracies: dict[str, float]
) -> Choice:
    finite = [trial for trial in trials if trial.name in accuracies]
    if not finite:
        raise UsageError(
            f"--learning-rates: got {', '.join(map(str, grid.learning_rates))}, expected one with "
            "which the loss stays finite; give lower ones, or use --precision fp32"
        )
    best = max(finite, key=lambda trial: (accuracies[trial.name], -trial.rate, trial.decay))
    spec = best.job.spec
    return Choice(
        dataset=config.dataset,
        method=spec.method,
        learning_rate=best.rate,
        weight_decay=best.decay,
        val_accuracy=accuracies[best.name],
        seed=spec.seed,
        epochs=spec.epochs,
        grid=grid.source,
        rule=RULE,
        conditions=_as_json(conditions_of(spec.describe())),
        trials=[
            {
                "learning_rate": trial.rate,
                "weight_decay": trial.decay,
                "val_accuracy": accuracies.get(trial.name),
                "folder": trial.name,
            }
            for trial in trials
        ],
    )


def _table(
    grid: Grid, trials: Sequence[Trial], accuracies: dict[str, float], diverged: _Diverged
) -> Table:
    """Return the accuracies, a line for each rate."""
    shown = Table(title="Accuracy on the validation images, %")
    shown.add_column("learning rate")
    for decay in grid.weight_decays:
        shown.add_column(f"decay {decay:g}", justify="right")
    for rate in grid.learning_rates:
        cells = []
        for trial in trials:
            if trial.rate == rate:
                found = accuracies.get(trial.name)
                missing = "not finite" if trial in diverged else "-"
                cells.append(missing if found is None else f"{found:.2f}")
        shown.add_row(f"{rate:g}", *cells)
    return shown
