"""An unfinished cache: the file of pixels, and a journal of the chunks that are on the disk."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from pathlib import Path

from ...cli import UsageError
from ..files import write_synced
from .cache import ABOUT, PIXELS, hash_range
from .decoding import Chunk, decode
from .pools import Pool

JOURNAL = "journal.jsonl"

Progress = Callable[[int, int], None]
"""Called with the images done and all images."""


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
    progress: Progress | None,
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
