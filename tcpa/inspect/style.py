"""How every figure of the project looks and becomes a file: one ink, one palette, PNG and SVG.

matplotlib is imported when something is drawn, and the user's own style is left alone.
"""

import functools
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1b1b1f"
"""Text and axes; in SVG the reader's own text colour."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b5a900", "#8c8c96")
"""Okabe and Ito's palette with a darker yellow, for white ground, and grey for black."""

MARKERS = "osD^vPX*<>"

DPI = 150
"""Of PNG files; figures are laid out for 96 pixels an inch."""

# Any, because only newer releases of matplotlib have a type for the names of settings.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "tcpa",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor"), INK),
    **dict.fromkeys(("grid.color", "hatch.color"), INK),
    "grid.alpha": 0.15,
    "hatch.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A finished figure."""

    name: str
    """Of its file, without the ending."""
    alt: str
    """For those who do not see it."""
    caption: str
    """What is seen; "" where others say it."""
    png: bytes
    svg: str
    """One <svg> element in the reader's text colour, without any outside reference."""

    @property
    def width(self) -> int:
        """Pixels for which it was laid out, 96 an inch."""
        # Bytes 16 to 19 of a PNG are its width.
        return round(int.from_bytes(self.png[16:20], "big") * 96 / DPI)


P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Let a function draw in this style, whatever the user's own is."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return drawn


def panel(size: tuple[float, float], **options: Any) -> tuple["Figure", Any]:
    """Return an empty figure, inches, with its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(subplot_kw=options)


@styled
def to_png(figure: "Figure") -> bytes:
    """Return a figure as a PNG file."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    return data.getvalue()


@styled
def to_svg(figure: "Figure") -> str:
    """Return a figure as one <svg> element for a page."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)


def finish(figure: "Figure", name: str, caption: str = "", *, vector: bool = True) -> Drawing:
    """Render a figure for paper and for a page, whose SVG is left out unless `vector`."""
    alt = figure.axes[0].get_title() or caption
    svg = to_svg(figure) if vector else ""
    return Drawing(name=slug(name), alt=alt, caption=caption, png=to_png(figure), svg=svg)


def slug(text: str) -> str:
    """Return a text as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


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
    luminance = 0.0
    for place, weight in ((1, 0.2126), (3, 0.7152), (5, 0.0722)):
        value = int(colour[place : place + 2], 16) / 255
        linear = value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        luminance += weight * linear
    # Where the contrast ratios with black and with white are equal.
    return "#000000" if luminance > 0.179 else "#ffffff"
