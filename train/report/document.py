"""What a report of runs says: as one HTML page and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

from tcpa import provenance

from .groups import RunGroup, Setting
from .page import bullets, folded, page, paragraph, table
from .paper import FAULTS, UNPUBLISHED, VTAB_NOTES
from .runs import Problem
from .table1 import details, overview, problems_table, settings_table, times, whole_table1
from .table2 import details_vtab, is_vtab, overview_vtab, whole_table2
from .tables import TextTable, to_markdown

if TYPE_CHECKING:
    from .curves import Curves

TITLE = "tcpa: runs against the published tables"
INTRODUCTION = (
    "Top-1 accuracy on the test images, beside the values that the paper prints. The mean is over "
    "runs that differ in nothing but the seed; the spread is their standard deviation (n - 1), "
    "delta is our mean minus the printed value."
)
PROTOCOLS = (
    "official: the best test epoch, chosen on the test images as in the official code. val: the "
    "epoch chosen on validation images, tested once. last: the last epoch."
)
TIMES = (
    "Medians over the epochs of a run, then over the runs on one kind of device. A training epoch "
    "has no evaluation in it."
)


@dataclass(frozen=True, kw_only=True)
class RunsReport:
    """Everything that a report says."""

    groups: Sequence[RunGroup]
    names: dict[Setting, str]
    problems: Sequence[Problem]
    curves: "Sequence[Curves]" = ()

    @cached_property
    def overviews(self) -> dict[str, TextTable]:
        """Tables in the paper's layout; those without a run are left out."""
        found = {}
        if not all(map(is_vtab, self.groups)):
            found["Table 1"] = overview(self.groups, self.names)
        if any(map(is_vtab, self.groups)):
            found["Table 2"] = overview_vtab(self.groups, self.names)
        return found

    @property
    def details(self) -> list[TextTable]:
        """A table a setting, those of VTAB-1k last."""
        return [*details(self.groups, self.names), *details_vtab(self.groups, self.names)]

    @property
    def counted(self) -> str:
        """How many runs are in the means and how many are not."""
        runs = sum(len(group.runs) for group in self.groups)
        left = f", {_runs(len(self.problems))} not counted (listed below)" if self.problems else ""
        return f"{_runs(runs)} counted{left}"


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def html_page(report: RunsReport) -> str:
    """Return the page."""
    tables = {
        "Table 1": paragraph(f"{PROTOCOLS} Runs: for each dataset.", soft=True),
        "Table 2": bullets(VTAB_NOTES),
    }
    sections = {
        title: _table(shown) + bullets(shown.notes) + tables[title]
        for title, shown in report.overviews.items()
    } or {"Table 1": paragraph("No run is finished.")}
    sections["By setting"] = "".join(
        f"{_heading(shown.title)}{_table(shown)}{bullets(shown.notes)}" for shown in report.details
    )
    if report.groups:
        shown = times(report.groups, report.names)
        sections["Time"] = _table(shown) + paragraph(TIMES, soft=True)
    sections["Curves"] = "".join(map(_curves, report.curves))
    if report.names:
        sections["Settings"] = _table(settings_table(report.names))
    if report.problems:
        sections["Not counted"] = _table(problems_table(report.problems))
    published = _table(whole_table1()) + _table(whole_table2())
    sections["The published tables"] = (
        bullets(FAULTS)
        + _heading("What our setting took from elsewhere")
        + bullets(UNPUBLISHED)
        + folded("All rows, as printed (percent)", published)
    )
    intro = paragraph(INTRODUCTION) + paragraph(_counted_today(report), soft=True)
    return page(TITLE, intro, sections)


def markdown(report: RunsReport) -> str:
    """Return the report in Markdown."""
    parts = [f"# {TITLE}", INTRODUCTION, PROTOCOLS, _counted_today(report)]
    for title, shown in report.overviews.items():
        notes = (*shown.notes, *VTAB_NOTES) if title == "Table 2" else ()
        parts += [f"## {title}", to_markdown(shown), _list(notes)]
    if report.groups:
        parts += ["## By setting"]
        for shown in report.details:
            parts += [f"### {shown.title}", to_markdown(shown), _list(shown.notes)]
        parts += ["## Time", to_markdown(times(report.groups, report.names))]
        parts += ["## Settings", to_markdown(settings_table(report.names))]
    if report.problems:
        parts += ["## Not counted", to_markdown(problems_table(report.problems))]
    parts += ["## The published tables", to_markdown(whole_table1()), _list(FAULTS)]
    parts += [to_markdown(whole_table2())]
    parts += ["What our setting took from elsewhere:", _list(UNPUBLISHED)]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _counted_today(report: RunsReport) -> str:
    return f"{report.counted}; {provenance.now()[:10]}."


def _heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>\n"


def _table(shown: TextTable) -> str:
    return table(shown, row_class=lambda row: "paper" if row[0].endswith(", paper") else "")


def _curves(curves: "Curves") -> str:
    figures = "".join(f"<figure>{svg}</figure>" for svg in curves.svgs)
    return f'{_heading(curves.label)}<div class="figures">{figures}</div>\n'
