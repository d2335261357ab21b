"""One self-contained HTML page: no script, nothing from the network, light and dark."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cli import UsageError
from ..compare import Change, describe, differences, summary
from ..harness.results import Row
from .data import Table, grouped, tables

if TYPE_CHECKING:
    from .style import Drawing

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1f; --soft: #5c5c66;
  --line: #d9d9e0; --stripe: #f5f5f8; --worse: #b3261e; --better: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --paper: #141418; --ink: #e6e6ea; --soft: #a0a0aa;
  --line: #3a3a42; --stripe: #1d1d23; --worse: #ff8a80; --better: #6fdd8b; } }
body { background: var(--paper); color: var(--ink); margin: 0 auto; padding: 1.5rem;
  max-width: 72rem; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, figcaption, summary { color: var(--soft); }
nav a { margin-right: 1rem; } a { color: inherit; }
figure { margin: 1.6rem 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; font-family: system-ui, sans-serif; }
.wide { overflow-x: auto; } details { margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th { position: sticky; top: 0; background: var(--paper); }
tbody tr:nth-child(even) { background: var(--stripe); }
.n { text-align: right; }
.worse { color: var(--worse); } .better { color: var(--better); }
"""

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
    "programs": "programs per SM",
}


def page(
    rows: Sequence[Row],
    drawings: "Sequence[Drawing]",
    *,
    changes: Sequence[Change] = (),
    static: dict[str, Any] | None = None,
) -> str:
    """Return the page."""
    sections = {"Figures": _figures(drawings), "Measurements": _measurements(rows)}
    if changes:
        sections["Against the baseline"] = _comparison(changes)
    if static is not None:
        sections["Compiled offline"] = _static(static)
    sections["Conditions"] = _table(_conditions(rows))
    shown = {title: text for title, text in sections.items() if text}
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in shown)
    body = "".join(
        f'<h2 id="{_anchor(title)}">{title}</h2>\n{text}\n' for title, text in shown.items()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>tcpa: measurements</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<h1>tcpa: measurements</h1>\n<p>{_intro(rows)}</p>\n<nav>{links}</nav>\n{body}"
        "</body>\n</html>\n"
    )


def read_static(path: Path, option: str = "--static") -> dict[str, Any]:
    """Read what `tcpa-bench static --json` wrote.

    Raises:
        UsageError: the file cannot be read or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kernels = found["kernels"]
        known = {*STATIC_COLUMNS, "failures", "pipes_us", "promised"}
        if not kernels or not all(known <= kernel.keys() for kernel in kernels):
            raise ValueError("no kernels")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{option}: got {path}, expected a file of `tcpa-bench static --json` "
            f"({type(error).__name__}: {error}); write one"
        ) from None
    return found


def _intro(rows: Sequence[Row]) -> str:
    devices = ", ".join(escape(device) for (device,) in grouped(rows, "device"))
    dates = sorted(row.provenance.date[:10] for row in rows)
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{len(rows)} measured values on {devices}; {span}. Every table names its conditions."


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _figures(drawings: "Iterable[Drawing]") -> str:
    return "\n".join(
        f"<figure>{drawing.svg}<figcaption>{escape(drawing.caption)}</figcaption></figure>"
        for drawing in drawings
    )


def _measurements(rows: Sequence[Row]) -> str:
    return "\n".join(
        f"<details{' open' * (len(shown.rows) <= OPEN_ROWS)}>"
        f"<summary>{escape(shown.title)}: {len(shown.rows)} lines</summary>\n"
        f"<p>{escape(shown.conditions)}.</p>\n{_table(shown)}</details>"
        for shown in tables(rows)
    )


def _comparison(changes: Sequence[Change]) -> str:
    differ = differences(changes)
    said = "; ".join(differ) if differ else "same device and versions"
    moved = [describe(change) for change in changes if change.verdict != "same"]
    header = ["verdict", "what", "before", "now", "ratio"]
    text = f"<p>{escape(summary(changes))}. Conditions: {escape(said)}.</p>\n"
    return text + _table(Table("", "", header, moved, 2)) if moved else text


def _static(static: dict[str, Any]) -> str:
    """Lower bounds of what the compiler made; no measurement."""
    rows = []
    for kernel in static["kernels"]:
        pipes = kernel["pipes_us"]
        pipe = max(pipes, key=pipes.__getitem__, default="")
        cells = ["" if kernel[name] is None else str(kernel[name]) for name in STATIC_COLUMNS]
        rows.append([*cells, f"{pipes[pipe]:.1f}" if pipe else "", pipe,
                     "; ".join(kernel["failures"])])  # fmt: skip
    header = [*STATIC_COLUMNS.values(), "at least, us", "pipe", "remarks"]
    broken = sum(bool(k["promised"] and k["failures"]) for k in static["kernels"])
    versions = f"Triton {static.get('triton', '?')}, torch {static.get('torch', '?')}"
    return (
        f"<p>{len(rows)} kernels, {broken} broken promises; {escape(versions)}. Times are lower "
        "bounds from the machine code, not measurements.</p>\n<details><summary>All kernels"
        f"</summary>\n{_table(Table('', '', header, rows, 3))}</details>"
    )


def _conditions(rows: Sequence[Row]) -> Table:
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
    return Table("", "", header, lines, 9)


def _table(shown: Table) -> str:
    def cells(values: list[str], tag: str) -> str:
        return "".join(
            f"<{tag}{_class(value, i >= shown.text_columns)}>{escape(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    lines = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in shown.rows)
    head = f"<thead><tr>{cells(shown.header, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{head}\n<tbody>\n{lines}\n</tbody></table></div>\n'


def _class(value: str, is_number: bool) -> str:
    name = "n" if is_number else value if value in ("worse", "better") else ""
    return f' class="{name}"' if name else ""
