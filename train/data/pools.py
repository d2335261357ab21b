"""Where images come from: files of a folder, or one array of a file; lists of them with classes."""

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from ...cli import UsageError

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
        self._side: int | None = None

    def squashed(self, side: int) -> "FilePool":
        """Return a pool whose images a cache of the same side hands out as squares.

        Bilinear without antialiasing and without regard to the aspect ratio, as TensorFlow's
        `image.resize`, rounded to 8 bits. Square images that are no larger stay as they are: the
        cache enlarges them, to the same pixels but for the rounding, and is many times smaller.
        """
        pool = copy(self)
        pool._side = side
        return pool

    def _square(self, width: int, height: int) -> int | None:
        """Return the side of the square that an image is to become; None if it stays."""
        return None if self._side is None or width == height <= self._side else self._side

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def key(self, index: int) -> str:
        return self.names[index]

    def size(self, index: int) -> tuple[int, int]:
        with self._opened(self.folder / self.names[index]) as picture:
            size = picture.size
        side = self._square(*size)
        return (side, side) if side else size

    def load(self, index: int) -> Image.Image:
        """Decode a file as RGB; UsageError names one that is missing, no image or cut off."""
        path = self.folder / self.names[index]
        with self._opened(path) as picture:
            try:
                picture = picture.convert("RGB")
            except UNREADABLE as error:
                raise self._unreadable(path, error) from None
        side = self._square(*picture.size)
        return squash(picture, side) if side else picture

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
        squashed = "" if self._side is None else ":squashed"
        found, missing = [], []
        for name in self.names:
            try:
                status = os.stat(self.folder / name)
            except OSError:
                missing.append(self.folder / name)
                continue
            found.append(f"{name}:{status.st_size}:{status.st_mtime_ns}{squashed}")
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UsageError(
                f"{missing[0]}{more}: got no such file, expected the {len(self.names):,} images "
                f"that the dataset lists; {self._remedies.missing}"
            )
        return found


def squash(picture: Image.Image, side: int) -> Image.Image:
    """Resize an RGB image to `side` x `side` pixels, bilinear without antialiasing."""
    planes = torch.from_numpy(np.array(picture).transpose(2, 0, 1))
    # torchvision declares more than it takes; it rounds to 8 bits.
    resize: Any = transforms.resize
    squashed = resize(planes, [side, side], InterpolationMode.BILINEAR, antialias=False)
    return Image.fromarray(squashed.permute(1, 2, 0).numpy())


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
