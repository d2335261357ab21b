"""The demo's output folder: metrics as JSON lines, the adapter, the figures."""

import json
from pathlib import Path

from ...cli import UsageError

METRICS = "metrics.jsonl"
PROGRAM = "tcpa demo"


def prepare_output(folder: Path, header: dict) -> Path:
    """Create the output folder, or accept one that an earlier demo filled.

    Returns the metrics file, begun anew with `header` as its first line.
    """
    metrics = folder / METRICS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not _is_demo_output(metrics):
            raise UsageError(
                f"--output: got {folder}, which holds other files, expected a new or empty folder "
                "or one that an earlier demo made; choose another folder"
            )
        metrics.write_text("", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"--output: got {folder}, expected a folder that can be written "
            f"({error.strerror}); choose another folder"
        ) from None
    append_line(metrics, {"kind": "config", "program": PROGRAM, **header})
    return metrics


def append_line(metrics: Path, record: dict) -> None:
    """Append one JSON object to the metrics."""
    with metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _is_demo_output(metrics: Path) -> bool:
    if not metrics.is_file():
        return False
    first = metrics.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return f'"program": "{PROGRAM}"' in first
