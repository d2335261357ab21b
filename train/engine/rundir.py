"""The folder of one run: one process at a time, always with the same configuration, weights and
images; with what it was made, one entry for every start."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import tcpa
from tcpa import provenance

from ...cli import UsageError, output_folder
from ..storage import cannot_write, read_json
from .distributed import World

try:
    import fcntl
except ModuleNotFoundError:  # Not on Windows; two runs in one folder go unnoticed there.
    fcntl = None

CONFIG = "config.json"
RESULT = "result.json"
ENVIRONMENT = "environment.json"
LOCK = ".lock"
ADAPTER = "adapter"
METRICS = "metrics.jsonl"
BOARD = "tensorboard"
LOG = "log.txt"
"""What a run of a sweep prints."""

PACKAGES = ("torch", "timm", "triton", "torchvision", "numpy", "safetensors")

LONG = 80
"""Letters of a value that a message shows."""


@contextmanager
def claim(folder: Path, description: dict[str, Any]) -> Iterator[None]:
    """Hold a run's folder; make it if it is not there.

    A start that fails before there is anything to go on with leaves nothing behind.

    Args:
        folder: of the run.
        description: what decides the result, see `RunSpec.describe`.

    Raises:
        UsageError: another process holds it, it belongs to another configuration, or it cannot be
            written.
    """
    with _held(folder):
        _require_same(folder, description)
        try:
            yield
        except BaseException:
            _clear(folder)
            raise


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder until the end, however that comes."""
    path = folder / LOCK
    while True:
        with output_folder(folder):
            lock = path.open("ab")
        with lock:
            _lock(lock, folder)
            # Who held it before may have removed the file; a lock on that one holds nothing.
            if _is_at(lock, path):
                yield
                return


def _is_at(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(lock: Any, folder: Path) -> None:
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


def _require_same(folder: Path, description: dict[str, Any]) -> None:
    """Compare a description with that of the run that is there, if there is one."""
    path, saved = folder / CONFIG, saved_description(folder)
    changed = differences(saved, description) if saved is not None else []
    if changed:
        name, before, now = changed[0]
        others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UsageError(
            f"{name}: got {brief(now)}, expected {brief(before)} as in {path}{others}; repeat the "
            "first command to resume that run, or choose another --output"
        )


def _clear(folder: Path) -> None:
    """Remove what a start wrote, unless a step is saved or written down."""
    metrics = folder / METRICS
    begun = (folder / RESULT).exists() or any(folder.glob("checkpoint*"))
    if begun or (metrics.exists() and metrics.stat().st_size):
        return
    with suppress(OSError):
        shutil.rmtree(folder / BOARD, ignore_errors=True)
        for name in (ENVIRONMENT, CONFIG, METRICS, LOCK):
            (folder / name).unlink(missing_ok=True)
        # OUTPUT/DATASET/METHOD/NAME; other runs keep theirs.
        for path in (folder, *folder.parents[:2]):
            path.rmdir()


def saved_description(folder: Path) -> dict[str, Any] | None:
    """Return the description with which a run began; None if it has not begun.

    Raises:
        UsageError: it has begun, and its description is missing or damaged.
    """
    if not any((folder / name).exists() for name in (ENVIRONMENT, RESULT)):
        return None
    path = folder / CONFIG
    found = read_json(path)
    if not isinstance(found, dict):
        got = "no such file" if found is None else f"a JSON {type(found).__name__}"
        raise UsageError(
            f"{path}: got {got}, expected the configuration with which the run began; restore it, "
            f"or delete {folder} to restart"
        )
    return found


def last_log_line(folder: Path) -> str:
    """Return the last line with words of a run's log, "" for none; a frame's border has none."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line for line in reversed(lines) if any(map(str.isalnum, line))), "").strip()


def brief(value: Any) -> str:
    """Return a value for a message, cut where it is long."""
    text = str(value)
    return text if len(text) <= LONG else f"{text[:LONG]} ..."


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


def describe_environment(world: World) -> dict[str, Any]:
    """Return versions, commit and device of this process, as JSON data."""
    return {
        "date": provenance.now(),
        "versions": versions(),
        "commit": provenance.commit(),
        "changed": provenance.has_changes(),
        "system": provenance.system(),
        "device": _device(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
    }


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of the environment record, one a start.

    Raises:
        UsageError: it is damaged.
    """
    path = folder / ENVIRONMENT
    found = read_json(path)
    if found is None:
        return []
    # What later starts are compared with, see `_inputs`.
    usable = isinstance(found, list) and found and isinstance(found[0], dict)
    usable = usable and all(isinstance(found[0].get(name), dict) for name in ("backbone", "data"))
    if not usable:
        raise UsageError(
            f"{path}: got {brief(found)}, expected an entry for every start; restore it, or delete "
            f"{folder} to restart"
        )
    return found


def require_same_inputs(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise UsageError unless weights and images are those with which a run began.

    Args:
        before, now: entries of the environment record.
        folder: of the run.
    """
    changed = differences(_inputs(before), _inputs(now))
    if changed:
        name, old, new = changed[0]
        raise UsageError(
            f"{name}: got {brief(new)}, expected {brief(old)}, as when the run in {folder} began; "
            "restore those weights and images, or choose another --output"
        )


def _inputs(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what tells weights and images apart; how a cache lays them out does not matter."""
    data = {
        name: {key: value for key, value in split.items() if key != "cache"}
        | {"key": (split.get("cache") or {}).get("key")}
        for name, split in entry["data"].items()
        if isinstance(split, dict)
    }
    return {"backbone": entry["backbone"].get("fingerprint"), "data": data}


def versions() -> dict[str, str]:
    """Return the versions of Python, of this library and of what it computes with."""
    found = {name: provenance.version(name) for name in PACKAGES}
    known = {name: version for name, version in found.items() if version}
    return {"python": platform.python_version(), "tcpa": tcpa.__version__, **known}


def _device(device: torch.device) -> str:
    kind = "" if device.type == "cuda" else f" ({device.type})"
    return f"{provenance.device_name(device)}{kind}"
