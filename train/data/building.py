"""Build a cache: several processes, one builder at a time, going on where a killed one stopped."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors.numpy import save as save_safetensors

from ...cli import UsageError
from ..files import disk_errors, sync_folder, write_synced
from .cache import (
    ABOUT,
    FORMAT,
    INDEX,
    PIXELS,
    RESIZE,
    Cache,
    hash_range,
    keep_small,
    open_cache,
    planes,
    resized,
    resized_size,
)
from .pools import Pool, fingerprint

CHUNK = 256
"""Images that one task decodes: about 50 MB, what a kill can cost each process."""

JOURNAL = "journal.jsonl"
MAX_WORKERS = 16
IMAGES_PER_WORKER = 1000
"""A process takes seconds to start; fewer images are decoded faster without one more."""

Progress = Callable[[int, int], None]
"""Called with the images done and all images."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Images start..stop - 1, their place in the file, and a key of what they are made from."""

    start: int
    stop: int
    offset: int
    bytes: int
    key: str


def build_cache(
    pool: Pool,
    folder: Path,
    label: str,
    *,
    resize: int = RESIZE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Return the cache of a pool, building it if it is not there.

    Args:
        pool: the images.
        folder: where caches are; this one gets a folder `label`-`resize`-KEY in it, where KEY
            depends on names, sizes and times of change of the files.
        label: what to call it.
        resize: shorter side, pixels.
        workers: processes; None: one for 1000 images, at most one for each core and 16.
        progress: see `Progress`.

    Raises:
        UsageError: an image is missing or broken, or the disk is full; names the file. Chunks
            already decoded are kept, and the next call goes on from there.
    """
    if resize < 1:
        raise UsageError(f"resize: got {resize}, expected pixels, 1 or more; 256 is the default")
    stamps = pool.stamps()
    key = fingerprint([f"format {FORMAT}, resize {resize}", *stamps])
    target = folder / f"{label}-{resize}-{key}"
    if target.exists():
        return open_cache(target)
    staging = folder / f"{label}-{resize}.building"
    with disk_errors(staging, "the cache"):
        folder.mkdir(parents=True, exist_ok=True)
        # The lock ends with its process, however that ends.
        with FileLock(folder / f"{label}-{resize}.lock"):
            if not target.exists():
                _build(pool, stamps, staging, target, key, resize, workers, progress)
    return open_cache(target)


def _build(
    pool: Pool,
    stamps: list[str],
    staging: Path,
    target: Path,
    key: str,
    resize: int,
    workers: int | None,
    progress: Progress | None,
) -> None:
    staging.mkdir(exist_ok=True)
    with ThreadPoolExecutor(8) as threads:
        sizes = list(threads.map(pool.size, range(len(pool))))
    scaled = np.array([resized_size(*size, resize) for size in sizes], np.int64)
    small = keep_small(np.array(sizes), scaled)
    kept = np.array(sizes, np.int64) if small else scaled
    ends = np.cumsum(3 * kept.prod(1))
    offsets = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    total = int(ends[-1])
    chunks = [
        Chunk(
            start,
            stop := min(start + CHUNK, len(pool)),
            int(offsets[start]),
            int(ends[stop - 1] - offsets[start]),
            fingerprint([str(offsets[start]), *stamps[start:stop], *map(str, kept[start:stop])]),
        )
        for start in range(0, len(pool), CHUNK)
    ]
    _reserve(staging / PIXELS, total)
    done = _decoded(staging, chunks)
    left = [chunk for chunk in chunks if chunk.key not in done]
    _decode(pool, None if small else resize, staging, left, done, workers, progress)
    index = save_safetensors(
        # safetensors writes the memory of an array, whatever its strides.
        {
            "offsets": offsets,
            "widths": kept[:, 0].copy(),
            "heights": kept[:, 1].copy(),
            "scaled_widths": scaled[:, 0].copy(),
            "scaled_heights": scaled[:, 1].copy(),
        }
    )
    about = {
        "format": FORMAT,
        "resize": resize,
        "small": small,
        "interpolation": "Pillow bilinear, antialiased",
        "layout": "uint8 [3, h, w], image after image",
        "key": key,
        "images": len(pool),
        "bytes": total,
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "chunks": [
            {"offset": chunk.offset, "bytes": chunk.bytes, "sha256": done[chunk.key]}
            for chunk in chunks
        ],
    }
    write_synced(staging / INDEX, index)
    write_synced(staging / ABOUT, json.dumps(about, indent=1).encode())
    (staging / JOURNAL).unlink()
    os.replace(staging, target)
    sync_folder(target.parent)


def _reserve(path: Path, size: int) -> None:
    """Take the whole space at once, so that a full disk shows before the work."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(handle, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
    finally:
        os.close(handle)


def _decoded(staging: Path, chunks: list[Chunk]) -> dict[str, str]:
    """Return key -> checksum of the chunks that an earlier build finished and that are whole."""
    try:
        lines = (staging / JOURNAL).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    written: dict[str, str] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            # The line that a kill cut off; its chunk is decoded again.
            continue
        written[entry["key"]] = entry["sha256"]
    done = {}
    with (staging / PIXELS).open("rb") as stream:
        for chunk in chunks:
            if chunk.key in written:
                stream.seek(chunk.offset)
                if hash_range(stream, chunk.bytes) == written[chunk.key]:
                    done[chunk.key] = written[chunk.key]
    return done


def _decode(
    pool: Pool,
    resize: int | None,
    staging: Path,
    chunks: list[Chunk],
    done: dict[str, str],
    workers: int | None,
    progress: Progress | None,
) -> None:
    """Decode chunks into the file, and note each one once it is on the disk."""
    images = sum(chunk.stop - chunk.start for chunk in chunks)
    finished = len(pool) - images
    failure: BaseException | None = None
    with (staging / JOURNAL).open("a", encoding="utf-8") as journal:
        # A line that a kill cut off must not swallow the next.
        journal.write("\n")
        for chunk, outcome in _outcomes(pool, resize, staging / PIXELS, chunks, images, workers):
            try:
                done[chunk.key] = outcome.result()
            except BrokenProcessPool:
                failure = failure or UsageError(
                    f"{staging}: a process that decoded images was ended from outside, perhaps for "
                    "lack of memory; start again with fewer workers, what is decoded is kept"
                )
                continue
            except Exception as error:
                # Others may finish; the first mistake is told once they have.
                failure = failure or error
                continue
            journal.write(json.dumps({"key": chunk.key, "sha256": done[chunk.key]}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
            finished += chunk.stop - chunk.start
            if progress:
                progress(finished, len(pool))
    if failure:
        raise failure


def _outcomes(
    pool: Pool,
    resize: int | None,
    path: Path,
    chunks: list[Chunk],
    images: int,
    workers: int | None,
) -> Iterator[tuple[Chunk, Future]]:
    """Decode chunks in processes, or here when one is enough; yield them in order.

    After the first failure no further chunk is begun.
    """
    count = _worker_count(images) if workers is None else workers
    if count < 2:
        _open_pool(pool)
        for chunk in chunks:
            outcome: Future = Future()
            try:
                outcome.set_result(_fill(resize, path, chunk))
            except Exception as error:
                outcome.set_exception(error)
            yield chunk, outcome
            if outcome.exception():
                return
        return
    # Threads of torch may hold locks: a fresh process inherits none of them.
    context = multiprocessing.get_context("spawn")
    executor: Executor = ProcessPoolExecutor(count, context, _open_pool, (pool,))
    with executor:
        futures = [executor.submit(_fill, resize, path, chunk) for chunk in chunks]
        for number, (chunk, future) in enumerate(zip(chunks, futures, strict=True)):
            if future.exception():
                waiting = zip(chunks[number:], futures[number:], strict=True)
                kept = [pair for pair in waiting if not pair[1].cancel()]
                yield from kept
                return
            yield chunk, future


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _worker_count(images: int) -> int:
    return max(1, min(usable_cores(), MAX_WORKERS, images // IMAGES_PER_WORKER))


_pool: Pool


def _open_pool(pool: Pool) -> None:
    """Give a process the pool once, not with every task."""
    global _pool
    _pool = pool


def _fill(resize: int | None, path: Path, chunk: Chunk) -> str:
    """Decode a chunk into its place and return its checksum."""
    parts = []
    for index in range(chunk.start, chunk.stop):
        picture = _pool.load(index)
        picture = picture if resize is None else resized(picture, resize)
        parts.append(planes(picture).reshape(-1))
    data = np.concatenate(parts)
    if data.nbytes != chunk.bytes:
        raise UsageError(
            f"{_pool.name(chunk.start)} to {_pool.name(chunk.stop - 1)}: got images of other sizes "
            "than a moment ago, expected files that stay as they are; start again"
        )
    with path.open("r+b") as stream:
        stream.seek(chunk.offset)
        stream.write(data.data)
        stream.flush()
        os.fsync(stream.fileno())
    return hashlib.sha256(data.data).hexdigest()


def describe(cache: Cache) -> dict[str, Any]:
    """Return what a run should record of its cache."""
    kept = ("format", "resize", "small", "interpolation", "key", "images", "bytes", "index_sha256")
    return {name: cache.about[name] for name in kept}
