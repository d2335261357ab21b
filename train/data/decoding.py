"""Decode chunks of a pool into the file of a cache, in this process or in several."""

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...cli import UsageError
from .cache import planes, resized
from .pools import Pool

MAX_WORKERS = 16
IMAGES_PER_WORKER = 1000
"""A process takes seconds to start; fewer images are decoded faster without one more."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Images start..stop - 1, their place in the file, and a key of what they are made from."""

    start: int
    stop: int
    offset: int
    bytes: int
    key: str


def decode(
    pool: Pool, resize: int | None, path: Path, chunks: list[Chunk], workers: int | None
) -> Generator[tuple[Chunk, Future]]:
    """Decode chunks in processes, or here when one is enough; yield them in order.

    After the first failure no further chunk is begun.

    Args:
        pool: the images.
        resize: shorter side, pixels; None keeps the images as they are.
        path: the file of pixels, of its full size.
        chunks: what to decode.
        workers: processes; None: one for 1000 images, at most one for each core and 16.

    Returns:
        Each chunk with the outcome: its checksum, or the error.
    """
    images = sum(chunk.stop - chunk.start for chunk in chunks)
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
    executor = ProcessPoolExecutor(count, context, _start_worker, (pool,))
    try:
        futures = [executor.submit(_fill, resize, path, chunk) for chunk in chunks]
        for number, (chunk, future) in enumerate(zip(chunks, futures, strict=True)):
            if future.exception():
                waiting = zip(chunks[number:], futures[number:], strict=True)
                kept = [pair for pair in waiting if not pair[1].cancel()]
                yield from kept
                return
            yield chunk, future
    finally:
        # After an interruption nothing further is begun.
        executor.shutdown(cancel_futures=True)


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


def _start_worker(pool: Pool) -> None:
    # Ctrl-C reaches every process of a terminal; the one that hands out the work ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _open_pool(pool)


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
