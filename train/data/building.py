"""Build a cache: several processes, one builder at a time, resumed where a killed one stopped."""

import hashlib
import json
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from safetensors.numpy import save as save_safetensors

from ...cli import UsageError
from ..storage import disk_errors, sync_folder, write_synced
from .cache import (
    ABOUT,
    FORMAT,
    INDEX,
    PIXELS,
    RESIZE,
    Cache,
    DamagedCache,
    note_verified,
    open_cache,
)
from .decoding import JOURNAL, Chunk, decode_rest, decoded, reserve, resized_size, take_over
from .pools import ImagesProgress, Pool, fingerprint

CHUNK = 256
"""Images that one task decodes: about 50 MB, what a kill can cost each process."""

ENLARGE_FROM = 4
"""Images are kept small if enlarging them would make the cache so many times larger."""


def cache_key(stamps: list[str], resize: int) -> str:
    """Return what the name of a cache ends in: it changes with the files of the images."""
    return fingerprint([f"format {FORMAT}, resize {resize}", *stamps])


def build_cache(
    pool: Pool,
    folder: Path,
    label: str,
    *,
    resize: int = RESIZE,
    workers: int | None = None,
    progress: ImagesProgress | None = None,
) -> Cache:
    """Return the cache of a pool, building it if it is not there.

    A cache whose pixels were touched since they were last compared with their checksums is
    compared again; what is damaged is told and decoded again.

    Args:
        pool: the images.
        folder: where caches are; this one gets a folder `label`-`resize`-KEY in it, where KEY
            depends on names, sizes and times of change of the files.
        label: what to call it.
        resize: shorter side, pixels.
        workers: see `decode`.
        progress: see `ImagesProgress`.

    Raises:
        UsageError: an image is missing or broken, or the disk is full; names the file. Chunks
            already decoded are kept, and the next call resumes there.
    """
    if resize < 1:
        raise UsageError(f"resize: got {resize}, expected pixels, 1 or more; 256 is the default")
    stamps = pool.stamps()
    target = folder / f"{label}-{resize}-{cache_key(stamps, resize)}"
    found = _open_verified(target)
    if found is not None:
        return found
    if target.exists() and not os.access(folder, os.W_OK):
        # Somebody else's cache, for reading only.
        found = open_cache(target)
        found.check()
        return found
    staging = folder / f"{label}-{resize}.building"
    with disk_errors(staging, "the cache", "--cache"):
        folder.mkdir(parents=True, exist_ok=True)
        # The lock ends with its process, however that ends.
        with FileLock(folder / f"{label}-{resize}.lock"):
            # Another process may have built or compared it meanwhile.
            found = _open_verified(target) or _open_checked(target)
            if found is None:
                _Build(pool, stamps, resize, staging, target).carry_out(workers, progress)
                _tell_replaced(target)
    return found or open_cache(target)


def _open_verified(target: Path) -> Cache | None:
    try:
        cache = open_cache(target)
    except DamagedCache:
        return None
    return cache if cache.verified else None


def _open_checked(target: Path) -> Cache | None:
    """Return a cache once its checksums are compared; None if it is not there or damaged."""
    if not target.exists():
        return None
    try:
        cache = open_cache(target)
        cache.check()
    except DamagedCache as error:
        _warn(f"{error.what}; what is damaged is decoded again")
        return None
    return cache


def _tell_replaced(target: Path) -> None:
    """Tell of caches of the same images as they were before; somebody may still read them."""
    prefix = target.name.rpartition("-")[0]
    others = sorted(path for path in target.parent.glob(f"{prefix}-*") if path != target)
    if others:
        total = sum(file.stat().st_size for path in others for file in path.glob("*"))
        command = shlex.join(["rm", "-r", *map(str, others)])
        _warn(
            f"{target.parent} also holds {total / 1e9:.2f} GB decoded from other states of these "
            f"images; unless a run still reads them, free the room: {command}"
        )


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class _Build:
    """One cache to be made."""

    pool: Pool
    stamps: list[str]
    resize: int
    staging: Path
    target: Path

    def carry_out(self, workers: int | None, progress: ImagesProgress | None) -> None:
        # Widths and heights before and after, int64 [N, 2], pixels.
        with ThreadPoolExecutor(8) as threads:
            sizes = np.array(list(threads.map(self.pool.size, range(len(self.pool)))), np.int64)
        scaled = np.array([resized_size(w, h, self.resize) for w, h in sizes.tolist()], np.int64)
        # Kept as they are if no image shrinks and that saves much.
        growth = scaled.prod(1).sum() / sizes.prod(1).sum()
        small = bool((scaled >= sizes).all() and growth >= ENLARGE_FROM)
        kept = sizes if small else scaled
        chunks = self._chunks(kept)
        if self.target.exists():
            take_over(self.target, self.staging, chunks)
        self.staging.mkdir(exist_ok=True)
        reserve(self.staging / PIXELS, chunks[-1].offset + chunks[-1].bytes)
        done = decoded(self.staging, chunks)
        left = [chunk for chunk in chunks if chunk.key not in done]
        resize = None if small else self.resize
        decode_rest(self.pool, resize, self.staging, left, done, workers, progress)
        self._finish([(chunk, done[chunk.key]) for chunk in chunks], kept, scaled, small)

    def _chunks(self, kept: np.ndarray) -> list[Chunk]:
        bounds = np.concatenate([[0], np.cumsum(3 * kept.prod(1))]).tolist()
        chunks = []
        for start in range(0, len(self.pool), CHUNK):
            stop = min(start + CHUNK, len(self.pool))
            texts = [str(bounds[start]), *self.stamps[start:stop], *map(str, kept[start:stop])]
            size = bounds[stop] - bounds[start]
            chunks.append(Chunk(start, stop, bounds[start], size, fingerprint(texts)))
        return chunks

    def _finish(
        self, chunks: list[tuple[Chunk, str]], kept: np.ndarray, scaled: np.ndarray, small: bool
    ) -> None:
        """Write index and checksums, and give the cache its name."""
        sizes = 3 * kept.prod(1)
        index = save_safetensors(
            # safetensors writes the memory of an array, whatever its strides.
            {
                "offsets": np.cumsum(sizes) - sizes,
                "widths": kept[:, 0].copy(),
                "heights": kept[:, 1].copy(),
                "scaled_widths": scaled[:, 0].copy(),
                "scaled_heights": scaled[:, 1].copy(),
            }
        )
        about = {
            "format": FORMAT,
            "resize": self.resize,
            "small": small,
            "interpolation": "Pillow bilinear, antialiased",
            "layout": "uint8 [3, h, w], image after image",
            "key": self.target.name.rpartition("-")[2],
            "images": len(self.pool),
            "bytes": int(sizes.sum()),
            "index_sha256": hashlib.sha256(index).hexdigest(),
            "chunks": [
                {"offset": chunk.offset, "bytes": chunk.bytes, "sha256": checksum}
                for chunk, checksum in chunks
            ],
        }
        write_synced(self.staging / INDEX, index)
        write_synced(self.staging / ABOUT, json.dumps(about, indent=1).encode())
        (self.staging / JOURNAL).unlink()
        # Every chunk was compared or has just been written.
        note_verified(self.staging)
        os.replace(self.staging, self.target)
        sync_folder(self.target.parent)
