"""Rows of results for readers: the latest of each, tables of them, and numbers as text.

A table has one line per provider, size and mode and one column per metric; whatever is the same
everywhere moves into its conditions.
"""

from collections.abc import Iterable, Sequence

from ...train.report.tables import TextTable
from ..harness.results import Provenance, Row, number

FLOOR_MARKS = ("no gate", "ungated", "other function", "floor")
"""Words in the name of a provider that computes less than the operation."""

KIND = "time of "
"""Begins the metrics that split a step by kind of kernel."""

LINES = ("device", "operation", "shape", "mode", "dtype", "provider")
COLUMNS = ("metric", "unit")


def is_floor(provider: str) -> bool:
    """Tell whether a provider computes another function, as a floor for the operation."""
    return any(mark in provider for mark in FLOOR_MARKS)


def field_of(row: Row, name: str) -> str:
    """Return a field of a row, or its device."""
    return row.provenance.device if name == "device" else getattr(row, name)


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return the last row of each kind and device, in the order in which the kinds first came."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        found[(row.provenance.device, *row.key)] = row
    return list(found.values())


def distinct(rows: Iterable[Row], name: str) -> list[str]:
    """Return the values of a field in the order of appearance."""
    return list(dict.fromkeys(field_of(row, name) for row in rows))


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """Return rows by the values of these fields."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(field_of(row, name) for name in names), []).append(row)
    return groups


def quantiles(row: Row) -> str:
    """Return the median and, where there are several samples, p20 to p80."""
    if row.samples < 2:
        return number(row.p50)
    return f"{number(row.p50)} ({number(row.p20)}-{number(row.p80)})"


def tables(rows: Sequence[Row]) -> list[TextTable]:
    """Return the tables of every device and command: metrics, and the kernel-time breakdown."""
    found = []
    for (device, command), group in grouped(rows, "device", "command").items():
        kinds = [row for row in group if row.metric.startswith(KIND)]
        others = [row for row in group if not row.metric.startswith(KIND)]
        found += [table(others, f"{command} on {device}")] if others else []
        found += [table(kinds, f"{command} on {device}: kernel-time breakdown")] if kinds else []
    return found


def table(rows: Sequence[Row], title: str = "") -> TextTable:
    """Return the table of some rows.

    Times are also given as speed against the first provider, unless there is a metric of it.
    """
    varying = [name for name in LINES if len(distinct(rows, name)) > 1]
    lines = grouped(rows, *LINES)
    columns = sorted(grouped(rows, *COLUMNS), key=lambda column: column[0] != "time")
    base = "" if any(row.metric.startswith("speed") for row in rows) else rows[0].provider
    cells, compared = [], False
    order = distinct(rows, "operation")
    for key, group in sorted(lines.items(), key=lambda line: order.index(line[0][1])):
        named: dict[str, str] = dict(zip(LINES, key, strict=True))
        cells.append([named[name] for name in varying])
        if "provider" in varying and is_floor(named["provider"]):
            cells[-1][-1] += " (another function)"
        for column in columns:
            row = _find(group, column)
            speed = "" if row is None else _speed(row, lines.get((*key[:-1], base), []))
            cells[-1].append("" if row is None else quantiles(row) + speed)
            compared |= bool(speed)
    titles = [", ".join(filter(None, column)).removeprefix(KIND) for column in columns]
    header = [*varying, *titles]
    conditions = _conditions(rows, varying, base if compared else "")
    notes = (f"{conditions}.",)
    return TextTable(title=title, header=header, rows=cells, text_columns=len(varying), notes=notes)


def _find(rows: Sequence[Row], column: tuple[str, ...]) -> Row | None:
    return next((row for row in rows if (row.metric, row.unit) == column), None)


def _speed(row: Row, others: Sequence[Row]) -> str:
    """Return how many times as fast as the first provider a row is."""
    first = _find(others, (row.metric, row.unit))
    if row.metric != "time" or first is None or first is row or not row.p50 > 0:
        return ""
    return f" {first.p50 / row.p50:.2f}x"


def _conditions(rows: Sequence[Row], varying: list[str], base: str) -> str:
    """Say what is the same for all rows, with what and when they were measured."""
    same = [field_of(rows[0], name) for name in LINES if name not in varying]
    several = {row.samples for row in rows if row.samples > 1}
    if several:
        count = f"{min(several)}" if len(several) == 1 else f"{min(several)} to {max(several)}"
        same.append(f"median (p20-p80) of {count} samples")
    if base:
        same.append(f"x: times as fast as {base}")
    made = dict.fromkeys(versions(row.provenance) for row in rows)
    return "; ".join([*filter(None, same), *made])


def versions(made: Provenance) -> str:
    """Return what was measured with and when, in a few words."""
    parts = [
        f"torch {made.torch}",
        f"triton {made.triton}" if made.triton else "",
        f"timm {made.timm}" if made.timm else "",
        f"driver {made.driver}" if made.driver else "",
        f"commit {made.commit}{' with changes' if made.dirty else ''}" if made.commit else "",
        made.date[:10],
    ]
    return ", ".join(filter(None, parts))
