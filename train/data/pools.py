"""Where images come from: files of a folder, or one array of a file; lists of them with classes."""

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image

from ...cli import UsageError
from .annotations import unusable

UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for files that are no images, are cut off or altered."""


ImagesProgress = Callable[[int, int], None]
"""Called with the images done and all images."""


class Pool(Protocol):
    """Images in a fixed order, each with a name that a person can find it by."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def key(self, index: int) -> str:
        """Return the image's name within the dataset, the same on every machine."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height, pixels, without decoding where that is possible."""
        ...

    def load(self, index: int) -> Image.Image:
        """Decode an image as RGB."""
        ...

    def stamps(self) -> list[str]:
        """Return, for every image, a text that changes when its file does."""
        ...


def inside(folder: Path, relative: str, listed_in: Path) -> str:
    """Return a file name of a list as it is, unless it would lead out of the dataset's folder.

    Raises:
        UsageError: the name is absolute, has a `..`, or is empty.
    """
    parts = PurePosixPath(relative.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or not parts.parts or ":" in parts.parts[0]:
        raise UsageError(
            f"{listed_in}: got the file name {relative!r}, expected a name inside {folder}; fetch "
            "the list again"
        )
    return str(parts)


@dataclass(frozen=True, slots=True)
class _Remedies:
    missing: str
    broken: str


_FETCHED = _Remedies("unpack its archive again", "fetch it again")
_OWN = _Remedies("put it back, or run the command again without it", "replace or remove it")


class FilePool:
    """Image files under a folder.

    Args:
        folder: where the files are.
        names: their names relative to it, in order, as `inside` lets through.
        own: whether nobody but the user has them, so that they cannot be fetched again.
    """

    def __init__(self, folder: Path, names: Sequence[str], *, own: bool = False) -> None:
        self.folder, self.names = folder, tuple(names)
        self._remedies = _OWN if own else _FETCHED

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def key(self, index: int) -> str:
        return self.names[index]

    def size(self, index: int) -> tuple[int, int]:
        with self._opened(self.folder / self.names[index]) as picture:
            return picture.size

    def load(self, index: int) -> Image.Image:
        """Decode a file as RGB; UsageError names one that is missing, no image or cut off."""
        path = self.folder / self.names[index]
        with self._opened(path) as picture:
            try:
                return picture.convert("RGB")
            except UNREADABLE as error:
                raise self._unreadable(path, error) from None

    def _opened(self, path: Path) -> Image.Image:
        try:
            return Image.open(path)
        except FileNotFoundError:
            raise UsageError(
                f"{path}: got no such file, expected an image that the dataset lists; "
                f"{self._remedies.missing}"
            ) from None
        except UNREADABLE as error:
            raise self._unreadable(path, error) from None

    def _unreadable(self, path: Path, error: Exception) -> UsageError:
        return UsageError(
            f"{path}: got a file that cannot be decoded ({error}), expected a whole image; "
            f"{self._remedies.broken}"
        )

    def stamps(self) -> list[str]:
        """Return name, bytes and time of change of every file; UsageError if one is missing."""
        found, missing = [], []
        for name in self.names:
            try:
                status = os.stat(self.folder / name)
            except OSError:
                missing.append(self.folder / name)
                continue
            found.append(f"{name}:{status.st_size}:{status.st_mtime_ns}")
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UsageError(
                f"{missing[0]}{more}: got no such file, expected the {len(self.names):,} images "
                f"that the dataset lists; {self._remedies.missing}"
            )
        return found


class ArrayPool:
    """Images of one size that files hold together.

    Args:
        files: the files read, for messages and to notice a change.
        read: returns uint8 `[N, H, W, 3]`; it is called in each process that needs pixels.
        count: N.
        side: H and W, pixels.
    """

    def __init__(
        self, files: Sequence[Path], read: Callable[[], np.ndarray], count: int, side: int = 32
    ) -> None:
        self.files, self._read, self._count, self._side = tuple(files), read, count, side

    def __len__(self) -> int:
        return self._count

    @cached_property
    def pixels(self) -> np.ndarray:
        """All images, uint8 `[N, H, W, 3]`."""
        pixels = self._read()
        if len(pixels) != self._count:
            raise UsageError(
                f"{', '.join(map(str, self.files))}: got {len(pixels):,} images and "
                f"{self._count:,} labels, expected as many of one as of the other; fetch it again"
            )
        return pixels

    def __getstate__(self) -> dict:
        """Leave the pixels out: another process reads them itself."""
        return {key: value for key, value in self.__dict__.items() if key != "pixels"}

    def name(self, index: int) -> str:
        return f"image {index} of {', '.join(map(str, self.files))}"

    def key(self, index: int) -> str:
        return str(index)

    def size(self, index: int) -> tuple[int, int]:
        return self._side, self._side

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def stamps(self) -> list[str]:
        """Return the position of every image with bytes and time of change of all files."""
        states = [os.stat(path) for path in self.files]
        common = ",".join(f"{status.st_size}:{status.st_mtime_ns}" for status in states)
        return [f"{index}:{common}" for index in range(self._count)]


def fingerprint(texts: Sequence[str]) -> str:
    """Return a short hash of texts in order, 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


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
