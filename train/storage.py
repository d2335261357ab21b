"""Files that last: written beside their place, flushed to disk, moved into it."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..cli import UsageError


def write_whole(path: Path, data: bytes, *, keep: Path | None = None) -> None:
    """Replace a file by `data`, or leave it as it was.

    Args:
        path: file to write. One process at a time may do so.
        data: its content.
        keep: where the earlier file goes; it is lost without.

    Raises:
        UsageError: the disk is full, or the folder cannot be written.
    """
    try:
        replace_file(path, data, keep=keep)
    except OSError as error:
        raise cannot_write(path, error) from None


def replace_file(path: Path, data: bytes, *, keep: Path | None = None) -> None:
    """Do what `write_whole` does; raises OSError."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        write_synced(temporary, data)
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as readable JSON; see `write_whole`."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; None if there is no file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: cannot be read ({error}); restore it, or delete the run's folder to begin "
            "anew"
        ) from None


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where the system can do that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> UsageError:
    """Say that a file in a run's folder could not be written, and what is left."""
    saved = any(path.parent.glob("checkpoint*.safetensors"))
    resumes = "resumes from the last checkpoint" if saved else "restarts: nothing was saved yet"
    return UsageError(
        f"{path} could not be written ({error.strerror}); what was there before is unchanged. Make "
        f"room or choose another --output, then run the same command again: it {resumes}"
    )


@contextmanager
def disk_errors(path: Path, content: str, option: str = "--data") -> Iterator[None]:
    """Tell of a full or read-only disk in one line.

    Args:
        path: what was being written.
        content: what it was to hold.
        option: the option that chooses another folder.
    """
    try:
        yield
    except BrokenPipeError:
        # The reader of the progress is gone.
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        expected = f"room for {content}" if full else f"a folder for {content} to be written to"
        remedy = f"{'make room or ' * full}choose another folder with {option}"
        raise UsageError(
            f"{path}: got an error of the disk ({error.strerror or error}), expected {expected}; "
            f"{remedy}, what is done is kept"
        ) from None
