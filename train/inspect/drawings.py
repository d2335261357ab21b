"""The figures of an inspection: each a PNG file, some as SVG in the page, with what they say."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tcpa import inspect
from tcpa.inspect.style import Drawing, finish

from .measure import Inspection, ModelSelection

DIVERSITY = {
    "attention_rank": ("Effective rank of attention", "effective rank, rows"),
    "attention_entropy": ("Entropy of attention", "entropy of a row, bits"),
    "feature_rank": ("Effective rank of tokens", "effective rank, tokens"),
    "feature_entropy": ("Entropy of token spectrum", "entropy, bits"),
}
MEANT = {
    "attention_rank": "exp of the entropy of the normalised singular values of the attention "
    "matrix (all tokens over tokens and prompts, gate included), mean over heads",
    "attention_entropy": "entropy of the attention rows, each normalised to sum 1, mean over "
    "tokens and heads; higher is more spread out",
    "feature_rank": "exp of the entropy of the normalised singular values of the tokens after the "
    "block, minus their mean",
    "feature_entropy": "base-2 logarithm of that rank",
}


def selection_drawings(found: Inspection, name: str, selected: ModelSelection) -> Iterator[Drawing]:
    """Draw the selection maps of the shown images, for the PNG files."""
    entries = selected.found.num_pool[1]
    for number, place in enumerate(found.shown):
        for block, orders in enumerate(selected.found.image):
            figure = inspect.draw_selection(
                found.images.pictures[place],
                orders[place],
                selected.found.grid,
                entries,
                title=f"Block {block + 1}: first choice of every patch",
            )
            about = f"selection {name} image {number + 1} block {block + 1}"
            yield finish(figure, about, vector=False)


def usage_drawings(found: Inspection, name: str, selected: ModelSelection) -> Iterator[Drawing]:
    """Draw how often the entries of both pools are selected."""
    images = len(found.images.names)
    pools: tuple[tuple[inspect.Pool, str], ...] = (("image", "patches"), ("cls", "class tokens"))
    for pool, what in pools:
        counted = selected.image if pool == "image" else selected.cls
        order, entries = selected.found.entries(pool)
        if not entries or not order.size:
            continue
        if pool == "cls" and order.shape[2] > 1:
            what = "prefix tokens"
        block, entry = np.unravel_index(counted.seen.argmax(), counted.seen.shape)
        dead = int(counted.dead.sum())
        caption = (
            f"Share of the {what} of {images:,} images that see each of the {entries} entries; "
            f"a row sums to {order.shape[-1]} x 100 %. Entry {entry} in block {block + 1} is seen "
            f"most, by {100 * counted.seen[block, entry]:.0f} %; "
            f"{dead} of all {counted.seen.size} are never seen (0)."
        )
        title = f"{'Image' if pool == 'image' else 'CLS'} pool: {what} that see an entry"
        figure = inspect.draw_usage(counted.seen, title=title)
        yield finish(figure, f"usage {name} {pool} pool", caption, vector=False)


def pair_drawings(name: str, selected: ModelSelection) -> Iterator[Drawing]:
    """Draw how alike patches select, and how the selections came about where that is known."""
    measured = selected.overlap
    blocks = list(range(1, len(measured.neighbours) + 1))
    lines = [
        inspect.Series("neighbours", blocks, list(measured.neighbours)),
        inspect.Series("any two patches", blocks, list(measured.pairs)),
        inspect.Series("by chance", blocks, [measured.chance] * len(blocks)),
    ]
    caption = (
        "Jaccard index of the selections of two patches of an image (1: the same entries): patches "
        f"that share a side have {measured.neighbours.mean():.2f} on average, any two "
        f"{measured.pairs.mean():.2f}, and independent random choices would have "
        f"{measured.chance:.2f}."
    )
    labels: dict[str, Any] = {"xlabel": "block", "ylabel": "Jaccard index, no unit"}
    figure = inspect.draw_lines(lines, title="Overlap of selections", **labels)
    yield finish(figure, f"overlap {name}", caption)
    if not selected.changes:
        return
    replaced = np.array([change.replaced for change in selected.changes])
    epochs = selected.epochs[:-1]
    lines = [
        inspect.Series(f"block {block + 1}", epochs, 100 * values)
        for block, values in enumerate(replaced.T)
    ]
    caption = (
        "Share of a patch's selected entries that are others at the end, after epoch "
        f"{selected.epochs[-1]:g}: {100 * replaced[0].mean():.0f} % after epoch {epochs[0]:g}, "
        f"{100 * replaced[-1].mean():.0f} % after epoch {epochs[-1]:g}, mean over the blocks."
    )
    labels: dict[str, Any] = {"xlabel": "epoch", "ylabel": "entries that are others at the end, %"}
    figure = inspect.draw_lines(lines, title="Change of the selections", **labels)
    yield finish(figure, f"change {name}", caption)


def attention_rows(found: Inspection) -> Iterator[tuple[int, str, str, list[Drawing]]]:
    """Draw attention: for each shown image and query a row of maps and one of surfaces.

    Yields:
        Number of the image, its heading, the caption and the drawings, one per model.
    """
    heads = "mean over the heads" if found.head is None else f"head {found.head + 1}"
    for number, place in enumerate(found.shown):
        picture = found.images.pictures[place]
        for query in found.queries:
            chosen = {}
            for of_model in found.measured:
                index = of_model.maps.queries.index(query.token)
                chosen[of_model.name] = of_model.maps.patches()[found.block, number, 0, index]
            limit = max(float(weights.max()) for weights in chosen.values())
            peaks = ", ".join(
                f"{name} in row {row}, column {column} ({100 * weights[row, column]:.1f} %)"
                for name, weights in chosen.items()
                for row, column in [np.unravel_index(weights.argmax(), weights.shape)]
            )
            sums = ", ".join(f"{name} {100 * float(w.sum()):.0f} %" for name, w in chosen.items())
            caption = (
                f"Where the {query.name} looks in block {found.block + 1}, {heads}, all on one "
                f"scale. Largest: {peaks}. All patches together: {sums}; the rest goes to the "
                "class token and the prompts, or to prompts that are hidden from it."
            )
            base = f"attention image {number + 1} {query.name}"
            grid = found.measured[0].maps.grid
            seen = inspect.draw_image(picture, grid, title=found.images.names[place][-40:])
            maps, surfaces = [finish(seen, f"image {number + 1}", vector=False)], []
            for name, weights in chosen.items():
                title = f"{name}: {query.name}"
                drawn = inspect.draw_attention(
                    picture, weights, title=title, limit=limit, query=query.place
                )
                maps.append(finish(drawn, f"{base} {name} 2d", vector=False))
                drawn = inspect.draw_attention_surface(weights, title=title, limit=limit)
                surfaces.append(finish(drawn, f"{base} {name} 3d", vector=False))
            yield number, f"{query.name[0].upper()}{query.name[1:]}", caption, maps
            yield number, "", "The same as surfaces over the patches.", surfaces


def shares_drawing(found: Inspection) -> Drawing:
    """Draw how much attention prompts get."""
    who = found.queries[0].name if found.queries[0].place is None else "first drawn patch"
    blocks = list(range(1, len(found.measured[0].shares) + 1))
    lines = [
        inspect.Series(of_model.name, blocks, list(100 * of_model.shares[:, 2]))
        for of_model in found.measured
    ]
    told = ", ".join(f"{line.name} {np.mean(line.y):.1f} %" for line in lines)
    caption = (
        f"Share of the attention of the {who} that goes to prompts it sees, mean over the shown "
        f"images and heads; over all blocks: {told}."
    )
    figure = inspect.draw_lines(
        lines, xlabel="block", ylabel="attention on prompts, %", title="Attention on prompts"
    )
    return finish(figure, "attention on prompts", caption)


def feature_drawings(found: Inspection) -> Iterator[Drawing]:
    """Draw the map of the features of every model."""
    for of_model in found.measured:
        if of_model.map2d is None:
            continue
        labels, names = found.images.labels, found.images.class_names
        figure = inspect.draw_points(
            of_model.map2d, labels, names, title=f"{of_model.name}: t-SNE of the features"
        )
        separated, told = of_model.separation, ""
        if separated is not None:
            told = (
                f" In the full feature space {separated.knn_accuracy:.1f} % of the images have "
                f"the class of most of their {separated.neighbours} nearest neighbours."
            )
        caption = (
            f"{of_model.name}: what the head reads of {len(of_model.map2d):,} images, mapped to "
            f"the plane (seed {found.seed}); near points are near in the feature space, "
            f"far ones say little.{told}"
        )
        yield finish(figure, f"features {of_model.name}", caption, vector=len(names) <= 20)


def diversity_drawings(found: Inspection) -> Iterator[Drawing]:
    """Draw rank and entropy of attention and tokens over the blocks."""
    for name, (title, ylabel) in DIVERSITY.items():
        lines = []
        for of_model in found.measured:
            values = getattr(of_model.diversity, name)
            blocks = list(range(1, len(values) + 1))
            mean, spread = list(values.mean(axis=1)), list(values.std(axis=1))
            lines.append(inspect.Series(of_model.name, blocks, mean, spread))
        told = ", ".join(f"{line.name} {line.y[-1]:.2f}" for line in lines)
        caption = (
            f"Last block: {told}. {MEANT[name][0].upper()}{MEANT[name][1:]}. Line and band: mean "
            f"and standard deviation over {found.diversity_images} images."
        )
        figure = inspect.draw_lines(lines, xlabel="block", ylabel=ylabel, title=title)
        yield finish(figure, name.replace("_", " "), caption)
