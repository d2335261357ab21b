"""The folder of one run: one process at a time, always with the same configuration."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...cli import UsageError
from ..files import cannot_write, read_json, write_json

try:
    import fcntl
except ModuleNotFoundError:  # Not on Windows; two runs in one folder go unnoticed there.
    fcntl = None

CONFIG = "config.json"
RESULT = "result.json"
ENVIRONMENT = "environment.json"
LOCK = ".lock"
ADAPTER = "adapter"


@contextmanager
def claim(folder: Path, description: dict[str, Any]) -> Iterator[None]:
    """Hold a run's folder; make it if it is not there.

    Args:
        folder: of the run.
        description: what decides the result, see `engine.settings.describe`.

    Raises:
        UsageError: another process holds it, it belongs to another configuration, or it cannot be
            written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("ab")
    except OSError as error:
        raise UsageError(
            f"--output: got {folder}, expected a folder that can be written ({error.strerror}); "
            "choose another"
        ) from None
    with lock:
        _hold(lock, folder)
        _check_description(folder, description)
        yield


def _hold(lock: Any, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        # Released by the system when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"--output: {folder} is in use by another process, which trains the same run; wait for "
            "it, or choose another folder"
        ) from None
    except OSError as error:
        raise cannot_write(folder / LOCK, error) from None


def _check_description(folder: Path, description: dict[str, Any]) -> None:
    """Write the description of a new run, or compare it with that of the run that is there."""
    path, saved = folder / CONFIG, saved_description(folder)
    if saved is None:
        write_json(path, description)
        return
    changed = differences(saved, description)
    if changed:
        name, before, now = changed[0]
        others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UsageError(
            f"{name}: got {now}, expected {before} as in {path}{others}; repeat the first command "
            "to go on with that run, or choose another --output"
        )


def saved_description(folder: Path) -> Any:
    """Return the description with which a run began; None if it has not begun.

    A start that failed before the first step, on a missing file for instance, binds nobody.
    """
    if (folder / ENVIRONMENT).exists() or (folder / RESULT).exists():
        return read_json(folder / CONFIG)
    return None


def differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Return what differs between two pieces of JSON data: path, earlier and present value."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in sorted(before.keys() | now.keys())
            for found in differences(
                before.get(key), now.get(key), f"{name}.{key}" if name else key
            )
        ]
    # JSON has no tuples.
    same = before == now or (isinstance(now, tuple) and before == list(now))
    return [] if same else [(name, before, now)]
