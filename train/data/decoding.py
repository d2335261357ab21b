"""Decode chunks of a pool into an unfinished cache, in this process or in several.

A journal says which chunks are on the disk, so that a build resumes where a killed one stopped.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...cli import UsageError
from ..storage import write_synced
from .cache import ABOUT, PIXELS, hash_range
from .pools import ImagesProgress, Pool

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
    if workers is None:
        images = sum(chunk.stop - chunk.start for chunk in chunks)
        workers = min(usable_cores(), MAX_WORKERS, images // IMAGES_PER_WORKER)
    if workers < 2:
        for chunk in chunks:
            outcome: Future = Future()
            try:
                outcome.set_result(_fill(pool, resize, path, chunk))
            except Exception as error:
                outcome.set_exception(error)
            yield chunk, outcome
            if outcome.exception():
                return
        return
    # Threads of torch may hold locks: a fresh process inherits none of them.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start_worker, (pool,))
    try:
        futures = [executor.submit(_fill_of_worker, resize, path, chunk) for chunk in chunks]
        for number, (chunk, future) in enumerate(zip(chunks, futures, strict=True)):
            if future.exception():
                waiting = zip(chunks[number:], futures[number:], strict=True)
                yield from [pair for pair in waiting if not pair[1].cancel()]
                return
            yield chunk, future
    finally:
        # After an interruption nothing further is begun.
        executor.shutdown(cancel_futures=True)


def resized_size(width: int, height: int, resize: int) -> tuple[int, int]:
    """Return width and height once the shorter side has `resize` pixels, as torchvision rounds."""
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def resized(picture: Image.Image, resize: int) -> Image.Image:
    """Scale the shorter side to `resize` as torchvision's Resize does."""
    return picture.resize(resized_size(*picture.size, resize), Image.Resampling.BILINEAR)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_pool: Pool
"""Of a worker, which gets it once and not with every task."""


def _start_worker(pool: Pool) -> None:
    # Ctrl-C reaches every process of a terminal; the one that hands out the work ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    global _pool
    _pool = pool


def _fill_of_worker(resize: int | None, path: Path, chunk: Chunk) -> str:
    return _fill(_pool, resize, path, chunk)


def _fill(pool: Pool, resize: int | None, path: Path, chunk: Chunk) -> str:
    """Decode a chunk into its place and return its checksum."""
    parts = []
    for index in range(chunk.start, chunk.stop):
        picture = pool.load(index)
        picture = picture if resize is None else resized(picture, resize)
        parts.append(np.asarray(picture).transpose(2, 0, 1).reshape(-1))
    data = np.concatenate(parts)
    if data.nbytes != chunk.bytes:
        raise UsageError(
            f"{pool.name(chunk.start)} to {pool.name(chunk.stop - 1)}: got images of other sizes "
            "than a moment ago, expected files that stay as they are; start again"
        )
    with path.open("r+b") as stream:
        stream.seek(chunk.offset)
        stream.write(data.data)
        stream.flush()
        os.fsync(stream.fileno())
    return hashlib.sha256(data.data).hexdigest()


JOURNAL = "journal.jsonl"


def take_over(target: Path, staging: Path, chunks: list[Chunk]) -> None:
    """Make an unfinished build of a damaged cache, in which the parts that are whole count.

    Its pixels are mended in their place: who has them mapped sees the right ones.
    """
    try:
        parts = json.loads((target / ABOUT).read_bytes())["chunks"]
        known = {(part["offset"], part["bytes"]): part["sha256"] for part in parts}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    lines = [
        json.dumps({"key": chunk.key, "sha256": known[chunk.offset, chunk.bytes]})
        for chunk in chunks
        if (chunk.offset, chunk.bytes) in known
    ]
    write_synced(target / JOURNAL, "".join(f"{line}\n" for line in lines).encode())
    # What is there was begun for other states of the images.
    shutil.rmtree(staging, ignore_errors=True)
    os.replace(target, staging)


def reserve(path: Path, size: int) -> None:
    """Take the whole space at once, so that a full disk shows before the work."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(handle, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
    finally:
        os.close(handle)


def decoded(staging: Path, chunks: list[Chunk]) -> dict[str, str]:
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


def decode_rest(
    pool: Pool,
    resize: int | None,
    staging: Path,
    chunks: list[Chunk],
    done: dict[str, str],
    workers: int | None,
    progress: ImagesProgress | None,
) -> None:
    """Decode chunks into the file, and note each one once it is on the disk."""
    images = sum(chunk.stop - chunk.start for chunk in chunks)
    finished = len(pool) - images
    failure: BaseException | None = None
    with ExitStack() as stack:
        journal = stack.enter_context((staging / JOURNAL).open("a", encoding="utf-8"))
        # A line that a kill cut off must not swallow the next.
        journal.write("\n")
        outcomes = stack.enter_context(
            closing(decode(pool, resize, staging / PIXELS, chunks, workers))
        )
        for chunk, outcome in outcomes:
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
