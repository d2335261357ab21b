"""What `tcpa-bench ops` says of a case: metrics of every provider, and the printed table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .costs.ceilings import Ceilings
from .costs.operations import OPERATIONS
from .harness import timing
from .harness.case import Shape
from .harness.provider import Provider
from .harness.results import Row
from .harness.timing import Quantiles

TIME, SPEED = ("time", "us"), ("speed", "x official")
COMPOSITION = ("speed", "x best composition")
"""Metric and unit."""
COLUMNS = {
    ("rate", "TFLOP/s"): "TFLOP/s",
    ("bandwidth", "GB/s"): "GB/s",
    ("share of ceiling", "%"): "% of ceiling",
    ("peak memory", "MiB"): "peak MiB",
    SPEED: "x official",
    COMPOSITION: "x best composition",
}
"""Metric and unit -> title; the time comes before them."""
HEADER = ["provider", "us (p20-p80)", *COLUMNS.values()]


@dataclass(frozen=True, slots=True)
class OperationCase:
    """One table of the race."""

    operation: str
    shape: Shape
    dtype: str
    mode: str

    @property
    def title(self) -> str:
        """Operation, shape, dtype and mode."""
        return f"{self.operation}, {self.shape.name}, {self.dtype}, {self.mode}"

    @property
    def fields(self) -> dict[str, str]:
        """What marks its rows."""
        return {
            "command": "ops",
            "operation": self.operation,
            "shape": self.shape.name,
            "dtype": self.dtype,
            "mode": self.mode,
        }


def metrics_of(
    case: OperationCase,
    provider: Provider,
    times: dict[str, list[float]],
    peaks: dict[str, float | None],
    reached: Ceilings,
    fastest: str | None,
) -> dict[tuple[str, str], Quantiles]:
    """Return all metrics of one provider by name and unit, the time last.

    A run that ends between two rows leaves no time, and measures the provider again.
    """
    label = provider.label
    seconds = Quantiles.of(times[label])
    found: dict[tuple[str, str], Quantiles] = {}
    # A floor does less than the operation's work: its rate would be another one.
    if provider.same_function:
        work = OPERATIONS[case.operation](case.shape, case.dtype, case.mode)
        least = work.seconds(reached.flops, reached.bandwidth)
        found["rate", "TFLOP/s"] = seconds.rate(work.flops / 1e12)
        found["bandwidth", "GB/s"] = seconds.rate(work.bytes / 1e9)
        found["share of ceiling", "%"] = seconds.rate(100 * least)
    peak = peaks[label]
    if peak is not None:
        found["peak memory", "MiB"] = Quantiles.of([peak / 2**20])
    if "official" in times:
        found[SPEED] = timing.ratio(times, label, "official")
    if fastest is not None:
        found[COMPOSITION] = timing.ratio(times, label, fastest)
    found[TIME] = seconds.scaled(1e6)
    return found


def best_composition(providers: Iterable[Provider], times: dict[str, list[float]]) -> str | None:
    """Return the label of the fastest composition, if one was timed."""
    labels = [p.label for p in providers if p.role == "composition" and p.label in times]
    return min(labels, key=lambda label: Quantiles.of(times[label]).p50, default=None)


def table(
    case: OperationCase,
    providers: Sequence[Provider],
    known: Iterable[Row],
    notes: dict[str, str],
    *,
    new: bool,
) -> str:
    """Lay out a case: of every provider its fastest back end, and who is missing and why.

    Args:
        case: what was measured.
        providers: those to show, as far as they have rows.
        known: rows of the case.
        notes: why others have none, by label.
        new: whether anything was measured in this run.
    """
    rows: dict[str, dict[tuple[str, str], Row]] = {}
    for row in known:
        rows.setdefault(row.provider, {})[row.metric, row.unit] = row
    cells, floors = [], False
    for name in dict.fromkeys(provider.name for provider in providers):
        tried = [p for p in providers if p.name == name and TIME in rows.get(p.label, {})]
        if tried:
            best = min(tried, key=lambda p: rows[p.label][TIME].p50)
            cells.append(_cells(best, rows[best.label], len(tried)))
            floors |= not best.same_function
    lines = [case.title + ("" if new else " (measured before)")]
    lines += _columns([HEADER, *cells]) if cells else []
    lines += ["* less work than the operation's: a floor, no competitor"] if floors else []
    for note in dict.fromkeys(notes.values()):
        labels = [label for label, found in notes.items() if found == note]
        lines.append(f"{note}: {'; '.join(labels)}")
    return "\n" + "\n  ".join(lines)


def _cells(provider: Provider, found: dict[tuple[str, str], Row], tried: int) -> list[str]:
    """Return the line of one provider, the fastest of those tried."""
    name = provider.label + ("" if provider.same_function else " *")
    time = found[TIME]
    spread = f"{_short(time.p50)} ({_short(time.p20)}-{_short(time.p80)})"
    values = [_short(found[column].p50) if column in found else "-" for column in COLUMNS]
    return [f"{name}, best of {tried}" if tried > 1 else name, spread, *values]


def _columns(lines: list[list[str]]) -> list[str]:
    """Align cells: the first to the left, the others to the right."""
    name, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return [
        f"{first:<{name}}" + "".join(f"  {c:>{w}}" for c, w in zip(others, widths, strict=True))
        for first, *others in lines
    ]


def _short(value: float) -> str:
    """Return three significant digits, without an exponent where they can be read."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
