"""Checkpoints: one safetensors file with tensors, JSON and a checksum over both; never a pickle.

A run's folder holds the last checkpoint and the one before it. At any moment at least one of them
is whole: a new one is written beside them, flushed, and only then takes its place.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from tcpa.adapter_format import checksum

from ...cli import UsageError
from ..storage import write_whole

CURRENT = "checkpoint.safetensors"
PREVIOUS = "checkpoint-previous.safetensors"
FORMAT = "tcpa-checkpoint"
VERSION = "1"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was saved."""

    tensors: dict[str, Tensor]
    """On the CPU."""
    state: dict[str, Any]
    """JSON data."""


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint; the last one becomes the previous one.

    Args:
        folder: the run's folder.
        tensors: any dtypes, on any device.
        state: JSON data without NaN.

    Raises:
        UsageError: it could not be written; both earlier checkpoints are as they were.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(state, allow_nan=False, sort_keys=True)
    digest = checksum(plain, text)
    header = {"format": FORMAT, "version": VERSION, "state": text, "sha256": digest}
    write_whole(folder / CURRENT, to_bytes(plain, header), keep=folder / PREVIOUS)


def load_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest whole checkpoint, None where none was ever written, and warnings.

    Raises:
        UsageError: there are checkpoints, and none is whole.
    """
    problems: list[str] = []
    for name in (CURRENT, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        found = read_checkpoint(path)
        if isinstance(found, Checkpoint):
            return found, [f"{problem}; the one before it is used" for problem in problems]
        problems.append(found)
    if problems:
        raise UsageError(
            f"{'; '.join(problems)}; no whole checkpoint is left. Restore one, or delete "
            f"{folder} to begin anew"
        )
    return None, []


def read_checkpoint(path: Path) -> Checkpoint | str:
    """Return a checkpoint, or what is wrong with its file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return f"{path} is damaged ({error})"
    if header.get("format") != FORMAT:
        return f"{path} is no checkpoint of tcpa"
    if header.get("version") != VERSION:
        return f"{path} has format {header.get('version')}, expected {VERSION} (upgrade tcpa)"
    text = header.get("state", "")
    if checksum(tensors, text) != header.get("sha256"):
        return f"{path} was altered (its checksum differs)"
    return Checkpoint(tensors, json.loads(text))
