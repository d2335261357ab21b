"""One self-contained HTML page: light and dark, narrow screens, nothing from the network."""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from .tables import NONE, TextTable

if TYPE_CHECKING:
    from tcpa.inspect.style import Drawing

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1f; --soft: #5c5c66;
  --line: #d9d9e0; --stripe: #f5f5f8; --worse: #b3261e; --better: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --paper: #141418; --ink: #e6e6ea; --soft: #a0a0aa;
  --line: #3a3a42; --stripe: #1d1d23; --worse: #ff8a80; --better: #6fdd8b; } }
* { box-sizing: border-box; }
body { background: var(--paper); color: var(--ink); margin: 0 auto; padding: 1rem;
  max-width: 78rem; font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 0.5rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 0.4rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 0.4rem; } h4 { font-size: 0.95rem; margin: 1.2rem 0 0.2rem; }
p, li, summary, figcaption { max-width: 52rem; }
.soft, summary, figcaption { color: var(--soft); font-size: 0.875rem; }
nav a { display: inline-block; margin-right: 1rem; } a { color: inherit; }
details { margin-bottom: 1rem; }
figure { margin: 0.6rem 0 1.2rem; min-width: 0; }
figure svg, figure img { display: block; max-width: 100%; height: auto;
  font-family: system-ui, sans-serif; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
.figures svg, .figures img { width: 100%; max-width: 34rem; }
.wide { overflow-x: auto; margin-bottom: 0.8rem; } .wide img { max-width: none; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; vertical-align: top; overflow-wrap: normal; }
th { vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { padding-left: 0.2rem; }
tbody tr:nth-child(even) { background: var(--stripe); }
td.long { white-space: normal; min-width: 12rem; } .n { text-align: right; }
tr.paper td { color: var(--soft); }
.worse td:first-child { color: var(--worse); } .better td:first-child { color: var(--better); }
@media (max-width: 30rem) { th, td { padding: 0.25rem 0.35rem; } }
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

LONG = 28
"""Letters from which on a cell may be broken over lines."""


def page(
    title: str, intro: str, sections: Mapping[str, str], *, style: str = "", script: str = ""
) -> str:
    """Return a page.

    Args:
        title: as text; the other arguments are HTML.
        intro: above the links to the sections.
        sections: by heading; empty ones are left out.
        style: CSS beyond the common one.
        script: what the page does, if anything.
    """
    shown = {heading: text for heading, text in sections.items() if text}
    links = "".join(f'<a href="#{_anchor(heading)}">{heading}</a>' for heading in shown)
    body = "".join(
        f'<h2 id="{_anchor(heading)}">{heading}</h2>\n{text}\n' for heading, text in shown.items()
    )
    policy = f"{POLICY}; script-src 'unsafe-inline'" if script else POLICY
    ending = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}{style}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{intro}\n<nav>{links}</nav>\n{body}{ending}</body>\n</html>\n"
    )


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def paragraph(text: str, *, soft: bool = False) -> str:
    """Return a paragraph of text."""
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{escape(text)}</p>\n"


def bullets(lines: Sequence[str]) -> str:
    """Return a list; "" of nothing."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>\n" if items else ""


def folded(summary: str, content: str, *, is_open: bool = False) -> str:
    """Return content that a reader opens."""
    opened = " open" * is_open
    return f"<details{opened}><summary>{escape(summary)}</summary>\n{content}</details>\n"


def figure(drawing: "Drawing", *, scrolled: bool = False) -> str:
    """Return a figure with its caption; too wide a one is shrunk, or else `scrolled`."""
    picture = drawing.svg or image(drawing, fixed=scrolled)
    picture = f'<div class="wide">{picture}</div>' if scrolled else picture
    caption = f"<figcaption>{escape(drawing.caption)}</figcaption>" if drawing.caption else ""
    return f"<figure>{picture}{caption}</figure>\n"


def figures(drawings: Iterable["Drawing"], *, scrolled: bool = False) -> str:
    """Return figures, side by side where there is room."""
    shown = "".join(figure(drawing, scrolled=scrolled) for drawing in drawings)
    return f'<div class="figures">{shown}</div>\n' if shown else ""


def image(drawing: "Drawing", *, fixed: bool = False) -> str:
    """Return a figure as pixels, in the size for which it was laid out if `fixed`."""
    size = f' style="width:{drawing.width}px"' if fixed else ""
    alt, name = escape(drawing.alt), drawing.name
    return f'<img src="{png_url(drawing.png)}" alt="{alt}" data-name="{name}"{size}>'


def png_url(png: bytes) -> str:
    """Return a PNG as a URL that needs no file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def table(
    shown: TextTable, *, caption: str = "", row_class: Callable[[list[str]], str] = lambda row: ""
) -> str:
    """Return a table, which is scrolled where it is too wide.

    Args:
        shown: the cells; title and notes are left to the caller.
        caption: above it.
        row_class: of the element of a row.
    """

    def cells(tag: str, row: Iterable[str]) -> str:
        return "".join(f"<{tag}{kind(i, cell)}>{escape(cell) or NONE}</{tag}>"
                       for i, cell in enumerate(row))  # fmt: skip

    def kind(column: int, cell: str) -> str:
        if column >= shown.text_columns:
            return ' class="n"'
        return ' class="long"' if len(cell) > LONG else ""

    def line(row: list[str]) -> str:
        name = row_class(row)
        opened = f'<tr class="{name}">' if name else "<tr>"
        return f"{opened}{cells('td', row)}</tr>"

    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    rows = "\n".join(map(line, shown.rows))
    return (
        f'<div class="wide"><table>{title}<thead><tr>{cells("th", shown.header)}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>\n"
    )
