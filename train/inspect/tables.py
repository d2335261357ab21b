"""The tables of an inspection's page."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .drawings import DIVERSITY
from .measure import Inspection, Selected

NONE = "\N{EN DASH}"

MODELS_NOTE = (
    "Trained values: prompts, head and whatever else is not frozen. Accuracy, where it is known, "
    "is that of the run on its test images, or of the demo on all its test images."
)
SELECTION_NOTE = (
    "Entropy: of an entry drawn from all selections of the image pool, of the first choices alone, "
    "and of the selections of the CLS pool; its largest possible value is the base-2 logarithm of "
    "the entries. Dead: entries that no token of these images sees. Overlap: mean Jaccard index."
)
SEPARATION_NOTE = (
    "All in the full feature space, not on the maps. Silhouette with Euclidean distance, -1 to 1; "
    "k-NN: images whose class is that of most of their nearest neighbours, leave-one-out; variance "
    "ratio: between the classes, divided by within. Higher is better for all three."
)


@dataclass(frozen=True, slots=True)
class Table:
    """A table; every cell is a text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    texts: tuple[int, ...] = (0,)
    """Columns that hold no numbers."""


def models_table(found: Inspection) -> Table:
    """Say what is compared."""
    rows = [
        [
            subject.name,
            f"{subject.model.num_trainable:,}" if of_model.name != "no prompt" else "0",
            NONE if subject.accuracy is None else f"{subject.accuracy:.1f}",
            subject.source,
        ]
        for subject, of_model in zip(found.subjects, found.measured, strict=True)
    ]
    header = ["model", "trained values", "accuracy, %", "from"]
    return Table(f"What is compared, on {found.backbone}", header, rows, (0, 3))


def selection_table(selected: Selected) -> Table:
    """Give entropy, dead entries and overlap of every block."""
    cls_entries, entries = selected.found.num_pool
    limit, cls_limit = (f"{math.log2(n):.2f}" if n else NONE for n in (entries, cls_entries))
    header = [
        "block",
        f"entropy, bits (of {limit})",
        "of first choices, bits",
        f"dead of {entries}",
        f"CLS entropy, bits (of {cls_limit})",
        f"CLS dead of {cls_entries}",
        "overlap of neighbours",
        "of any two patches",
        "by chance",
    ]
    image, cls, overlap = selected.image, selected.cls, selected.overlap
    rows = [
        [
            str(block + 1),
            f"{image.entropy[block]:.2f}",
            f"{image.first_entropy[block]:.2f}",
            f"{image.dead[block]}",
            f"{cls.entropy[block]:.2f}",
            f"{cls.dead[block]}",
            f"{overlap.neighbours[block]:.3f}",
            f"{overlap.pairs[block]:.3f}",
            f"{overlap.chance:.3f}",
        ]
        for block in range(len(image.dead))
    ]
    return Table("Selections by block", header, rows)


def separation_table(found: Inspection) -> Table:
    """Compare how well classes are separated."""
    rows = []
    for of_model in found.measured:
        values = of_model.separation
        assert values is not None
        rows.append(
            [
                of_model.name,
                f"{values.silhouette:.3f}",
                f"{values.knn_accuracy:.1f}",
                f"{values.variance_ratio:.3f}",
            ]
        )
    first = found.measured[0].separation
    assert first is not None
    near = first.neighbours
    header = ["model", "silhouette", f"{near}-NN accuracy, %", "variance ratio"]
    title = f"Separation of {first.classes} classes, {first.points:,} images"
    return Table(title, header, rows)


def no_separation(found: Inspection) -> str:
    """Say why there are no figures about classes."""
    if found.images.labels is None:
        return (
            "Class separation does not apply: the images have no classes. Put them into a folder "
            "per class."
        )
    return "Class separation does not apply: too few images, or all of one class."


def diversity_tables(found: Inspection) -> Iterator[Table]:
    """Give mean and standard deviation of each figure of diversity, a row per block."""
    for name, (title, ylabel) in DIVERSITY.items():
        columns = [getattr(of_model.diversity, name) for of_model in found.measured]
        rows = [
            [str(block + 1)]
            + [f"{values[block].mean():.2f} \N{PLUS-MINUS SIGN} {values[block].std():.2f}"
               for values in columns]
            for block in range(len(columns[0]))
        ]  # fmt: skip
        header = ["block", *(of_model.name for of_model in found.measured)]
        yield Table(f"{title} ({ylabel})", header, rows)


def diversity_note(found: Inspection) -> str:
    """Explain the tables."""
    return (
        f"Mean and standard deviation over {found.diversity_images} images. Prompts add columns to "
        "the attention matrix, which alone can raise its rank; the rank of the tokens has the same "
        "bound for all models."
    )


def skipped_table(found: Inspection) -> Table:
    """List the images that could not be read."""
    rows = [[name, reason] for name, reason in found.images.skipped]
    return Table(f"{len(rows)} images could not be read", ["file", "reason"], rows, (0, 1))
