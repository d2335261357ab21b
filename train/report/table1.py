"""Runs beside the paper's Table 1, how long they took, and what is not counted."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from ..data.vtab_tasks import TASKS
from .groups import COMPLETE, LABELS, SETTING, RunGroup, Setting, average, by_setting
from .paper import AVERAGE, ROWS, published, table1
from .runs import Problem
from .tables import NONE, TextTable, formatted, span, to_csv, with_spread


def details(groups: Sequence[RunGroup], names: dict[Setting, str]) -> list[TextTable]:
    """Return a table a setting: every dataset with the paper's value beside ours.

    The tasks of VTAB-1k are left to `table2.details_vtab`.
    """
    others = _without_vtab(groups)
    return [_detail(found, names[setting]) for setting, found in by_setting(others).items()]


def _without_vtab(groups: Iterable[RunGroup]) -> list[RunGroup]:
    return [group for group in groups if group.label not in TASKS]


def _detail(groups: list[RunGroup], name: str) -> TextTable:
    setting = groups[0].setting
    header = ["dataset", "paper, %", "ours, %", "spread", "runs", "delta"]
    rows = [
        [
            group.label,
            formatted(group.paper, ".1f"),
            formatted(group.mean, ".2f"),
            formatted(group.spread, ".2f"),
            str(len(group.runs)),
            formatted(group.delta, "+.2f"),
        ]
        for group in groups
    ]
    mean, paper = average(groups), published(setting.method, AVERAGE)
    if mean is not None:
        fair = setting.data == COMPLETE and paper is not None
        difference = mean - paper if fair and paper is not None else None
        cells = [formatted(paper, ".1f"), formatted(mean, ".2f"), NONE, NONE]
        rows.append(["average", *cells, formatted(difference, "+.2f")])
    notes = notes_of(groups)
    if setting.data != COMPLETE:
        notes.insert(0, "Not the published images: the paper's values are no yardstick here.")
    return TextTable(title=name, header=header, rows=rows, notes=tuple(notes))


def notes_of(groups: Sequence[RunGroup]) -> list[str]:
    """Return what a reader should know of groups of one setting: remarks, and recipes' notes."""
    remarks: dict[str, list[str]] = {}
    for group in groups:
        for remark in group.remarks:
            remarks.setdefault(remark, []).append(group.label)
    notes = [f"{', '.join(dict.fromkeys(labels))}: {text}." for text, labels in remarks.items()]
    notes += dict.fromkeys(
        f"{run.recipe['note'][0].upper()}{run.recipe['note'][1:]}."
        for group in groups
        for run in group.runs
        if run.recipe["note"]
    )
    return notes


def overview(groups: Sequence[RunGroup], names: dict[Setting, str]) -> TextTable:
    """Return the layout of the paper, rounded as there: a line for each method, ours below it."""
    rows, method = [], ""
    for setting, found in by_setting(_without_vtab(groups)).items():
        if setting.method != method:
            method = setting.method
            if method in ROWS:
                line = [formatted(published(method, label), ".1f") for label in (*LABELS, AVERAGE)]
                rows.append([f"{ROWS[method]}, paper", *line, NONE])
        cells: dict[str, str] = {}
        for group in found:
            # Other images or another version's recipe under one name: both are shown.
            before = f"{cells[group.label]} / " if group.label in cells else ""
            cells[group.label] = before + with_spread(group.mean, group.spread)
        if cells.keys() & set(LABELS):
            line = [cells.get(label, NONE) for label in LABELS]
            runs = span(len(group.runs) for group in found)
            rows.append([names[setting], *line, formatted(average(found), ".1f"), runs])
    header = ["method", *LABELS, "average", "runs"]
    return TextTable(title="Table 1, top-1 accuracy in percent", header=header, rows=rows)


def whole_table1() -> TextTable:
    """Return the published table as it is printed."""
    columns = ("venue_label", *LABELS, AVERAGE)
    rows = [[name, *(row[c] or NONE for c in columns)] for name, row in table1().items()]
    header = ["method", "venue", *LABELS, "average"]
    return TextTable(title="The published table", header=header, rows=rows, text_columns=2)


TIMES = {
    "seconds_per_epoch": ".3g",
    "seconds_per_evaluation": ".3g",
    "images_per_second": ",.0f",
    "pipeline_images_per_second": ",.0f",
}


def times(groups: Sequence[RunGroup], names: dict[Setting, str]) -> TextTable:
    """Return how long an epoch and an evaluation take: medians over runs on one kind of device."""
    rows = []
    for group in groups:
        devices: dict[str, list[dict]] = {}
        for run in group.runs:
            if run.result is not None:
                devices.setdefault(run.devices, []).append(run.result)
        for device, results in devices.items():
            cells = [
                format(statistics.median(result[name] for result in results), how)
                for name, how in TIMES.items()
            ]
            rows.append([names[group.setting], group.label, device, *cells, str(len(results))])
    header = ["setting", "dataset", "device", "training epoch, s", "evaluation, s",
              "training, images/s", "input alone, images/s", "runs"]  # fmt: skip
    return TextTable(title="Time", header=header, rows=rows, text_columns=3)


def settings_table(names: dict[Setting, str]) -> TextTable:
    """Return what each setting is."""
    rows = [[*list(asdict(setting).values())[:-1], setting.changes or "none"] for setting in names]
    return TextTable(title="Settings", header=SETTING, rows=rows, text_columns=len(SETTING))


def problems_table(problems: Sequence[Problem]) -> TextTable:
    """Return the runs that no mean includes."""
    rows = [[str(problem.folder), problem.text] for problem in problems]
    return TextTable(title="Not counted", header=["folder", "why"], rows=rows, text_columns=2)


def table1_csv(groups: Sequence[RunGroup]) -> str:
    """Return every group but those of VTAB-1k as comma-separated values; nothing is rounded."""
    header = ["dataset", *SETTING, "paper_percent", "mean_percent", "spread_points", "runs",
              "difference_points", "seeds", "accuracies_percent", "epochs_chosen",
              "folders"]  # fmt: skip
    rows = []
    for group in _without_vtab(groups):
        seeds, accuracies, folders = group.listed
        epochs = " ".join(str(run.result["epoch"]) for run in group.runs if run.result)
        values = (group.paper, group.mean, group.spread, len(group.runs), group.delta)
        setting = asdict(group.setting).values()
        rows.append([group.label, *setting, *values, seeds, accuracies, epochs, folders])
    return to_csv(header, rows)
