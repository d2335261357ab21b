"""A pool of images decoded and resized once: bytes in one file that processes map and share.

A finished cache is a folder with `pixels.bin` (image after image, each uint8 `[3, h, w]`),
`index.safetensors` (where each lies and its size), `cache.json` (settings and checksums) and
`verified.json` (state of the file of pixels when its checksums were last compared: as long as that
is its state, opening it is quick). It appears in one step; `building.py` makes it.

Pools of small images (CIFAR, SVHN, GTSRB) are kept as they are and enlarged crop by crop, to the
same pixels: CIFAR at 256 pixels would take 11.8 GB instead of 0.2.
"""

import contextlib
import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from torch import Tensor

from ...cli import UsageError
from ..storage import write_synced

FORMAT = 1
"""Number of the layout; a cache of another is rebuilt."""

RESIZE = 256
"""Shorter side of the official code, pixels."""

PIXELS, INDEX, ABOUT = "pixels.bin", "index.safetensors", "cache.json"
VERIFIED = "verified.json"


class DamagedCache(UsageError):
    """A cache is not as it was written."""

    def __init__(self, path: Path, got: str) -> None:
        self.what = f"{path}: got {got}, expected the cache as it was built"
        super().__init__(f"{self.what}; remove the folder {path.parent} and it is rebuilt")


@dataclass(frozen=True, slots=True)
class Cache:
    """Images `[3, h, w]` of several sizes, one after another."""

    folder: Path
    pixels: Tensor
    """uint8 `[bytes]`, mapped from the file: read it only, it is shared."""

    offsets: np.ndarray
    """Where each image begins, int64 `[N]`."""

    heights: np.ndarray
    widths: np.ndarray
    """As they are kept, int64 `[N]`, pixels."""

    scaled_heights: np.ndarray
    scaled_widths: np.ndarray
    """Once the shorter side has `resize`, int64 `[N]`, pixels."""

    about: dict[str, Any]
    """Settings, checksums and the key of the source."""

    @property
    def resize(self) -> int:
        """Shorter side of every image that is handed out, pixels."""
        return self.about["resize"]

    @property
    def small(self) -> bool:
        """Whether images are kept as they are and have to be enlarged."""
        return self.about["small"]

    def __len__(self) -> int:
        return len(self.offsets)

    def image(self, index: int) -> np.ndarray:
        """Return one image with its shorter side of `resize` pixels, uint8 `[3, H, W]`."""
        height, width = int(self.heights[index]), int(self.widths[index])
        start = int(self.offsets[index])
        image = self.pixels[start : start + 3 * height * width].view(3, height, width).numpy()
        size = int(self.scaled_widths[index]), int(self.scaled_heights[index])
        if size == (width, height):
            return image
        planes = [Image.fromarray(p).resize(size, Image.Resampling.BILINEAR) for p in image]
        return np.stack([np.asarray(plane) for plane in planes])

    @property
    def verified(self) -> bool:
        """Whether the file of pixels is untouched since its checksums were last compared."""
        try:
            recorded = json.loads((self.folder / VERIFIED).read_bytes())
            return recorded == _state(self.folder)
        except (OSError, ValueError):
            return False

    def check(self) -> None:
        """Read everything, compare the checksums, and note that they were right.

        Raises:
            DamagedCache: bytes have changed; names the file and the places.
        """
        path = self.folder / PIXELS
        before = _state(self.folder)
        with ThreadPoolExecutor() as threads:
            found = list(threads.map(lambda part: _same(path, part), self.about["chunks"]))
        wrong = [part for part, same in zip(self.about["chunks"], found, strict=True) if not same]
        if wrong:
            start, end = wrong[0]["offset"], wrong[0]["offset"] + wrong[0]["bytes"]
            more = f" and in {len(wrong) - 1} more places" if len(wrong) > 1 else ""
            raise DamagedCache(
                path, f"other bytes between {start:,} and {end:,}{more} than were written"
            )
        if before == _state(self.folder):
            note_verified(self.folder)


def _state(folder: Path) -> dict[str, int]:
    """Return what changes when somebody writes to the pixels, a copy of other bytes included."""
    status = (folder / PIXELS).stat()
    return {
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "changed_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def note_verified(folder: Path) -> None:
    """Record that the pixels are right as they are now; a read-only cache is checked each time."""
    temporary = folder / f".{VERIFIED}.{os.getpid()}"
    with contextlib.suppress(OSError):
        write_synced(temporary, json.dumps(_state(folder)).encode())
        os.replace(temporary, folder / VERIFIED)


def _same(path: Path, part: dict[str, Any]) -> bool:
    """Tell whether a part of the pixels has its checksum; what cannot be read has not."""
    try:
        with path.open("rb") as stream:
            stream.seek(part["offset"])
            return hash_range(stream, part["bytes"]) == part["sha256"]
    except OSError:
        return False


def hash_range(stream, count: int) -> str:
    """Return the SHA-256 of the next bytes of a stream."""
    digest = hashlib.sha256()
    while count > 0 and (block := stream.read(min(count, 1 << 22))):
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()


def _covers(chunks: list[dict[str, Any]], size: int) -> bool:
    """Tell whether parts that have checksums follow one another through the whole file."""
    end = 0
    for part in chunks:
        if part["offset"] != end or not isinstance(part["sha256"], str):
            return False
        end += part["bytes"]
    return end == size


def open_cache(folder: Path) -> Cache:
    """Map a finished cache.

    Raises:
        DamagedCache: a file is missing or altered; names it. Pixels are only counted: see
            `Cache.verified` and `Cache.check`.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        index_bytes = (folder / INDEX).read_bytes()
        size = (folder / PIXELS).stat().st_size
        same = hashlib.sha256(index_bytes).hexdigest() == about["index_sha256"]
        index = load_safetensors(index_bytes)
        kept = (index["offsets"], index["heights"], index["widths"])
        scaled = (index["scaled_heights"], index["scaled_widths"])
        expected = about["bytes"]
        # Only images that are kept small have other sizes than those handed out.
        enlarged = not np.array_equal(kept[1:], scaled)
        fits = about["small"] is enlarged and _covers(about["chunks"], expected)
        fits &= folder.name.endswith(f"-{about['resize']}-{about['key']}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DamagedCache(folder / ABOUT, f"a cache that cannot be read ({reason})") from None
    if not same:
        raise DamagedCache(folder / INDEX, "another checksum")
    if not fits:
        raise DamagedCache(folder / ABOUT, "settings that are not those of the cache")
    if size != expected:
        raise DamagedCache(folder / PIXELS, f"{size:,} bytes instead of {expected:,}")
    mapped = np.memmap(folder / PIXELS, np.uint8, "r")
    with warnings.catch_warnings():
        # The map is read-only on purpose, and nothing here writes to it.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        pixels = torch.from_numpy(mapped)
    return Cache(folder, pixels, *kept, *scaled, about)
