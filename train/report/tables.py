"""A table of texts, and how it is written: Markdown, CSV, the terminal (HTML: `page.table`)."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

NONE = "-"
"""Cell without a value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """Cells under a heading."""

    title: str = ""
    header: list[str]
    rows: list[list[str]]
    text_columns: int = 1
    """Columns that hold text, from the left; the others hold numbers."""
    notes: tuple[str, ...] = ()


def formatted(value: float | None, how: str) -> str:
    """Return a number as text, or the cell without a value."""
    return NONE if value is None else format(value, how)


def with_spread(mean: float, spread: float | None) -> str:
    """Return a mean and, where there is one, its standard deviation, rounded as the paper does."""
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} \N{PLUS-MINUS SIGN} {spread:.1f}"


def span(counts: Iterable[int]) -> str:
    """Return one number, or the fewest and the most."""
    found = sorted(set(counts))
    return "-".join(map(str, found[:: max(len(found) - 1, 1)]))


def to_markdown(shown: TextTable) -> str:
    """Return a table in Markdown, without title and notes."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [shown.header, *shown.rows]]
    rule = ["---" if i < shown.text_columns else "---:" for i in range(len(shown.header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]]) + "\n"


def to_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return comma-separated values; None is an empty one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def to_grid(shown: TextTable, title: str | None = None) -> "Table":
    """Return a table for the terminal."""
    from rich.table import Table

    grid = Table(title=title)
    for place, name in enumerate(shown.header):
        grid.add_column(name, justify="left" if place < shown.text_columns else "right")
    for row in shown.rows:
        grid.add_row(*(cell or NONE for cell in row))
    return grid
