"""Selection maps for the page: SVG whose patches tell their top-k list when pointed at."""

import io
from html import escape

import numpy as np
from PIL import Image

from tcpa.inspect.style import entry_colours, ink_on

from ..report.page import png_url
from .measure import Inspection, ModelMeasures

CELL, MARGIN = 20, 16
"""Side of a patch and room for the numbers of rows and columns, SVG units."""

LEAST = 80
"""Side of a map that has room for the names of its axes, SVG units."""

WIDE = 10
"""Patches side by side from which on a map needs more room."""

HINT = "Point at a patch, or tap it: the prompts that it chose, in order."

STYLE = """
.maps.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.row .figures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.row img { max-width: 26rem; }
output { display: block; min-height: 3em; font-size: 0.875rem; font-weight: 600; }
svg.selection text { font: 9px system-ui, sans-serif; text-anchor: middle; fill: #000;
  stroke: #fff; stroke-width: 2px; paint-order: stroke; pointer-events: none; }
svg.selection text.tick { font-size: 8px; fill: var(--soft); stroke: none; }
svg.selection rect { fill-opacity: 0.6; }
svg.selection rect.hot { stroke: #000; stroke-width: 2.5; }
.legend span { display: inline-block; min-width: 1.9em; text-align: center; margin: 0 2px 2px 0;
  padding: 0 0.2em; font-size: 0.8rem; border-radius: 3px; }
"""

SCRIPT = """
(function () {
  "use strict";
  function tell(event) {
    var patch = event.target.closest && event.target.closest("rect[data-k]");
    if (!patch) { return; }
    var group = patch.closest(".maps"), place = patch.getAttribute("data-at");
    group.querySelectorAll("rect.hot").forEach(function (r) { r.classList.remove("hot"); });
    group.querySelectorAll('rect[data-at="' + place + '"]').forEach(function (same) {
      same.classList.add("hot");
      var entries = same.getAttribute("data-k").split(" "), rest = entries.slice(1).join(", ");
      same.closest("figure").querySelector("output").textContent = "row " +
        place.replace(",", ", column ") + ": prompt " + entries[0] +
        (rest ? ", then " + rest : "");
    });
  }
  document.addEventListener("mouseover", tell);
  document.addEventListener("click", tell);
})();
"""


def selection_maps(found: Inspection, of_model: ModelMeasures, number: int) -> str:
    """Return the figures of one shown image, a block each."""
    selected, place = of_model.selected, found.shown[number]
    assert selected is not None
    picture = f"picture-{found.measured.index(of_model) + 1}-{number + 1}"
    seen = found.images.pictures[place]
    # In grey, so that all colours are those of entries.
    url = data_url(seen if seen.ndim == 2 else seen.mean(axis=-1))
    colours = entry_colours(selected.found.num_pool[1])
    figures = []
    for block, orders in enumerate(selected.found.image):
        order = orders[place]
        # One picture serves all blocks.
        source = f'id="{picture}" href="{url}"' if block == 0 else f"#{picture}"
        svg = _svg(order, selected.found.grid, source, colours, block)
        kinds = len(np.unique(order[:, 0]))
        entry, count = _most(order[:, 0])
        hint = HINT if block == 0 else "&nbsp;"
        figures.append(
            f"<figure><strong>Block {block + 1}: first choice of each patch</strong>{svg}"
            f"<output>{hint}</output>"
            f"<figcaption>{kinds} of {len(colours)} entries are a first choice; prompt {entry} "
            f"is that of {count} of {len(order)} patches.</figcaption></figure>"
        )
    small = " small" if selected.found.grid[1] <= WIDE else ""
    return f'<div class="maps figures{small}">{"".join(figures)}</div>'


def _most(first: np.ndarray) -> tuple[int, int]:
    entries, counts = np.unique(first, return_counts=True)
    return int(entries[counts.argmax()]), int(counts.max())


def _svg(
    order: np.ndarray, grid: tuple[int, int], picture: str, colours: list[str], block: int
) -> str:
    rows, columns = grid
    cell = max(CELL, LEAST // min(grid))
    width, height = columns * cell, rows * cell
    parts = [
        f'<svg class="selection" viewBox="{-2 * MARGIN} {-2 * MARGIN} {width + 2 * MARGIN + 2} '
        f'{height + 2 * MARGIN + 2}" role="img" '
        f'aria-label="Block {block + 1}: first choice of every patch">',
        f'<text x="{width / 2:g}" y="{-MARGIN - 4}" class="tick">patch column</text>',
        f'<text transform="translate({-1.5 * MARGIN:g} {height / 2:g}) rotate(-90)" class="tick">'
        "patch row</text>",
        f'<use href="{picture}"/>'
        if picture.startswith("#")
        else f'<image {picture} width="{width}" height="{height}" preserveAspectRatio="none"/>',
    ]
    for column in range(columns):
        parts.append(f'<text x="{column * cell + cell / 2:g}" y="-4" class="tick">{column}</text>')
    for place, entries in enumerate(order.tolist()):
        row, column = divmod(place, columns)
        x, y, first = column * cell, row * cell, entries[0]
        if column == 0:
            parts.append(
                f'<text x="{-MARGIN / 2:g}" y="{y + cell / 2:g}" class="tick" dy="0.35em">{row}'
                "</text>"
            )
        chosen = " ".join(map(str, entries))
        parts.append(
            f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="{colours[first]}" '
            f'data-at="{row},{column}" data-k="{chosen}"><title>row {row}, column {column}: '
            f"{escape(chosen)}</title></rect>"
            f'<text x="{x + cell / 2:g}" y="{y + cell / 2:g}" dy="0.35em">{first}</text>'
        )
    return "".join([*parts, "</svg>"])


def legend(entries: int) -> str:
    """Return the colours and numbers of the entries."""
    chips = "".join(
        f'<span style="background:{colour};color:{ink_on(colour)}">{entry}</span>'
        for entry, colour in enumerate(entry_colours(entries))
    )
    return f'<p class="legend" aria-label="Entries of the image pool">{chips}</p>'


def data_url(picture: np.ndarray) -> str:
    """Return an image in [0, 1] as a PNG that needs no file."""
    pixels = np.rint(255 * picture).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="png", optimize=True)
    return png_url(out.getvalue())
