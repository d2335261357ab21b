"""What a reader returns: the images of a dataset with their classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .files import unusable
from .pools import Pool


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What a folder holds.

    `pools["train"]` has the official training images, val among them, `pools["test"]` the test
    images; `labels` their int64 classes `[N]`.
    """

    pools: dict[str, Pool]
    labels: dict[str, np.ndarray]
    class_names: list[str]
    given: dict[str, np.ndarray] = field(default_factory=dict)
    """Split -> its rows of the pool, where the dataset itself or VPT's files say so."""

    official_labels: dict[str, np.ndarray] = field(default_factory=dict)
    """Split -> labels of those rows as the official code numbers them, where that differs."""

    groups: list[str] | None = None
    """For each training image, what it must not be torn apart from."""

    from_vpt: bool = False
    """Whether VPT's split files were there."""


def index_labels(
    values: Sequence, classes: dict, names: Callable[[int], str], listed_in: Path
) -> np.ndarray:
    """Map class ids to 0..C - 1.

    Raises:
        UsageError: an id that is no class; names the image and the file that says so.
    """
    labels = np.empty(len(values), np.int64)
    for index, value in enumerate(values):
        if value not in classes:
            raise unusable(
                listed_in,
                f"the label {value!r} for {names(index)}",
                f"one of the {len(classes)} classes of the dataset",
            )
        labels[index] = classes[value]
    return labels
