"""The page of an inspection, and the tables on it."""

import math
from collections.abc import Iterable, Iterator
from html import escape

import numpy as np

import tcpa
from tcpa import provenance
from tcpa.inspect.style import Drawing

from ..report import page as html
from ..report.page import bullets, paragraph, table
from ..report.tables import TextTable, formatted
from . import drawings
from .drawings import DIVERSITY
from .maps import SCRIPT, STYLE, legend, selection_maps
from .measure import Inspection, ModelSelection
from .subjects import BARE

MODELS = (
    "Trainable parameters: prompts, head and whatever else is not frozen. Accuracy, where it is "
    "known, is that of the run on its test images, or of the demo on all its test images."
)
SELECTION = (
    "Entropy: of an entry drawn from all selections of the image pool, of the first choices alone, "
    "and of the selections of the CLS pool; its largest possible value is the base-2 logarithm of "
    "the entries. Dead: entries that no token of these images sees. Overlap: mean Jaccard index."
)
SEPARATION = (
    "All in the full feature space, not on the maps. Silhouette with Euclidean distance, -1 to 1; "
    "k-NN: images whose class is that of most of their nearest neighbours, leave-one-out; variance "
    "ratio: between the classes, divided by within. Higher is better for all three."
)
DIVERSE = (
    "Section 4 of the paper argues that prompts which all tokens share confine attention to a low "
    "rank. Here is what these models do."
)


def build_page(found: Inspection) -> tuple[str, list[Drawing]]:
    """Return the page, and the drawings to be written as files."""
    drawn: list[Drawing] = []
    sections = {
        "Models": _table(_models(found)) + paragraph(MODELS, soft=True),
        "Selections": "".join(_selections(found, drawn)),
        "Attention": "".join(_attention(found, drawn)),
        "Feature space": _features(found, drawn),
        "Diversity": _diversity(found, drawn),
        "Left out": _left_out(found),
    }
    names = ", ".join(of_model.name for of_model in found.measured)
    intro = paragraph(
        f"{names} on {len(found.images.names):,} images of {found.images.origin}."
    ) + paragraph(
        f"tcpa {tcpa.__version__}, {provenance.now()[:10]}. Everything is computed in float32 from "
        "the operations of the models, as they evaluate; numbers.json beside this page has every "
        "number, figures/ every picture.",
        soft=True,
    )
    return html.page("What the prompts do", intro, sections, style=STYLE, script=SCRIPT), drawn


def _figures(drawn: list[Drawing], new: Iterable[Drawing], *, scrolled: bool = False) -> str:
    """Show drawings, and keep them."""
    shown = list(new)
    drawn += shown
    return html.figures(shown, scrolled=scrolled)


def _table(shown: TextTable) -> str:
    return table(shown, caption=shown.title)


def _models(found: Inspection) -> TextTable:
    rows = [
        [
            subject.name,
            subject.source,
            f"{subject.model.num_trainable:,}" if subject.name != BARE else "0",
            formatted(subject.accuracy, ".1f"),
        ]
        for subject in found.subjects
    ]
    header = ["model", "from", "trainable parameters", "accuracy, %"]
    title = f"What is compared, on {found.backbone}"
    return TextTable(title=title, header=header, rows=rows, text_columns=2)


def _selections(found: Inspection, drawn: list[Drawing]) -> Iterator[str]:
    for of_model in found.measured:
        selected = of_model.selected
        if selected is None:
            continue
        entries = selected.found.num_pool[1]
        yield f"<h3>{escape(of_model.name)}</h3>"
        yield paragraph(
            f"Each patch chooses {selected.found.image.shape[-1]} of the {entries} entries of the "
            "image pool, those whose keys are most like it. Colour and number: the entry that it "
            "chose first. The last block's patches choose too, although a head that reads the "
            "class token alone makes no use of it."
        )
        yield legend(entries)
        for number, place in enumerate(found.shown):
            yield f"<h4>{escape(found.images.names[place])}</h4>"
            yield selection_maps(found, of_model, number)
        drawn += drawings.selection_drawings(found, of_model.name, selected)
        usage = drawings.usage_drawings(found, of_model.name, selected)
        # A matrix of many entries is scrolled, not shrunk.
        yield _figures(drawn, usage, scrolled=True)
        yield _figures(drawn, drawings.pair_drawings(of_model.name, selected))
        yield _table(_by_block(selected))
        yield paragraph(SELECTION, soft=True)


def _by_block(selected: ModelSelection) -> TextTable:
    cls_entries, entries = selected.found.num_pool
    limit, cls_limit = (
        formatted(math.log2(n) if n else None, ".2f") for n in (entries, cls_entries)
    )
    image, cls, overlap = selected.image, selected.cls, selected.overlap
    columns = {
        f"entropy, bits (of {limit})": (image.entropy, ".2f"),
        "of first choices, bits": (image.first_entropy, ".2f"),
        f"dead of {entries}": (image.dead, "d"),
        f"CLS entropy, bits (of {cls_limit})": (cls.entropy, ".2f"),
        f"CLS dead of {cls_entries}": (cls.dead, "d"),
        "overlap of neighbours": (overlap.neighbours, ".3f"),
        "of any two patches": (overlap.pairs, ".3f"),
        "by chance": ([overlap.chance] * len(image.dead), ".3f"),
    }
    rows = [
        [str(block + 1), *(format(values[block], how) for values, how in columns.values())]
        for block in range(len(image.dead))
    ]
    return TextTable(title="Selections by block", header=["block", *columns], rows=rows)


def _attention(found: Inspection, drawn: list[Drawing]) -> Iterator[str]:
    before = -1
    for number, heading, caption, row in drawings.attention_rows(found):
        if number != before:
            yield f"<h3>{escape(found.images.names[found.shown[number]])}</h3>"
            before = number
        if heading:
            yield f"<h4>{escape(heading)}</h4>"
        drawn += row
        yield f'<figure class="row"><div class="figures">{"".join(map(html.image, row))}</div>'
        yield f"<figcaption>{escape(caption)}</figcaption></figure>"
    yield "<h3>How much goes to prompts</h3>"
    yield _figures(drawn, [drawings.shares_drawing(found)])


def _features(found: Inspection, drawn: list[Drawing]) -> str:
    maps = _figures(drawn, drawings.feature_drawings(found))
    rows, first = [], found.measured[0].separation
    if first is None:
        reason = "too few images, or all of one class."
        if found.images.labels is None:
            reason = "the images have no classes. Put them into a folder per class."
        return maps + paragraph(f"Class separation does not apply: {reason}")
    for of_model in found.measured:
        values = of_model.separation
        assert values is not None
        numbers = (values.silhouette, values.knn_accuracy, values.variance_ratio)
        shown = [format(v, how) for v, how in zip(numbers, (".3f", ".1f", ".3f"), strict=True)]
        rows.append([of_model.name, *shown])
    header = ["model", "silhouette", f"{first.neighbours}-NN accuracy, %", "variance ratio"]
    title = f"Separation of {first.classes} classes, {first.points:,} images"
    shown = _table(TextTable(title=title, header=header, rows=rows))
    return maps + shown + paragraph(SEPARATION, soft=True)


def _diversity(found: Inspection, drawn: list[Drawing]) -> str:
    figures = _figures(drawn, drawings.diversity_drawings(found))
    tables = []
    for name, (title, ylabel) in DIVERSITY.items():
        columns = [getattr(of_model.diversity, name) for of_model in found.measured]
        rows = [
            [str(block + 1), *(_spread(values[block]) for values in columns)]
            for block in range(len(columns[0]))
        ]
        header = ["block", *(of_model.name for of_model in found.measured)]
        tables.append(TextTable(title=f"{title} ({ylabel})", header=header, rows=rows))
    shown = f'<div class="figures">{"".join(map(_table, tables))}</div>\n'
    note = (
        f"Mean and standard deviation over {found.diversity_images} images. Prompts add columns to "
        "the attention matrix, which alone can raise its rank; the rank of the tokens has the same "
        "bound for all models."
    )
    return paragraph(DIVERSE) + figures + shown + paragraph(note, soft=True)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.2f} \N{PLUS-MINUS SIGN} {values.std():.2f}"


def _left_out(found: Inspection) -> str:
    images = found.images
    lines = [
        f"{of_model.name} has no selection maps, usage, overlap and change of selections: "
        f"{of_model.no_selection}."
        for of_model in found.measured
        if of_model.selected is None
    ]
    if images.left_out:
        lines.append(f"{images.left_out:,} further images were not read (--max-images).")
    if not images.skipped:
        return bullets(lines)
    title = f"{len(images.skipped)} images could not be read"
    rows = [list(skipped) for skipped in images.skipped]
    unread = TextTable(title=title, header=["file", "reason"], rows=rows, text_columns=2)
    return bullets(lines) + _table(unread)
