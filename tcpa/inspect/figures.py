"""Figures of what `tcpa.inspect` measures. matplotlib is imported when one is drawn.

Every figure is a single panel with its own title, axes and units, dark on white, and leaves the
user's matplotlib state alone. Where colours name things, numbers or markers name them too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import require, require_int
from .style import COLOURS, INK, MARKERS, entry_colours, panel, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, slots=True)
class Series:
    """A line of a figure."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    """Half the height of a band around the line, in the unit of `y`."""


@styled
def draw_selection(
    image: np.ndarray,
    order: np.ndarray,
    grid: tuple[int, int],
    entries: int,
    *,
    title: str = "First choice of every patch",
) -> "Figure":
    """Draw an image, in grey, with each patch coloured and numbered by its first prompt.

    Args:
        image: float `[height, width]` or `[height, width, 3]`, values in [0, 1].
        order: int `[L_patch, K]`, a row of `Selections.image`.
        grid: patches from top to bottom and from left to right.
        entries: R of the image pool.
    """
    rows, columns = grid
    fits = order.ndim == 2 and order.shape[0] == rows * columns and order.shape[1] > 0
    require(fits, "order", f"shape {order.shape}", f"({rows * columns}, K)", "pass one image's")
    figure, axes = panel((3.3, 3.4))
    height, width = image.shape[:2]
    _show(axes, image if image.ndim == 2 else image.mean(axis=-1))
    colours = entry_colours(entries)
    size = (width / columns, height / rows)
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    # Half a patch, and readable on any image.
    text: dict[str, Any] = {"fontsize": min(8.0, 2.8 * 72 / max(grid) / 2), "color": "black"}
    text["path_effects"] = [withStroke(linewidth=1.5, foreground="white")]
    for place, entry in enumerate(order[:, 0]):
        row, column = divmod(place, columns)
        corner = (column * size[0] - 0.5, row * size[1] - 0.5)
        colour = colours[entry]
        axes.add_patch(Rectangle(corner, *size, facecolor=colour, alpha=0.6, linewidth=0))
        middle = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
        axes.text(*middle, str(entry), ha="center", va="center", **text)
    _number(axes, title, grid, image)
    return figure


@styled
def draw_usage(seen: np.ndarray, *, title: str = "Tokens that see an entry") -> "Figure":
    """Draw how often the entries of a pool are selected, a row per block.

    Args:
        seen: float `[N, R]` in [0, 1], `Usage.seen`.
    """
    blocks, entries = seen.shape
    figure, axes = panel((max(2.6, 0.27 * entries + 1.4), 0.3 * blocks + 1.4))
    shown = axes.imshow(100 * seen, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (block, entry), share in np.ndenumerate(seen):
        # A dead entry and a rare one look alike.
        text = "0" if share == 0 else f"{100 * share:.0f}" if share >= 0.005 else "<1"
        colour = "black" if share > 0.5 else "white"
        axes.text(entry, block, text, ha="center", va="center", fontsize=6.5, color=colour)
    axes.set(xlabel="entry of the pool", ylabel="block", title=title)
    axes.set_xticks(range(entries), [str(i) for i in range(entries)], fontsize=7)
    axes.set_yticks(range(blocks), [str(i + 1) for i in range(blocks)])
    bar = figure.colorbar(shown, ax=axes, pad=0.02)
    bar.set_label("tokens, %")
    return figure


@styled
def draw_image(image: np.ndarray, grid: tuple[int, int], *, title: str = "Image") -> "Figure":
    """Draw an image with its patches numbered along the sides.

    Args:
        image: float `[height, width]` or `[height, width, 3]`, values in [0, 1].
        grid: patches from top to bottom and from left to right.
    """
    figure, axes = panel((3.3, 3.1))
    _show(axes, image)
    _number(axes, title, grid, image)
    return figure


@styled
def draw_attention(
    image: np.ndarray,
    weights: np.ndarray,
    *,
    title: str = "Attention",
    limit: float | None = None,
    query: tuple[int, int] | None = None,
    opacity: float = 1.0,
) -> "Figure":
    """Draw where a token looks, over an image if `opacity` lets it be seen.

    Args:
        image: float `[height, width]` or `[height, width, 3]`, values in [0, 1].
        weights: `[rows, columns]`, of the patches.
        limit: weight at the end of the colour scale; the largest by default.
        query: row and column of the patch that looks; it gets a frame.
        opacity: of the colours, 0 to 1; below 1 they are not quite those of the scale.
    """
    figure, axes = panel((3.3, 3.1))
    height, width = image.shape[:2]
    limit = float(weights.max()) if limit is None else limit
    _show(axes, image if image.ndim == 2 else image.mean(axis=-1))
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    scale = {"cmap": "viridis", "vmin": 0, "vmax": 100 * limit or 1}
    shown = axes.imshow(
        100 * weights, extent=extent, alpha=opacity, interpolation="nearest", **scale
    )
    if query is not None:
        from matplotlib.patches import Rectangle

        size = (width / weights.shape[1], height / weights.shape[0])
        corner = (query[1] * size[0] - 0.5, query[0] * size[1] - 0.5)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#d55e00", linewidth=2))
    bar: Any = figure.colorbar(shown, ax=axes, shrink=0.75, pad=0.02)
    bar.solids.set_alpha(1)
    bar.set_label("attention of a patch, %")
    _number(axes, title, weights.shape, image)
    return figure


@styled
def draw_attention_surface(
    weights: np.ndarray, *, title: str = "Attention", limit: float | None = None
) -> "Figure":
    """Draw where a token looks as a surface over the patches.

    Args:
        weights: `[rows, columns]`, of the patches.
        limit: weight at the top of the axis; the largest by default.
    """
    figure, axes = panel((3.3, 3.1), projection="3d")
    rows, columns = np.mgrid[: weights.shape[0], : weights.shape[1]]
    limit = 100 * (float(weights.max()) if limit is None else limit) or 1
    surface = {"cmap": "viridis", "vmin": 0, "vmax": limit, "linewidth": 0.2, "edgecolor": INK}
    axes.plot_surface(columns, rows, 100 * weights, rcount=64, ccount=64, **surface)
    axes.set(title=title, xlabel="patch column", ylabel="patch row", zlim=(0, limit))
    axes.set_zlabel("attention, %", labelpad=2)
    axes.set_box_aspect((1, 1, 0.7), zoom=0.86)
    # As on the image: the first row is far away.
    axes.invert_yaxis()
    axes.view_init(elev=38, azim=-58)
    axes.tick_params(labelsize=7, pad=-1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, nbins=5)
    return figure


@styled
def draw_points(
    points: np.ndarray,
    labels: np.ndarray | None = None,
    names: Sequence[str] = (),
    *,
    title: str = "t-SNE of the features",
) -> "Figure":
    """Draw a map of features, a colour and a marker per class.

    Args:
        points: float `[B, 2]`, from `tsne`.
        labels: int `[B]`; one colour for all without.
        names: of the classes.
    """
    kinds = 0 if labels is None else len(names)
    listed = 0 < kinds <= 20
    figure, axes = panel((4.0, 3.6 + 0.17 * -(-kinds // 5) * listed))
    if labels is None or not kinds:
        axes.scatter(*points.T, s=14, color=COLOURS[0], linewidths=0)
    else:
        require_int("labels", int(labels.max()), 0, kinds - 1)
        for kind, (name, colour) in enumerate(zip(names, entry_colours(kinds), strict=True)):
            marker = MARKERS[kind % len(MARKERS)]
            of_class = points[labels == kind].T
            axes.scatter(*of_class, s=17, color=colour, marker=marker, linewidths=0, label=name)
    if listed:
        columns = min(kinds, 5)
        figure.legend(
            loc="outside lower center", ncols=columns, handletextpad=0.1, columnspacing=0.9
        )
    axes.set(xlabel="t-SNE 1, no unit", ylabel="t-SNE 2, no unit", title=title)
    axes.set(xticks=[], yticks=[])
    return figure


@styled
def draw_lines(
    series: Sequence[Series], *, xlabel: str, ylabel: str, title: str, integer: bool = True
) -> "Figure":
    """Draw lines, each with a colour and a marker of its own.

    Args:
        series: lines.
        xlabel, ylabel: with units.
        integer: ticks of the x axis at whole numbers only.
    """
    figure, axes = panel((4.0, 2.9 + 0.19 * -(-len(series) // 2)))
    for place, line in enumerate(series):
        style = {"color": entry_colours(place + 1)[-1], "marker": MARKERS[place % len(MARKERS)]}
        axes.plot(line.x, line.y, label=line.name, markersize=4, linewidth=1.4, **style)
        if line.spread is not None:
            low, high = np.subtract(line.y, line.spread), np.add(line.y, line.spread)
            axes.fill_between(line.x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if integer:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid()
    if series:
        figure.legend(loc="outside lower center", ncols=2, handlelength=2.4)
    return figure


def _show(axes: Any, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=1)


def _number(axes: Any, title: str, grid: Sequence[int], image: np.ndarray) -> None:
    """Label an image's axes with patch numbers."""
    for set_ticks, count, pixels in (
        (axes.set_yticks, grid[0], image.shape[0]),
        (axes.set_xticks, grid[1], image.shape[1]),
    ):
        shown = range(0, count, max(1, -(-count // 8)))
        set_ticks([(i + 0.5) * pixels / count - 0.5 for i in shown], [str(i) for i in shown])
    axes.tick_params(labelsize=7, length=2)
    axes.set(xlabel="patch column", ylabel="patch row", title=title)
