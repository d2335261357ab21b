"""Metrics of a run: JSON lines, the source of truth, and the same numbers for TensorBoard."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ...cli import UsageError
from ..storage import cannot_write
from .folder import BOARD, METRICS


class Journal:
    """Appends lines to `metrics.jsonl`; every line is there in full or not at all after a resume.

    A line is an object with `kind`: "steps" (since the last look at the loss), "epoch",
    "evaluation" or "result". Epochs and steps count from 1.
    """

    def __init__(self, folder: Path, *, keep: int, step: int, tensorboard: bool) -> None:
        """Open the file and cut off what was written after the checkpoint.

        Args:
            folder: the run's folder.
            keep: bytes that the checkpoint knows of; 0 begins anew.
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
                    f"says; restore the file, or delete {folder} to begin anew"
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
