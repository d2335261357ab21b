"""What a run writes on its way: checkpoints, and metrics.

A checkpoint is one safetensors file with tensors, JSON and a checksum over both; never a pickle. A
run's folder holds the last one and the one before it. At any moment at least one of them is whole:
a new one is written beside them, flushed, and only then takes its place.

Metrics are JSON lines, the source of truth, and the same numbers for TensorBoard.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from tcpa.adapter import checksum

from ...cli import UsageError
from ..storage import cannot_write, write_whole
from .rundir import BOARD, METRICS

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
            f"{folder} to restart"
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


class Journal:
    """Appends lines to `metrics.jsonl`; every line is there in full or not at all after a resume.

    A line is an object with `kind`: "steps" (since the last such line), "epoch",
    "evaluation" or "result". Epochs and steps count from 1.
    """

    def __init__(self, folder: Path, *, keep: int, step: int, tensorboard: bool) -> None:
        """Open the file and cut off what was written after the checkpoint.

        Args:
            folder: the run's folder.
            keep: bytes that the checkpoint knows of; 0 restarts.
            step: steps done, for TensorBoard.
            tensorboard: also write scalars.

        Raises:
            UsageError: the file is shorter than `keep`, or cannot be written.
        """
        self.path = folder / METRICS
        self._board = _open_board(folder, step) if tensorboard else None
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            if size < keep:
                raise UsageError(
                    f"{self.path}: got {size} bytes, expected {keep} or more, as the checkpoint "
                    f"says; restore the file, or delete {folder} to restart"
                )
            self._file = self.path.open("ab")
            self._file.truncate(keep)
            # Or the size would be told as it was until something is written.
            self._file.seek(keep)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def add(self, kind: str, step: int, scalars: dict[str, float], **record: Any) -> None:
        """Append a line.

        Args:
            kind: see above.
            step: steps done.
            scalars: numbers, which TensorBoard shows too as kind/name.
            record: what else the line says.

        Raises:
            UsageError: it could not be written.
        """
        line = json.dumps({"kind": kind, "step": step, **record, **scalars}, allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from None
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(f"{record.get('split', kind)}/{name}", value, step)

    def sync(self) -> int:
        """Flush to disk and return the size in bytes, for a checkpoint."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from None
        return self._file.tell()

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._file.tell()

    def close(self) -> None:
        """Close the files."""
        # What could not be written was told when it happened; closing would tell it again.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            self._board.close()


def _open_board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ModuleNotFoundError:
        raise UsageError(
            "--tensorboard: tensorboard is not installed (extra 'train'); run: pip install "
            "'tcpa[train]', or pass --no-tensorboard"
        ) from None
    # Events after the checkpoint are of steps that are done again.
    return SummaryWriter(str(folder / BOARD), purge_step=step + 1)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's metrics; a run may still be writing them."""
    try:
        text = (folder / METRICS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]
