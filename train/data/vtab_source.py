"""Whether the images of a VTAB-1k task are the originals or lossy copies of them.

The folder that circulates was written by saving decoded images as JPEG once more. Results on such
copies are not comparable with published ones, so every run records what it read.
"""

import functools
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ...cli import UsageError
from .pools import UNREADABLE, FilePool
from .vtab_tasks import Task

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

    def to_json(self) -> dict[str, str]:
        """Return what a run records."""
        return asdict(self)


def source_kind(pool: FilePool, task: Task, stated: Stated = "auto") -> SourceKind:
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
