"""Many runs: every method on every dataset with every seed; finished ones are skipped."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

import tcpa

from ...cli import UsageError
from ..data.splits import NAMES, OFFICIAL_SEED
from ..data.vtab_tasks import ALL_TASKS, GROUPS, SEEDS, TASKS
from ..engine.interruption import raise_on_signal
from ..engine.rundir import LOG
from ..options.checks import require_known
from ..options.run import SweepConfig
from ..recipes.recipe import PUBLISHED_METHOD, decompose, require_row
from ..recipes.rows import METHODS
from ..recipes.runspec import resolve
from ..report.command import print_runs
from ..report.paper import ROWS, table1, table2
from ..report.runs import read_runs
from .scheduler import Job, carry_out, count_runs, devices_of, look_at

SETS: dict[str, Sequence[str]] = {
    "hta": tcpa.HTA_DATASETS,
    ALL_TASKS: tuple(TASKS),
    **{f"vtab-{group}": tasks for group, tasks in GROUPS.items()},
}
"""Name -> datasets."""

TABLES = ("table1", "table2")
"""Names that stand for all datasets and all methods of a published table."""

KNOWN = ("hta", *NAMES, *(name for name in SETS if name != "hta"), *TABLES)


def plan(
    names: Iterable[str], methods: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[tuple[str, str, int]]:
    """Return the runs of a sweep: dataset by dataset, method by method, seed by seed.

    Args:
        names: datasets, or names that stand for several, see `KNOWN`.
        methods: None: the rows of the tables among the names, else VFPT+TCPA.
        seeds: None: those of the protocol, VPT's five on VTAB-1k and the official one elsewhere.

    Returns:
        Dataset, method and seed of each run.

    Raises:
        UsageError: a name is unknown.
    """
    chosen: dict[str, list[str]] = {}
    for name in names:
        require_known("DATASETS", name, KNOWN)
        datasets, usual = _meaning(name)
        for dataset in datasets:
            known = chosen.setdefault(dataset, [])
            known += [m for m in (usual if methods is None else methods) if m not in known]
    return [
        (dataset, method, seed)
        for dataset, of_dataset in chosen.items()
        for method in of_dataset
        for seed in (_seeds(dataset) if seeds is None else seeds)
    ]


def _meaning(name: str) -> tuple[Sequence[str], Sequence[str]]:
    """Return datasets and methods of a name."""
    if name == "table1":
        return tcpa.HTA_DATASETS, _rows(table1())
    if name == "table2":
        return tuple(TASKS), _rows(table2())
    return SETS.get(name, (name,)), (PUBLISHED_METHOD,)


def _rows(published: Iterable[str]) -> list[str]:
    """Return our methods that have a row in a table, in the order of the recipes."""
    there = set(published)
    return [method for method in METHODS if ROWS.get(method) in there]


def _seeds(dataset: str) -> Sequence[int]:
    return SEEDS if dataset in TASKS else (OFFICIAL_SEED,)


def jobs_of(config: SweepConfig) -> list[Job]:
    """Return the runs of a sweep: dataset by dataset, method by method, seed by seed.

    Raises:
        UsageError: a dataset or method is unknown, or an option does not fit one.
    """
    for method in config.methods or ():
        require_row(decompose(method)[0], "--methods")
    configs = [
        config.run_of(dataset=dataset, method=method, seed=seed)
        for dataset, method, seed in plan(config.datasets, config.methods, config.seeds)
    ]
    return [Job(run, resolve(run)) for run in configs]


def sweep(config: SweepConfig) -> list[dict[str, Any]]:
    """Carry out all runs that are not finished and print a table; return the results.

    Raises:
        UsageError: a run failed (the others were carried out), or an option cannot be met.
        Interrupted: SIGINT, SIGTERM or SIGHUP asked it to end; the runs have saved and ended.
    """
    jobs = jobs_of(config)
    if config.print_jobs:
        for job in jobs:
            print(shlex.join(job.command))
        return []
    devices = devices_of(config)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    left, damaged = look_at(jobs)
    finished = len(jobs) - len(left) - len(damaged)
    console.print(
        f"{count_runs(len(jobs))}, {finished} of them finished; "
        f"{len(devices)} at a time on {', '.join(devices)}"
    )
    with raise_on_signal("stopped; the same command resumes the runs that are not finished"):
        failed = carry_out(left, devices, console)
    failed = sorted(damaged + failed, key=lambda item: jobs.index(item[0]))
    done = [job.folder for job in jobs if job.folder.exists()]
    if done:
        print_runs(*read_runs(done), console)
    if failed:
        first, reason = failed[0]
        if (first, reason) not in damaged:
            reason = f"{first.folder} ({reason}; see {first.folder / LOG})"
        raise UsageError(
            f"{len(failed)} of {count_runs(len(jobs))} failed, the first of them: {reason}; run "
            "the same command again to resume"
        )
    return [found for job in jobs if (found := job.result()) is not None]
