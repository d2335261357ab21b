"""Files that are never half there: written beside their place, flushed to disk, moved into it."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ...cli import UsageError


def write_whole(path: Path, data: bytes, *, keep: Path | None = None) -> None:
    """Replace a file by `data`, or leave it as it was.

    Args:
        path: file to write. One process at a time may do so.
        data: its content.
        keep: where the earlier file goes; it is lost without.

    Raises:
        UsageError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from None


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
    """Say that a file of a run could not be written, and what is left."""
    return UsageError(
        f"{path} could not be written ({error.strerror}); what was there before is unchanged. Make "
        "room or choose another --output, then run the same command again: it goes on from the "
        "last checkpoint"
    )
