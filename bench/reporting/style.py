"""How figures look and become files: one ink, colours by provider, SVG for the page and PNG.

Text and axes are drawn in one ink, which the page replaces by its own text colour.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .data import is_floor, slug

INK = "#1b1b1f"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2", "#eeca3b", "#8a9a5b")
OURS, FLOOR, OFFICIAL = "#d62728", "#9a9aa2", "#6b6b75"
# Any, because only newer releases of matplotlib have a type for the names of settings.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "tcpa",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color"), INK),
    **dict.fromkeys(("ytick.color", "grid.color", "legend.labelcolor", "hatch.color"), INK),
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A finished figure."""

    name: str
    """Part of its file name."""
    caption: str
    svg: str
    """One <svg> element, in the reader's text colour, without any outside reference."""
    png: bytes


def colours_of(providers: Sequence[str]) -> dict[str, str]:
    """Return a colour per provider: ours, the official algorithm and floors have their own."""
    others = cycle(COLOURS)
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


def finish(figure: Figure, name: str, caption: str) -> Drawing:
    """Render a figure for paper and for the page."""
    FigureCanvasAgg(figure)
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=150, facecolor="white")
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    return Drawing(slug(name), caption, text, png.getvalue())
