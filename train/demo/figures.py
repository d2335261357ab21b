"""The demo's pictures: training curves, and which prompts the patches select."""

import numpy as np
from matplotlib.figure import Figure

from tcpa.inspect.style import COLOURS, styled

from .training import DemoEpoch


@styled
def draw_curves(records: list[DemoEpoch]) -> Figure:
    """Draw loss and test accuracy against epochs, one colour a method, one thin line a seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, test = figure.subplots(1, 2)
    methods = list(dict.fromkeys(record.method for record in records))
    seeds = list(dict.fromkeys(record.seed for record in records))
    for method, colour in zip(methods, COLOURS, strict=False):
        for seed in seeds:
            run = [r for r in records if (r.method, r.seed) == (method, seed)]
            label = method if seed == seeds[0] else None
            loss.plot([r.epoch for r in run], [r.loss for r in run], color=colour, label=label)
            tested = [r for r in run if r.test_accuracy is not None]
            accuracies = [r.test_accuracy for r in tested]
            test.plot([r.epoch for r in tested], accuracies, "o-", color=colour, label=label)
    loss.set(xlabel="epoch", ylabel="training loss (with the match term)")
    test.set(xlabel="epoch", ylabel="test accuracy, %")
    for axes in (loss, test):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True)
        for line in axes.lines:
            line.set(linewidth=1, markersize=3)
    test.legend(loc="lower right")
    figure.suptitle(f"Training on the digits; one line per seed ({len(seeds)})")
    return figure


def most_varied_block(visible: list[np.ndarray]) -> int:
    """Return the block, from 0, where the patches of an image differ most in what they see.

    Args:
        visible: bool `[B, L_patch, R]` for every block.
    """
    return int(np.argmax([block.var(axis=1).mean() for block in visible]))


@styled
def draw_selection(images: np.ndarray, captions: list[str], gates: list[np.ndarray]) -> Figure:
    """Draw which entries of the image pool every patch selected, in the most varied block.

    Args:
        images: float `[B, S, S]`, values in [0, 1].
        captions: B short texts.
        gates: bool `[B, L_patch, R]` for every block: patch l of an image sees entry r.
    """
    # Not the last block: after it the head reads the class token only, so what its patches see
    # changes nothing.
    block = most_varied_block(gates[:-1])
    visible = gates[block]
    count, patches, entries = visible.shape
    side, size = int(patches**0.5), images.shape[-1]
    masks = visible.transpose(0, 2, 1).reshape(count, entries, side, side)
    masks = masks.repeat(size // side, axis=2).repeat(size // side, axis=3)
    figure = Figure(figsize=(1.05 * (entries + 1), 1.12 * count + 0.9), layout="constrained")
    grid = figure.subplots(count, entries + 1, squeeze=False)
    for row, image, caption, selected in zip(grid, images, captions, masks, strict=True):
        row[0].imshow(image, cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(caption)
        for axes, mask in zip(row[1:], selected, strict=True):
            axes.imshow(_tint(image, mask))
    grid[0, 0].set_title("image")
    for entry, axes in enumerate(grid[0, 1:]):
        axes.set_title(f"prompt {entry}")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    top_k = int(visible[0, 0].sum())
    figure.suptitle(
        f"Prompts that each of the {patches} patches selected in block {block + 1} of "
        f"{len(gates)}: orange = this patch sees this prompt ({top_k} of {entries} each)"
    )
    return figure


def _tint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Colour the grey image `[S, S]` orange where the mask holds: RGB `[S, S, 3]`."""
    grey = np.repeat(image[..., None], 3, axis=2)
    orange = 0.45 * grey + 0.55 * np.array([1.0, 0.55, 0.1])
    return np.where(mask[..., None], orange, 0.75 * grey)
