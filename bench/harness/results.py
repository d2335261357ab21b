"""One file of results: JSON lines, one metric a row, each with the conditions of its measurement.

Rows are appended as they are measured, so that an interrupted run keeps what it has. Every row is
complete in itself: rows of several runs, machines and commits can stand in one file.
"""

import errno
import functools
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ... import provenance as made
from ...cli import UsageError
from .timing import Quantiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where, with what and when something was measured."""

    device: str
    """Name of the GPU, or of the CPU with its threads."""
    driver: str
    """Version of the GPU's driver; "" on a CPU."""
    torch: str
    triton: str
    """"" without Triton."""
    timm: str
    """"" without timm."""
    python: str
    system: str
    commit: str
    """Git commit of the library; "" outside a checkout."""
    dirty: bool
    """Whether the checkout differed from the commit."""
    date: str
    """UTC, ISO 8601, to the second: the start of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One metric of one provider, as quantiles over the samples of one run."""

    command: str
    """Command of `tcpa-bench` that measured it."""
    operation: str
    """What was computed: an operation, "step", "epoch", "copy", ..."""
    shape: str
    """Name of the shape, which tells all sizes (see `case.py`)."""
    dtype: str
    mode: str
    """"forward", "backward", "both", "train" or "eval"."""
    provider: str
    metric: str
    """"time", "rate", "bandwidth", "share of ceiling", "peak memory", ..."""
    unit: str
    p20: float
    p50: float
    p80: float
    samples: int
    provenance: Provenance

    @property
    def key(self) -> tuple[str, ...]:
        """What was measured, whenever and wherever that was."""
        names = ("command", "operation", "shape", "dtype", "mode", "provider", "metric", "unit")
        return tuple(getattr(self, name) for name in names)

    def to_json(self) -> str:
        """Return the row as one line of JSON."""
        return json.dumps(asdict(self))


@functools.cache
def provenance(device: torch.device) -> Provenance:
    """Describe this run on a device; the date is that of the first call."""
    return Provenance(
        device=_device(device),
        driver=made.driver(device),
        torch=torch.__version__,
        triton=made.version("triton"),
        timm=made.version("timm"),
        python=platform.python_version(),
        system=made.system(),
        commit=made.commit(12),
        dirty=made.has_changes(),
        date=made.now(),
    )


def _device(device: torch.device) -> str:
    """Return the name of a GPU, or the CPU's with the number of threads in use."""
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{made.device_name(device)}{threads}"


def make_rows(
    metrics: Mapping[tuple[str, str], Quantiles], where: Provenance, **fields: str
) -> list[Row]:
    """Return one row per metric.

    Args:
        metrics: quantiles by metric and unit.
        where: provenance of all of them.
        fields: the other fields of the rows, the same for all.
    """
    return [
        Row(
            metric=metric,
            unit=unit,
            p20=quantiles.p20,
            p50=quantiles.p50,
            p80=quantiles.p80,
            samples=quantiles.samples,
            provenance=where,
            **fields,
        )
        for (metric, unit), quantiles in metrics.items()
    ]


class Results:
    """Rows in memory and, if a path is given, in a file that grows with them."""

    def __init__(self, path: Path | None = None, option: str = "--results") -> None:
        """Open a file, or begin one; an earlier file's rows stay and more are appended.

        Raises:
            UsageError: the file cannot be written, or is not one of ours.
        """
        self.path, self._option = path, option
        self.rows: list[Row] = []
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            if path.exists() and path.stat().st_size:
                self.rows = load(path, option)
                _mend_end(path, option)
            path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise UsageError(
                f"{option}: got {path}, expected a file that can be written ({error.strerror}); "
                "choose another name"
            ) from None

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows, and put them on disk before returning.

        Raises:
            UsageError: the file cannot be written any more; the rows stay in memory.
        """
        new = list(rows)
        self.rows += new
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(row.to_json() + "\n" for row in new)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UsageError(
                f"{self._option}: {self.path} could not be written ({error.strerror}); earlier "
                "rows are in it"
            ) from None

    def measured(self, **fields: str) -> list[Row]:
        """Return the rows whose fields have these values, in the order of measuring."""
        wanted = fields.items()
        return [row for row in self.rows if all(getattr(row, k) == v for k, v in wanted)]


def load(path: Path, option: str = "FILE") -> list[Row]:
    """Read a results file.

    A last line that was cut off, by a run that was killed, is left out.

    Raises:
        UsageError: the file cannot be read or is not one of ours; the message names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option}: {path} cannot be read ({error}); check the path") from None
    lines = text.splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(row_from_json(line))
        except (ValueError, TypeError) as error:
            if number == len(lines) and not text.endswith("\n") and _is_cut_row(line):
                break
            raise UsageError(
                f"{option}: {path}, line {number} is no row of results ({error}); expected a file "
                "that tcpa-bench wrote with --results"
            ) from None
    return rows


_BEGINNING = '{"command": "'
"""Of every row."""


def _is_cut_row(line: str) -> bool:
    length = len(_BEGINNING)
    return line[:length] == _BEGINNING[: len(line)]


def _mend_end(path: Path, option: str) -> None:
    """Take away a last line that was cut off: what comes next would be joined to it."""
    content = path.read_bytes()
    if content.endswith(b"\n"):
        return
    whole, last = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    try:
        row_from_json(last.decode())
    except (ValueError, TypeError):
        print(f"{option}: {path}: its last line was cut off and is left out", file=sys.stderr)
        os.truncate(path, len(whole))
    else:
        with path.open("ab") as file:
            file.write(b"\n")


def row_from_json(line: str) -> Row:
    """Read one line.

    Raises:
        ValueError, TypeError: it is no row.
    """
    values: dict[str, Any] = json.loads(line)
    if not isinstance(values, dict) or not isinstance(values.get("provenance"), dict):
        raise ValueError("no object with a provenance")
    for cls, given in ((Row, values), (Provenance, values["provenance"])):
        names = {field.name for field in fields(cls)}
        if given.keys() != names:
            differ = sorted(given.keys() ^ names)
            raise ValueError(f"missing or unknown fields {differ}")
    numbers = ("p20", "p50", "p80")
    if not all(isinstance(values[name], int | float) for name in numbers):
        raise ValueError("p20, p50 and p80 must be numbers")
    return Row(**{**values, "provenance": Provenance(**values["provenance"])})


def number(value: float) -> str:
    """Return three significant digits, without an exponent where it can be avoided."""
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    exact = f"{value:#.3g}".removesuffix(".")
    return exact if abs(value) >= 1e-4 or value == 0 else f"{value:.2e}"
