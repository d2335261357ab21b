"""The report as one HTML page and as Markdown: no script, nothing from the network."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from .groups import Group, Setting
from .paper import FAULTS, UNPUBLISHED
from .paper_vtab import NOTES
from .runs import Problem
from .tables import (
    NONE,
    Table,
    details,
    overview,
    problems_table,
    settings_table,
    times,
    to_markdown,
    whole_paper,
)
from .vtab import details_vtab, is_vtab, overview_vtab, whole_table2

if TYPE_CHECKING:
    from .figures import Curves

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1f; --soft: #5c5c66;
  --line: #d9d9e0; --stripe: #f5f5f8; }
@media (prefers-color-scheme: dark) { :root { --paper: #141418; --ink: #e6e6ea; --soft: #a0a0aa;
  --line: #3a3a42; --stripe: #1d1d23; } }
body { background: var(--paper); color: var(--ink); margin: 0 auto; padding: 1rem;
  max-width: 72rem; font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 0.4rem; }
p, li, summary { max-width: 48rem; } .soft, summary { color: var(--soft); }
nav a { margin-right: 1rem; } a { color: inherit; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; flex: 1 1 20rem; max-width: 30rem; }
figure svg { width: 100%; height: auto; font-family: system-ui, sans-serif; }
.wide { overflow-x: auto; margin-bottom: 0.8rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; vertical-align: top; overflow-wrap: normal; }
th:first-child, td:first-child { padding-left: 0.2rem; }
tbody tr:nth-child(even) { background: var(--stripe); }
tr.paper td { color: var(--soft); }
@media (max-width: 30rem) { th, td { padding: 0.25rem 0.35rem; } }
td.long { white-space: normal; min-width: 12rem; }
.n { text-align: right; }
"""

LONG = 28
"""Letters from which on a cell may be broken over lines."""

INTRODUCTION = (
    "Top-1 accuracy on the test images, beside the values that the paper prints. The mean is over "
    "runs that differ in nothing but the seed; the spread is their standard deviation (n - 1), "
    "delta is our mean minus the printed value."
)
PROTOCOLS = (
    "official: the best test epoch, chosen on the test images as in the official code. val: the "
    "epoch chosen on validation images, tested once. last: the last epoch."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """Everything that a report says."""

    groups: Sequence[Group]
    names: dict[Setting, str]
    problems: Sequence[Problem]
    curves: "Sequence[Curves]"

    @property
    def of_table1(self) -> bool:
        """Whether a run is of HTA or of a dataset of the user's own."""
        return not all(map(is_vtab, self.groups))

    @property
    def of_table2(self) -> bool:
        """Whether a run is of VTAB-1k."""
        return any(map(is_vtab, self.groups))

    @property
    def details(self) -> list[Table]:
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


def html_page(content: Content) -> str:
    """Return the page."""
    sections = {
        "Table 1": _table1(content),
        "Table 2": _table2(content),
        "By setting": "".join(map(_titled, content.details)),
        "Time": _times(content),
        "Curves": "".join(map(_curves, content.curves)),
        "Settings": _table(settings_table(content.names)) if content.names else "",
        "Not counted": _table(problems_table(content.problems)) if content.problems else "",
        "The published tables": _notes(),
    }
    shown = {title: text for title, text in sections.items() if text}
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in shown)
    body = "".join(
        f'<h2 id="{_anchor(title)}">{title}</h2>\n{text}\n' for title, text in shown.items()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>tcpa: runs</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<h1>tcpa: runs against the published tables</h1>\n<p>{escape(INTRODUCTION)}</p>\n"
        f'<p class="soft">{escape(content.counted)}; {_today()}.</p>\n<nav>{links}</nav>\n{body}'
        "</body>\n</html>\n"
    )


def markdown(content: Content) -> str:
    """Return the report in Markdown."""
    parts = ["# tcpa: runs against the published tables", INTRODUCTION, PROTOCOLS]
    parts += [f"{content.counted}; {_today()}."]
    if content.groups:
        if content.of_table1:
            parts += ["## Table 1", to_markdown(overview(content.groups, content.names))]
        if content.of_table2:
            shown = overview_vtab(content.groups, content.names)
            parts += ["## Table 2", to_markdown(shown), _list((*shown.notes, *NOTES))]
        parts += ["## By setting"]
        for shown in content.details:
            parts += [f"### {shown.title}", to_markdown(shown), _list(shown.notes)]
        parts += ["## Time", to_markdown(times(content.groups, content.names))]
        parts += ["## Settings", to_markdown(settings_table(content.names))]
    if content.problems:
        parts += ["## Not counted", to_markdown(problems_table(content.problems))]
    parts += ["## The published tables", to_markdown(whole_paper()), _list(FAULTS)]
    parts += [to_markdown(whole_table2())]
    parts += ["What our setting took from elsewhere:", _list(UNPUBLISHED)]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _table1(content: Content) -> str:
    if not content.groups:
        return "<p>No run is finished.</p>"
    if not content.of_table1:
        return ""
    text = _table(overview(content.groups, content.names))
    return f'{text}<p class="soft">{escape(PROTOCOLS)} Runs: for each dataset.</p>'


def _table2(content: Content) -> str:
    if not content.of_table2:
        return ""
    shown = overview_vtab(content.groups, content.names)
    return f"{_table(shown)}{_items((*shown.notes, *NOTES))}"


def _titled(shown: Table) -> str:
    return f"<h3>{escape(shown.title)}</h3>\n{_table(shown)}{_items(shown.notes)}"


def _times(content: Content) -> str:
    if not content.groups:
        return ""
    return _table(times(content.groups, content.names)) + (
        '<p class="soft">Medians over the epochs of a run, then over the runs on one kind of '
        "device. A training epoch has no evaluation in it.</p>"
    )


def _curves(curves: "Curves") -> str:
    figures = "".join(f"<figure>{svg}</figure>" for svg in curves.svgs)
    return f'<h3>{escape(curves.label)}</h3>\n<div class="figures">{figures}</div>\n'


def _notes() -> str:
    return (
        f"{_items(FAULTS)}<h3>What our setting took from elsewhere</h3>{_items(UNPUBLISHED)}"
        "<details><summary>All rows, as printed (percent)</summary>"
        f"{_table(whole_paper())}{_table(whole_table2())}</details>"
    )


def _items(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>\n" if items else ""


def _table(shown: Table) -> str:
    head = "".join(_tag("th", cell, i, shown) for i, cell in enumerate(shown.header))
    lines = "\n".join(
        f"<tr{_row_class(row)}>{''.join(_tag('td', c, i, shown) for i, c in enumerate(row))}</tr>"
        for row in shown.rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n'
        "</tbody></table></div>\n"
    )


def _row_class(row: list[str]) -> str:
    return ' class="paper"' if row[0].endswith(", paper") else ""


def _tag(tag: str, cell: str, column: int, shown: Table) -> str:
    if column >= shown.text_columns:
        kind = ' class="n"'
    else:
        kind = ' class="long"' if len(cell) > LONG else ""
    return f"<{tag}{kind}>{escape(cell) or NONE}</{tag}>"
