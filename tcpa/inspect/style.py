"""How the figures of `tcpa.inspect` look: one ink, one palette, an empty panel to draw on."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1b1b1f"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b5a900", "#8c8c96")
"""Okabe and Ito's palette with a darker yellow, for white ground, and grey for black."""

MARKERS = "osD^vPX*<>"

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "tcpa",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


P = ParamSpec("P")


def styled(draw: "Callable[P, Figure]") -> "Callable[P, Figure]":
    """Let a function draw in this style, whatever the user's own is."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> "Figure":
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return drawn


def entry_colours(count: int) -> list[str]:
    """Return colours for the entries of a pool, as `#rrggbb`.

    Eight of Okabe and Ito's, then the same darker, lighter, and again: number entries as well.
    """
    found = []
    for place in range(count):
        base = [int(COLOURS[place % 8][i : i + 2], 16) for i in (1, 3, 5)]
        towards, amount = ((0, 0.0), (0, 0.5), (255, 0.65))[place // 8 % 3]
        mixed = (round(value + (towards - value) * amount) for value in base)
        found.append("#{:02x}{:02x}{:02x}".format(*mixed))
    return found


def ink_on(colour: str) -> str:
    """Return black or white, whichever is easier to read on a colour `#rrggbb`."""
    linear = []
    for place in (1, 3, 5):
        value = int(colour[place : place + 2], 16) / 255
        linear.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    luminance = float(np.dot((0.2126, 0.7152, 0.0722), linear))
    # Where the contrast ratios with black and with white are equal.
    return "#000000" if luminance > 0.179 else "#ffffff"


def panel(size: tuple[float, float], **options: Any) -> tuple["Figure", Any]:
    """Return an empty figure, inches, with its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(subplot_kw=options)
