"""What the names of a sweep stand for: datasets, and with tables their methods and seeds."""

import difflib
from collections.abc import Iterable, Sequence

import tcpa

from ...cli import require
from ..data.splits import NAMES, OFFICIAL_SEED
from ..data.vtab_tasks import ALL_TASKS, GROUPS, SEEDS, TASKS
from ..recipes.recipe import PUBLISHED_METHOD
from ..recipes.rows import METHODS
from ..report.paper import ROWS, table1, table2

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
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {near[0]}?" if near else "choose one of these"
        require(name in KNOWN, "DATASETS", repr(name), ", ".join(KNOWN), hint)
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
    """Return our methods that have a row in a table, in the order of the registry."""
    there = set(published)
    return [method for method in METHODS if ROWS.get(method) in there]


def _seeds(dataset: str) -> Sequence[int]:
    return SEEDS if dataset in TASKS else (OFFICIAL_SEED,)
