"""What a reader returns: the images of a dataset with their classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .annotations import unusable
from .pools import FilePool, Pool


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


Labelled = dict[str, list[tuple[str, Any]]]
"""train and test -> image names, each with its class as the dataset has it."""


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


def list_files(
    folder: Path,
    images: Labelled,
    source: Path,
    *,
    key: Callable[[Any], Any] | None = None,
    titles: Callable[[Any], str] = str,
    own: bool = False,
    **more,
) -> Listing:
    """List image files; the classes are those of the training images in the order of `key`.

    Args:
        folder, own: as for `FilePool`.
        source: the file that has the labels of the test images, for errors.
        titles: class -> its name.
        more: further fields.
    """
    names = {part: [name for name, _ in images[part]] for part in images}
    values = {part: [value for _, value in images[part]] for part in images}
    used = sorted(set(values["train"]), key=key)
    classes = {value: label for label, value in enumerate(used)}
    return Listing(
        pools={part: FilePool(folder, names[part], own=own) for part in names},
        labels={
            part: index_labels(values[part], classes, names[part].__getitem__, source)
            for part in names
        },
        class_names=[titles(value) for value in used],
        **more,
    )


def train_then_val(train: int, total: int) -> dict[str, np.ndarray]:
    """Return the rows of train and val, where val follows train in one pool."""
    return {"train": np.arange(train), "val": np.arange(train, total)}
