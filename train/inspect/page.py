"""The page of an inspection: one HTML file, nothing from the network."""

import datetime
from collections.abc import Callable, Iterator, Sequence
from html import escape

import tcpa

from . import drawings, tables
from .drawings import Drawing
from .maps import SCRIPT, legend, png_url, selection_maps
from .measure import Inspection, Measured
from .tables import Table

CSS = """
:root { color-scheme: light; --ink: #1b1b1f; --soft: #51515a; --line: #d4d4dc; --stripe: #f5f5f8; }
* { box-sizing: border-box; }
body { background: #fff; color: var(--ink); margin: 0 auto; padding: 1rem; max-width: 78rem;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 0.5rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 0.4rem;
  border-bottom: 1px solid var(--line); } h3 { font-size: 1.05rem; margin: 1.6rem 0 0.3rem; }
h4 { font-size: 0.95rem; margin: 1.2rem 0 0.2rem; }
p, li, figcaption { max-width: 52rem; } p { margin: 0.4rem 0; } a { color: #005a91; }
nav a { margin-right: 1rem; } .soft, figcaption { color: var(--soft); font-size: 0.875rem; }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.grid.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
figure { margin: 0.6rem 0; min-width: 0; } figure img, figure > svg { width: 100%; height: auto;
  display: block; max-width: 34rem; } figure.row img { max-width: 26rem; }
.wide { overflow-x: auto; } figure .wide img { max-width: none; }
output { display: block; min-height: 3em; font-size: 0.875rem; font-weight: 600; }
svg.selection text { font: 9px system-ui, sans-serif; text-anchor: middle; fill: #000;
  stroke: #fff; stroke-width: 2px; paint-order: stroke; pointer-events: none; }
svg.selection text.tick { font-size: 8px; fill: var(--soft); }
svg.selection rect { fill-opacity: 0.6; }
svg.selection rect.hot { stroke: #000; stroke-width: 2.5; }
.legend span { display: inline-block; min-width: 1.9em; text-align: center; margin: 0 2px 2px 0;
  padding: 0 0.2em; font-size: 0.8rem; border-radius: 3px; }
table { border-collapse: collapse; font-size: 0.875rem; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: bottom; } td { white-space: nowrap; } th { max-width: 8rem; min-width: 3.2rem; }
.text { text-align: left; } td.text { white-space: normal; min-width: 5rem; }
tbody tr:nth-child(even) { background: var(--stripe); }
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def build_page(found: Inspection) -> tuple[str, list[Drawing]]:
    """Return the page, and the drawings to be written as files."""
    drawn: list[Drawing] = []

    def keep(drawing: Drawing) -> Drawing:
        drawn.append(drawing)
        return drawing

    sections = {
        "Models": "".join(_models(found)),
        "Selections": "".join(_selections(found, keep)),
        "Attention": "".join(_attention(found, keep)),
        "Feature space": "".join(_features(found, keep)),
        "Diversity": "".join(_diversity(found, keep)),
        "Left out": "".join(_left_out(found)),
    }
    shown = {title: text for title, text in sections.items() if text}
    links = "".join(f'<a href="#{drawings.slug(title)}">{title}</a>' for title in shown)
    body = "".join(
        f'<section><h2 id="{drawings.slug(title)}">{title}</h2>\n{text}</section>\n'
        for title, text in shown.items()
    )
    names = ", ".join(of_model.name for of_model in found.measured)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>What the prompts do: {escape(names)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<h1>What the prompts do</h1>\n<p>{escape(names)} on "
        f"{len(found.images.names):,} images of {escape(found.images.origin)}.</p>\n"
        f'<p class="soft">tcpa {tcpa.__version__}, {today}. Everything is computed in float32 '
        "from the operations of the models, as they evaluate; numbers.json beside this page has "
        f"every number, figures/ every picture.</p>\n<nav>{links}</nav>\n{body}"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
    return page, drawn


def _models(found: Inspection) -> Iterator[str]:
    yield _table(tables.models_table(found))
    yield f'<p class="soft">{escape(tables.MODELS_NOTE)}</p>'


def _selections(found: Inspection, keep: Callable[[Drawing], Drawing]) -> Iterator[str]:
    for of_model in found.measured:
        selected = of_model.selected
        if selected is None:
            continue
        top_k = selected.found.image.shape[-1]
        entries = selected.found.num_pool[1]
        yield f"<h3>{escape(of_model.name)}</h3>"
        yield (
            f"<p>Each patch chooses {top_k} of the {entries} entries of the image pool, those "
            "whose keys are most like it. Colour and number: the entry that it chose first. The "
            "last block's patches choose too, although a head that reads the class token alone "
            "makes no use of it.</p>"
        )
        yield legend(entries)
        for number, place in enumerate(found.shown):
            yield f"<h4>{escape(found.images.names[place])}</h4>"
            yield selection_maps(found, of_model, number)
        for drawing in drawings.selection_drawings(found, of_model):
            keep(drawing)
        usage = [keep(drawing) for drawing in drawings.usage_drawings(found, of_model)]
        figures = "".join(_figure(drawing, wide=True) for drawing in usage)
        yield f'<div class="grid large">{figures}</div>'
        change = drawings.change_drawing(of_model)
        lines = [drawings.overlap_drawing(of_model, selected), *([change] if change else [])]
        yield _grid([keep(drawing) for drawing in lines])
        yield _table(tables.selection_table(selected))
        yield f'<p class="soft">{escape(tables.SELECTION_NOTE)}</p>'


def _attention(found: Inspection, keep: Callable[[Drawing], Drawing]) -> Iterator[str]:
    before = -1
    for number, heading, caption, row in drawings.attention_rows(found):
        if number != before:
            yield f"<h3>{escape(found.images.names[found.shown[number]])}</h3>"
            before = number
        if heading:
            yield f"<h4>{escape(heading)}</h4>"
        images = "".join(_image(keep(drawing)) for drawing in row)
        yield f'<figure class="row"><div class="grid">{images}</div>'
        yield f"<figcaption>{escape(caption)}</figcaption></figure>"
    yield "<h3>How much goes to prompts</h3>"
    yield _grid([keep(drawings.shares_drawing(found))])


def _features(found: Inspection, keep: Callable[[Drawing], Drawing]) -> Iterator[str]:
    drawn = [keep(drawing) for drawing in drawings.feature_drawings(found)]
    if drawn:
        yield _grid(drawn)
    if any(of_model.separation for of_model in found.measured):
        yield _table(tables.separation_table(found))
        yield f'<p class="soft">{escape(tables.SEPARATION_NOTE)}</p>'
    else:
        yield f"<p>{escape(tables.no_separation(found))}</p>"


def _diversity(found: Inspection, keep: Callable[[Drawing], Drawing]) -> Iterator[str]:
    yield (
        "<p>Section 4 of the paper argues that prompts which all tokens share confine attention "
        "to a low rank. Here is what these models do.</p>"
    )
    yield _grid([keep(drawing) for drawing in drawings.diversity_drawings(found)])
    shown = "".join(_table(table) for table in tables.diversity_tables(found))
    yield f'<div class="grid large">{shown}</div>'
    yield f'<p class="soft">{escape(tables.diversity_note(found))}</p>'


def _left_out(found: Inspection) -> Iterator[str]:
    lines = [_inapplicable(of_model) for of_model in found.measured if of_model.selected is None]
    if found.images.left_out:
        lines.append(f"{found.images.left_out:,} further images were not read (--max-images).")
    if lines:
        yield f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
    if found.images.skipped:
        yield _table(tables.skipped_table(found))


def _inapplicable(of_model: Measured) -> str:
    reason = of_model.no_selection or "its patches choose among no prompts"
    return (
        f"{of_model.name} has no selection maps, usage, overlap and change of selections: {reason}."
    )


def _grid(drawn: Sequence[Drawing]) -> str:
    return f'<div class="grid large">{"".join(_figure(drawing) for drawing in drawn)}</div>'


def _figure(drawing: Drawing, *, wide: bool = False) -> str:
    picture = drawing.svg or _image(drawing, fixed=wide)
    # A matrix of many entries is scrolled, not shrunk.
    picture = f'<div class="wide">{picture}</div>' if wide else picture
    caption = f"<figcaption>{escape(drawing.caption)}</figcaption>" if drawing.caption else ""
    return f'<figure data-name="{drawing.name}">{picture}{caption}</figure>'


def _image(drawing: Drawing, *, fixed: bool = False) -> str:
    # Figures are drawn for 96 pixels an inch and stored finer; bytes 16 to 19 of a PNG are its
    # width.
    width = round(int.from_bytes(drawing.png[16:20], "big") * 96 / drawings.DPI)
    size = f' style="width:{width}px"' if fixed else ""
    return (
        f'<img src="{png_url(drawing.png)}" alt="{escape(drawing.alt)}"{size} '
        f'data-name="{drawing.name}">'
    )


def _table(table: Table) -> str:
    def line(tag: str, cells: list[str]) -> str:
        kinds = (' class="text"' if place in table.texts else "" for place in range(len(cells)))
        row = zip(cells, kinds, strict=True)
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in row)

    head = line("th", table.header)
    rows = "".join(f"<tr>{line('td', row)}</tr>" for row in table.rows)
    return (
        f'<div class="wide"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n"
    )
