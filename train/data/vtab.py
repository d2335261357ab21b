"""Read a task of VTAB-1k: four lists of `path label`, and whether its images are the originals.

The folder that circulates was written by saving decoded images as JPEG once more. Results on such
copies are not comparable with published ones, so every run records what it read.
"""

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ...cli import UsageError
from .annotations import read_lines, unusable
from .listing import Listing
from .pools import UNREADABLE, FilePool, inside
from .vtab_tasks import LISTS, VTABTask

Labels = dict[str, int]
"""Image name -> class."""


def read_vtab(folder: Path, task: VTABTask) -> Listing:
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


def _read_list(folder: Path, file: str, task: VTABTask) -> Labels:
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


Kind = Literal["original", "jpeg", "unclear"]
Stated = Literal["auto", "original", "jpeg"]

SAMPLE = 64
"""Files of a pool that are looked at, evenly spread; only their headers are read."""

LOSSY = ("JPEG", "MPO", "WEBP")
"""Pillow's names of formats that lose something."""


@dataclass(frozen=True, slots=True)
class SourceKind:
    """What the images of a pool are."""

    kind: Kind
    """original: as published. jpeg: lossy copies. unclear: JPEG files of a task whose originals
    are JPEG files too."""

    reason: str


def source_kind(pool: FilePool, task: VTABTask, stated: Stated = "auto") -> SourceKind:
    """Tell by file formats what the images are, or take what the user states.

    Args:
        pool: images of the task.
        task: says whether its originals are lossless.
        stated: "auto" looks at the files; those that cannot be opened are left to who reads them.

    Raises:
        UsageError: "original" was stated of lossy files of a task whose originals are lossless.
    """
    rows = np.unique(np.linspace(0, len(pool) - 1, SAMPLE).astype(int)).tolist()
    headers = {row: found for row in rows if (found := _header(Path(pool.name(row))))}
    lossy = [row for row, (form, _) in headers.items() if form in LOSSY]
    if lossy and task.lossless and stated == "original":
        raise UsageError(
            f"--vtab-source: got original, expected jpeg or auto, as {pool.name(lossy[0])} is a "
            f"lossy file and the originals of {task.title} are lossless; leave it out"
        )
    if stated != "auto":
        return SourceKind(stated, "stated by --vtab-source")
    if not headers:
        return SourceKind("unclear", "no file could be opened")
    looked = f"of {len(headers)} files looked at"
    if not lossy:
        return SourceKind("original", f"none {looked} is lossy")
    if task.lossless:
        return SourceKind("jpeg", f"{len(lossy)} {looked} are lossy, the originals are not")
    tables = {table for _, table in headers.values()}
    if len(tables) > 1:
        return SourceKind("original", f"{len(tables)} compression settings in {len(headers)} files")
    if tables == {_default_tables()}:
        return SourceKind("jpeg", f"all {looked} are compressed as Pillow does by default")
    return SourceKind("unclear", f"all {looked} are compressed alike, as originals may be")


def _header(path: Path) -> tuple[str, tuple] | None:
    """Return a file's format and, of a JPEG file, the tables that say how it was compressed."""
    try:
        with Image.open(path) as picture:
            return picture.format or "", _tables(getattr(picture, "quantization", {}))
    except UNREADABLE:
        return None


def _tables(found: dict[int, list[int]]) -> tuple:
    return tuple((number, tuple(values)) for number, values in sorted(found.items()))


@functools.cache
def _default_tables() -> tuple:
    """Return the tables that Pillow compresses with unless it is told otherwise."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    with Image.open(stream) as picture:
        return _tables(getattr(picture, "quantization", {}))
