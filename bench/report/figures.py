"""Figures of results: bars per operation, roofline, kernel-time breakdown, scaling curves."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from ...cli import UsageError
from ...inspect.style import COLOURS, INK, Drawing, finish, panel, styled
from ..costs.ceilings import Ceilings, in_base_unit, measured
from ..costs.operations import OPERATIONS
from ..harness.case import PROMISED, Shape, parse_shape
from ..harness.results import Row, number
from .data import KIND, distinct, grouped, is_floor

TIMES = ("time", "seconds per epoch")
MARKERS = {"forward": "o", "backward": "s", "both": "D"}
OURS, OFFICIAL, FLOOR = COLOURS[1], "#6b6b75", "#9a9aa2"
OTHERS = (COLOURS[0], *COLOURS[2:7])
KIND_COLOURS = (*COLOURS[:7], FLOOR)


@styled
def draw_all(rows: Sequence[Row]) -> list[Drawing]:
    """Draw whatever the rows allow."""
    return [*_bars(rows), *_rooflines(rows), *_breakdowns(rows), *_scaling(rows)]


def colours_of(providers: Sequence[str]) -> dict[str, str]:
    """Return a colour per provider: ours, the official algorithm and floors have their own."""
    others = itertools.cycle(OTHERS)
    ours = [p for p in providers if p.startswith("tcpa") and not is_floor(p)]
    found = {}
    for provider in providers:
        if is_floor(provider):
            found[provider] = FLOOR
        elif provider == "official":
            found[provider] = OFFICIAL
        else:
            found[provider] = OURS if ours and provider == ours[-1] else next(others)
    return found


def main_shape(rows: Sequence[Row]) -> str:
    """Return the shape that the targets are for, or else the first one."""
    shapes = distinct(rows, "shape")
    return PROMISED.name if PROMISED.name in shapes else shapes[0]


def _panels(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of one chart each, and their dtype: of one device, command and operation.

    Providers that have a dtype of their own, as those of a step, share a chart.
    """
    for group in grouped(rows, "device", "command", "operation").values():
        dtypes = distinct(group, "dtype")
        if len(grouped(group, "provider", "dtype")) == len(distinct(group, "provider")):
            yield ", ".join(dtypes), group
        else:
            yield from ((dtype, [r for r in group if r.dtype == dtype]) for dtype in dtypes)


def _bars(rows: Sequence[Row]) -> Iterator[Drawing]:
    """Draw times of the providers at the main shape, one panel a mode."""
    charts = itertools.chain.from_iterable(
        _panels([row for row in rows if row.metric == metric]) for metric in TIMES
    )
    for dtype, group in charts:
        shown = [row for row in group if row.shape == main_shape(group)]
        providers, modes = distinct(shown, "provider"), distinct(shown, "mode")
        # Inches of a letter, of a panel, of a bar.
        names = 0.075 * max(map(len, providers))
        size = (0.8 + names + 2.7 * len(modes), 0.9 + 0.3 * len(providers))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
        colours = colours_of(providers)
        for axes, mode in zip(panels, modes, strict=True):
            _bar_panel(axes, [r for r in shown if r.mode == mode], providers, colours)
            axes.set(title=mode, xlabel=f"{shown[0].metric}, {shown[0].unit}")
        own = {row.provider: f" [{row.dtype}]" if "," in dtype else "" for row in shown}
        panels[0].set_yticks(range(len(providers)), [f"{p}{own[p]}" for p in providers])
        panels[0].invert_yaxis()
        caption = f"{_what(shown[0], dtype)}. Bars: medians; whiskers: p20 to p80."
        if any(map(is_floor, providers)):
            caption += " Hatched: another function, less work; its fastest is the dashed line."
        yield finish(figure, _name("time", shown[0], dtype), caption)


def _what(row: Row, dtype: str) -> str:
    """Say what a chart shows and where it was measured."""
    operation = row.command if row.operation == row.command else f"{row.command}: {row.operation}"
    return f"{operation} at {row.shape}, {dtype}, on {row.provenance.device}"


def _name(kind: str, row: Row, dtype: str) -> str:
    """Return the file name of a chart; the device makes it one of many."""
    words = kind, row.command, row.operation, dtype, row.provenance.device
    return "-".join(dict.fromkeys(words))


def _bar_panel(
    axes: Any, rows: Sequence[Row], providers: list[str], colours: dict[str, str]
) -> None:
    for row in rows:
        y, floor = providers.index(row.provider), is_floor(row.provider)
        axes.barh(y, row.p50, 0.7, color=colours[row.provider], hatch="////" if floor else None,
                  alpha=0.6 if floor else 1.0)  # fmt: skip
        spread = [[row.p50 - row.p20], [row.p80 - row.p50]]
        axes.errorbar(row.p50, y, xerr=spread, color=INK, capsize=2, linewidth=0.9)
        axes.annotate(number(row.p50), (row.p80, y), (4, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    floors = [row.p50 for row in rows if is_floor(row.provider)]
    if floors:
        axes.axvline(min(floors), color=INK, linestyle="--", linewidth=0.9)
    axes.set_xlim(0, 1.25 * max(row.p80 for row in rows))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _rooflines(rows: Sequence[Row]) -> Iterator[Drawing]:
    """Draw achieved FLOP/s against arithmetic intensity, below the measured ceilings."""
    times = [
        row
        for row in rows
        if row.metric == "time" and row.operation in OPERATIONS and not is_floor(row.provider)
    ]
    for (device, dtype), group in grouped(times, "device", "dtype").items():
        shape = main_shape(group)
        shown = [row for row in group if row.shape == shape]
        points = [(row, *point) for row in shown if (point := _roofline_point(row))]
        ceilings = [c for c in measured(rows, dtype) if c.device == device]
        if ceilings and points:
            yield _roofline(points, ceilings[0], dtype)


def _roofline_point(row: Row) -> tuple[float, float] | None:
    """Return FLOP per byte and FLOP/s of a time; None where the shape has no formula."""
    shape = _shape(row)
    if shape is None or row.mode not in MARKERS or not row.p50 > 0:
        return None
    cost = OPERATIONS[row.operation](shape, row.dtype, row.mode)
    return (cost.flops / cost.bytes, cost.flops / in_base_unit(row).p50) if cost.flops else None


def _roofline(points: list[tuple[Row, float, float]], ceilings: Ceilings, dtype: str) -> Drawing:
    figure, axes = panel((7.6, 4.2))
    ridge = ceilings.flops / ceilings.bandwidth
    low = min(ridge, *(x for _, x, _ in points)) / 2
    high = 2 * max(ridge, *(x for _, x, _ in points))
    roof = [low * ceilings.bandwidth, ceilings.flops, ceilings.flops]
    axes.plot([low, ridge, high], roof, color=INK, linewidth=1.4)
    rows = [row for row, _, _ in points]
    colours = colours_of(distinct(rows, "provider"))
    for row, x, y in points:
        style = {"color": colours[row.provider], "markersize": 6, "markeredgewidth": 0}
        axes.plot(x, y, MARKERS[row.mode], alpha=0.85, **style)
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP per byte (formula)")
    axes.set_ylabel("FLOP/s achieved")
    for operation in distinct(rows, "operation"):
        own = [(x, y) for row, x, y in points if row.operation == operation]
        place = min(own, key=lambda point: point[1])
        offset = {"xytext": (0, -9), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(operation, place, ha="center", va="top", **offset)
    axes.set_ylim(bottom=min(y for _, _, y in points) / 3)
    axes.grid()
    dots: dict[str, Any] = {"marker": "o", "linestyle": ""}
    handles = [Line2D([], [], color=c, label=p, **dots) for p, c in colours.items()]
    for mode in distinct(rows, "mode"):
        handles.append(Line2D([], [], color=INK, **{**dots, "marker": MARKERS[mode]}, label=mode))
    _legend(figure, {str(handle.get_label()): handle for handle in handles})
    caption = (
        f"Roofline of {ceilings.device}, {dtype}, {rows[0].shape}. Ceilings: "
        f"{ceilings.flops / 1e12:.3g} TFLOP/s, {ceilings.bandwidth / 1e12:.3g} TB/s "
        f"({ceilings.source}). FLOPs and bytes are those of the operation, whatever a provider "
        "does beyond them."
    )
    return finish(figure, f"roofline-{dtype}-{ceilings.device}", caption)


def _breakdowns(rows: Sequence[Row]) -> Iterator[Drawing]:
    """Draw the kernel-time breakdown of steps."""
    for dtype, every in _panels([row for row in rows if row.metric.startswith(KIND)]):
        group = [row for row in every if row.shape == main_shape(every)]
        bars = list(grouped(group, "provider", "mode", "dtype"))
        figure, axes = panel((7.6, 1.2 + 0.35 * len(bars)))
        left = dict.fromkeys(bars, 0.0)
        for metric, colour in zip(
            distinct(group, "metric"), itertools.cycle((*COLOURS[:7], FLOOR))
        ):
            for row in (r for r in group if r.metric == metric):
                bar = row.provider, row.mode, row.dtype
                axes.barh(bars.index(bar), row.p50, 0.7, left=left[bar], color=colour)
                left[bar] += row.p50
            axes.barh(0, 0, color=colour, label=metric.removeprefix(KIND))
        varies = [len(set(values)) > 1 for values in zip(*bars, strict=True)]
        labels = [", ".join([bar[0], *itertools.compress(bar[1:], varies[1:])]) for bar in bars]
        axes.set_yticks(range(len(bars)), labels)
        axes.invert_yaxis()
        axes.set(xlabel=f"time, {group[0].unit}")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        figure.legend(loc="outside right center")
        caption = f"{_what(group[0], dtype)}: kernel-time breakdown; medians."
        yield finish(figure, _name("kinds", group[0], dtype), caption)


AXES = {"prompts": "prompt rows, P", "batch": "batch", "image": "image, pixels"}


def _scaling(rows: Sequence[Row]) -> Iterator[Drawing]:
    """Draw time against one size where three or more shapes differ in nothing else."""
    for dtype, group in _panels([row for row in rows if row.metric == "time"]):
        for size, label in AXES.items():
            chosen = _series(group, size)
            if not chosen:
                continue
            modes, colours = distinct(chosen, "mode"), colours_of(distinct(chosen, "provider"))
            figure = Figure(figsize=(1.9 + 2.9 * len(modes), 3.1), layout="constrained")
            panels = figure.subplots(1, len(modes), squeeze=False)[0]
            handles: dict[str, Any] = {}
            for axes, mode in zip(panels, modes, strict=True):
                _curves(axes, [row for row in chosen if row.mode == mode], size, colours)
                axes.set(title=mode, xlabel=label)
                found, labels = axes.get_legend_handles_labels()
                handles |= dict(zip(labels, found, strict=True))
            panels[0].set_ylabel(f"time, {chosen[0].unit}")
            _legend(figure, handles)
            caption = f"Time against {label}: {_what(chosen[0], dtype)}; {size} as shown. "
            caption += "Medians; whiskers: p20 to p80."
            yield finish(figure, _name(f"scaling-{size}", chosen[0], dtype), caption)


def _series(rows: Sequence[Row], size: str) -> list[Row]:
    """Return the rows of the most shapes that differ in one size only; none for fewer than 3."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        sizes = _sizes(row)
        if size in sizes:
            fixed = tuple(value for name, value in sizes.items() if name != size)
            groups.setdefault(fixed, []).append(row)
    best = max(groups.values(), key=lambda group: len(distinct(group, "shape")), default=[])
    return best if len(distinct(best, "shape")) >= 3 else []


def _sizes(row: Row) -> dict[str, Any]:
    """Return what the name of a shape tells; of a step's only the batch."""
    shape = _shape(row)
    if shape is not None:
        return asdict(shape)
    found = re.fullmatch(r"(.+)-b(\d+)", row.shape)
    return {"rest": found[1], "batch": int(found[2])} if found else {}


def _curves(axes: Any, rows: Sequence[Row], size: str, colours: dict[str, str]) -> None:
    for (provider,), group in grouped(rows, "provider").items():
        points = sorted(((_sizes(row)[size], row) for row in group), key=lambda point: point[0])
        x, y = [value for value, _ in points], [row.p50 for _, row in points]
        spread = [[r.p50 - r.p20 for _, r in points], [r.p80 - r.p50 for _, r in points]]
        style = "--" if is_floor(provider) else "-"
        axes.errorbar(x, y, yerr=spread, color=colours[provider], linestyle=style, marker="o",
                      markersize=3, linewidth=1.2, capsize=2, label=provider)  # fmt: skip
    values = sorted({_sizes(row)[size] for row in rows})
    if size == "batch":
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(values, map(str, values))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.grid()


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    """Put the legend beside a figure; below it, which then grows, when it is long."""
    longest = max(map(len, handles))
    if len(handles) <= 7 and longest <= 24:
        figure.legend(handles.values(), handles.keys(), loc="outside right center")
        return
    width, height = figure.get_size_inches()
    # Inches of a letter and of a line's sample.
    columns = 2 if 2 * (0.075 * longest + 0.6) <= width else 1
    figure.set_size_inches(width, height + 0.2 * math.ceil(len(handles) / columns))
    place = {"loc": "outside lower center", "ncols": columns}
    figure.legend(handles.values(), handles.keys(), **place)


def _shape(row: Row) -> Shape | None:
    try:
        return parse_shape(row.shape)
    except UsageError:
        return None
