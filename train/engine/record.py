"""With what a run was made: versions, commit, device; one entry for every start of the run."""

import platform
from pathlib import Path
from typing import Any

import torch

import tcpa
from tcpa import provenance

from ...cli import UsageError
from ..storage import read_json
from .distributed import World
from .folder import ENVIRONMENT, brief, differences

PACKAGES = ("torch", "timm", "triton", "torchvision", "numpy", "safetensors")


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
            f"{folder} to begin anew"
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
