"""VTAB-1k in a report: values of tasks, and means of groups that have all their tasks."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from ..data.vtab_tasks import GROUPS, TASKS, GroupName
from .groups import SETTING, RunGroup, Setting, by_setting
from .paper import ROWS, published_mean, table2, vpt_value
from .table1 import notes_of
from .tables import NONE, TextTable, formatted, span, to_csv, with_spread


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMean:
    """One group of tasks under one setting."""

    name: GroupName
    method: str
    tasks: tuple[RunGroup, ...]
    """Those with runs, in the order of the benchmark."""

    @property
    def missing(self) -> list[str]:
        """Titles of the tasks without a run."""
        there = {task.label for task in self.tasks}
        return [TASKS[name].title for name in GROUPS[self.name] if name not in there]

    @property
    def twice(self) -> list[str]:
        """Titles of the tasks with results that share no mean, of other images for instance."""
        labels = [task.label for task in self.tasks]
        return [TASKS[n].title for n in dict.fromkeys(labels) if labels.count(n) > 1]

    @property
    def mean(self) -> float | None:
        """Mean of the tasks' accuracies, percent; None unless each task is there just once."""
        if self.missing or self.twice:
            return None
        return statistics.fmean(task.mean for task in self.tasks)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the mean over seeds (n - 1), points; None unless all tasks have the
        same seeds, two or more."""
        by_seed = [
            {run.seed: run.result["accuracy"] for run in task.runs if run.result}
            for task in self.tasks
        ]
        seeds = by_seed[0].keys() if by_seed else set()
        if self.mean is None or len(seeds) < 2 or any(d.keys() != seeds for d in by_seed):
            return None
        return statistics.stdev(statistics.fmean(d[seed] for d in by_seed) for seed in seeds)

    @property
    def paper(self) -> float | None:
        """Published mean, percent."""
        return published_mean(self.method, self.name)

    @property
    def delta(self) -> float | None:
        """Our mean minus the published one, points; None where images are others."""
        if self.mean is None or self.paper is None or not all(t.comparable for t in self.tasks):
            return None
        return self.mean - self.paper

    @property
    def runs(self) -> str:
        """How many runs a task has; from fewest to most."""
        return span(len(task.runs) for task in self.tasks)


def is_vtab(group: RunGroup) -> bool:
    """Tell whether a group of runs is of a task of VTAB-1k."""
    return group.label in TASKS


def means_of(groups: Sequence[RunGroup]) -> list[GroupMean]:
    """Return the groups of tasks of one setting that have any run."""
    found = []
    for name, tasks in GROUPS.items():
        there = tuple(group for group in groups if group.label in tasks)
        if there:
            found.append(GroupMean(name=name, method=there[0].setting.method, tasks=there))
    return found


def overview_vtab(groups: Sequence[RunGroup], names: dict[Setting, str]) -> TextTable:
    """Return the layout of Table 2: a line for each method, ours below it with differences."""
    rows, notes, method = [], [], ""
    for setting, found in by_setting(filter(is_vtab, groups)).items():
        if setting.method != method:
            method = setting.method
            if method in ROWS and ROWS[method] in table2():
                line = [formatted(published_mean(method, name), ".1f") for name in GROUPS]
                rows.append([f"{ROWS[method]}, paper", *line, *(NONE for _ in GROUPS), NONE])
        means = {mean.name: mean for mean in means_of(found)}
        cells = [_cell(means.get(name), name) for name in GROUPS]
        deltas = [formatted(means[n].delta if n in means else None, "+.1f") for n in GROUPS]
        runs = span(len(group.runs) for group in found)
        rows.append([names[setting], *cells, *deltas, runs])
        notes += [f"{names[setting]}: {text}" for text in _gaps(means.values())]
    header = ["method", *GROUPS, *(f"delta {name}" for name in GROUPS), "runs"]
    title = "Table 2, VTAB-1k, means of top-1 accuracies in percent"
    return TextTable(title=title, header=header, rows=rows, notes=tuple(notes))


def _cell(mean: GroupMean | None, name: GroupName) -> str:
    count = len(GROUPS[name])
    if mean is None:
        return f"0 of {count} tasks"
    if mean.mean is None:
        return f"{count - len(mean.missing)} of {count} tasks"
    return with_spread(mean.mean, mean.spread)


def _gaps(means: Iterable[GroupMean]) -> list[str]:
    """Say why a group that was begun has no mean or no delta."""
    told = []
    for mean in means:
        if mean.missing:
            told.append(f"no mean of {mean.name}, as {', '.join(mean.missing)} are missing.")
        elif mean.twice:
            text = "have several results that share no mean"
            told.append(f"no mean of {mean.name}, as {', '.join(mean.twice)} {text}.")
        elif mean.delta is None and mean.paper is not None:
            told.append(f"no delta of {mean.name}, as not all images are the published originals.")
    return told


def details_vtab(groups: Sequence[RunGroup], names: dict[Setting, str]) -> list[TextTable]:
    """Return a table a setting: every task, and the means of the groups beside the paper's."""
    found = by_setting(filter(is_vtab, groups))
    return [_detail(tasks, names[setting]) for setting, tasks in found.items()]


def _detail(groups: Sequence[RunGroup], name: str) -> TextTable:
    rows = []
    for mean in means_of(groups):
        for task in mean.tasks:
            cells = [
                formatted(vpt_value(mean.method, task.label), ".1f"),
                formatted(task.mean, ".2f"),
                formatted(task.spread, ".2f"),
                str(len(task.runs)),
                NONE,
            ]
            rows.append([TASKS[task.label].title, task.source, *cells])
        values = (mean.paper, mean.mean, mean.spread)
        cells = [formatted(v, how) for v, how in zip(values, (".1f", ".2f", ".2f"), strict=True)]
        rows.append([f"{mean.name}, mean", "", *cells, mean.runs, formatted(mean.delta, "+.2f")])
    header = ["task", "images", "reference, %", "ours, %", "spread", "runs", "delta"]
    notes = [*_gaps(means_of(groups)), *notes_of(groups)]
    return TextTable(
        title=f"{name}, VTAB-1k", header=header, rows=rows, text_columns=2, notes=tuple(notes)
    )


def whole_table2() -> TextTable:
    """Return the published Table 2 as it is printed."""
    rows = [[name, *(row[group] for group in GROUPS)] for name, row in table2().items()]
    return TextTable(title="The published Table 2", header=["method", *GROUPS], rows=rows)


def table2_csv(groups: Sequence[RunGroup]) -> str:
    """Return the group means as comma-separated values; nothing is rounded."""
    header = ["group", *SETTING, "paper_percent", "mean_percent", "spread_points",
              "difference_points", "tasks", "missing", "runs", "seeds"]  # fmt: skip
    rows = []
    for setting, found in by_setting(filter(is_vtab, groups)).items():
        for mean in means_of(found):
            values = (mean.paper, mean.mean, mean.spread, mean.delta, len(mean.tasks))
            seeds = " ".join(map(str, sorted({r.seed for task in mean.tasks for r in task.runs})))
            told = ("; ".join(mean.missing), mean.runs, seeds)
            rows.append([mean.name, *asdict(setting).values(), *values, *told])
    return to_csv(header, rows)


def tasks_csv(groups: Sequence[RunGroup]) -> str:
    """Return the tasks as comma-separated values; nothing is rounded."""
    header = ["task", "group", "images", *SETTING, "vpt_percent", "mean_percent", "spread_points",
              "runs", "seeds", "accuracies_percent", "folders"]  # fmt: skip
    rows = []
    for group in filter(is_vtab, groups):
        setting, task = group.setting, TASKS[group.label]
        values = (vpt_value(setting.method, group.label), group.mean, group.spread)
        named = (group.label, task.group, group.source, *asdict(setting).values())
        rows.append([*named, *values, len(group.runs), *group.listed])
    return to_csv(header, rows)
