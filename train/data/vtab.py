"""Read a task of VTAB-1k: four lists of `path label`, paths relative to the task's folder."""

from pathlib import Path

import numpy as np

from .files import read_lines, unusable
from .listing import Listing
from .pools import FilePool, inside
from .vtab_tasks import LISTS, Task

Labels = dict[str, int]
"""Image name -> class."""


def read_vtab(folder: Path, task: Task) -> Listing:
    """Read the lists of a task.

    Counts are not looked at here: `verify` compares them, and a run records whether they are whole.

    Args:
        folder: of the task, with `train800.txt`, `val200.txt`, `train800val200.txt`, `test.txt`.
        task: says how many classes there are.

    Returns:
        Pool "train" with the images of `train800val200.txt` in the order of that file, pool "test"
        with those of `test.txt`.

    Raises:
        UsageError: a list is missing; a line is no path and class; a path leads out of the folder,
            a class is unknown, or an image is listed twice; train800.txt and val200.txt are not
            train800val200.txt; names list and line.
    """
    found = {split: _read_list(folder, file, task) for split, file in LISTS.items()}
    _require_apart(folder, found["val"], "val", found["train"], "train")
    _require_same(folder, found["train"] | found["val"], found["trainval"])
    _require_apart(folder, found["test"], "test", found["trainval"], "trainval")
    names = {"train": list(found["trainval"]), "test": list(found["test"])}
    where = {name: row for row, name in enumerate(names["train"])}
    return Listing(
        pools={part: FilePool(folder, names[part]) for part in names},
        labels={
            "train": np.fromiter(found["trainval"].values(), np.int64),
            "test": np.fromiter(found["test"].values(), np.int64),
        },
        class_names=[str(label) for label in range(task.classes)],
        given={
            split: np.fromiter((where[name] for name in found[split]), np.int64)
            for split in ("train", "val")
        },
    )


def _read_list(folder: Path, file: str, task: Task) -> Labels:
    path, expected = folder / file, "lines of an image's path and its class"
    labels: Labels = {}
    for number, line in enumerate(read_lines(path, expected), start=1):
        place = f"line {number}: {line!r}"
        # A path may have spaces; the class is the last word.
        words = line.rsplit(maxsplit=1)
        if len(words) != 2:
            raise unusable(path, place, expected)
        name, text = inside(folder, words[0].strip(), path), words[1]
        if not (text.isascii() and text.isdecimal() and int(text) < task.classes):
            classes = f"a class from 0 to {task.classes - 1} at its end"
            raise unusable(path, place, f"{classes}, as {task.title} has {task.classes}")
        if name in labels:
            raise unusable(path, f"{place}, an image that is listed above", "each image once")
        labels[name] = int(text)
    if not labels:
        raise unusable(path, "no line", expected)
    return labels


def _require_apart(folder: Path, one: Labels, first: str, other: Labels, second: str) -> None:
    shared = one.keys() & other.keys()
    if shared:
        got = f"{min(shared)!r}, which is in {LISTS[second]} too"
        raise unusable(folder / LISTS[first], got, "each image in one of the two")


def _require_same(folder: Path, parts: Labels, whole: Labels) -> None:
    """Raise UsageError unless the 1,000 images are the 800 and the 200."""
    different = parts.items() ^ whole.items()
    if different:
        name, label = min(different)
        there, elsewhere = (
            (LISTS["trainval"], f"{LISTS['train']} and {LISTS['val']}")
            if whole.get(name) == label
            else (f"{LISTS['train']} or {LISTS['val']}", LISTS["trainval"])
        )
        raise unusable(
            folder / LISTS["trainval"],
            f"{name!r} with class {label} in {there} but not in {elsewhere}",
            "the images of train800.txt and val200.txt with the same classes",
        )
