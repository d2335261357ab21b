"""What was measured, as one HTML page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cli import UsageError
from ...train.report.page import figure, folded, page, paragraph, table
from ...train.report.tables import TextTable
from ..compare import RowChange, describe, differences, summary
from ..harness.results import Row
from .data import distinct, tables

if TYPE_CHECKING:
    from ...inspect.style import Drawing

OPEN_ROWS = 40
"""Longer tables have to be opened by the reader."""

STATIC_COLUMNS = {
    "name": "kernel",
    "architecture": "architecture",
    "dtype": "dtype",
    "registers": "registers",
    "spill_stores": "spill stores",
    "spill_loads": "spill loads",
    "shared": "shared memory, bytes",
    "programs": "CTAs per SM",
}


def measurements_page(
    rows: Sequence[Row],
    drawings: "Sequence[Drawing]",
    *,
    changes: Sequence[RowChange] = (),
    static: dict[str, Any] | None = None,
) -> str:
    """Return the page."""
    sections = {
        "Figures": "".join(map(figure, drawings)),
        "Measurements": "".join(map(_measured, tables(rows))),
        "Against the baseline": _comparison(changes) if changes else "",
        "Compiled offline": "" if static is None else _static(static),
        "Conditions": table(_conditions(rows)),
    }
    return page("tcpa: measurements", paragraph(_intro(rows)), sections)


def read_static(path: Path, option: str = "--static") -> dict[str, Any]:
    """Read what `tcpa-bench static --json` wrote.

    Raises:
        UsageError: the file cannot be read or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kernels = found["kernels"]
        known = {*STATIC_COLUMNS, "failures", "promised"}
        if not kernels or not all(known <= kernel.keys() for kernel in kernels):
            raise ValueError("no kernels")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{option}: got {path}, expected a file of `tcpa-bench static --json` "
            f"({type(error).__name__}: {error}); write one"
        ) from None
    return found


def _intro(rows: Sequence[Row]) -> str:
    devices = ", ".join(distinct(rows, "device"))
    dates = sorted(row.provenance.date[:10] for row in rows)
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{len(rows)} measured values on {devices}; {span}. Every table names its conditions."


def _measured(shown: TextTable) -> str:
    content = paragraph("".join(shown.notes)) + table(shown)
    summary = f"{shown.title}: {len(shown.rows)} lines"
    return folded(summary, content, is_open=len(shown.rows) <= OPEN_ROWS)


def _comparison(changes: Sequence[RowChange]) -> str:
    differ = differences(changes)
    said = "; ".join(differ) if differ else "same device and versions"
    moved = [describe(change) for change in changes if change.verdict != "same"]
    header = ["verdict", "what", "before", "now", "ratio"]
    text = paragraph(f"{summary(changes)}. Conditions: {said}.")
    shown = TextTable(header=header, rows=moved, text_columns=2)
    return text + table(shown, row_class=lambda row: row[0]) if moved else text


def _static(static: dict[str, Any]) -> str:
    """What the compiler made; no measurement."""
    rows = []
    for kernel in static["kernels"]:
        cells = ["" if kernel[name] is None else str(kernel[name]) for name in STATIC_COLUMNS]
        rows.append([*cells, "; ".join(kernel["failures"])])
    header = [*STATIC_COLUMNS.values(), "remarks"]
    broken = sum(bool(k["promised"] and k["failures"]) for k in static["kernels"])
    versions = f"Triton {static.get('triton', '?')}, torch {static.get('torch', '?')}"
    told = f"{len(rows)} kernels, {broken} broken promises; {versions}."
    shown = TextTable(header=header, rows=rows, text_columns=3)
    return paragraph(told) + folded("All kernels", table(shown))


def _conditions(rows: Sequence[Row]) -> TextTable:
    """Return every provenance once, with the number of its values."""
    counts: dict[Any, int] = {}
    for row in rows:
        counts[row.provenance] = counts.get(row.provenance, 0) + 1
    header = ["device", "driver", "torch", "triton", "timm", "python", "system", "commit", "date",
              "values"]  # fmt: skip
    lines = [
        [made.device, made.driver, made.torch, made.triton, made.timm, made.python, made.system,
         made.commit + " with changes" * made.dirty, made.date, str(count)]
        for made, count in counts.items()
    ]  # fmt: skip
    return TextTable(header=header, rows=lines, text_columns=9)
