"""The published Table 2, VPT's values of single tasks, and what is known about them."""

import csv
import functools
from pathlib import Path

from .paper import ROWS

TABLE2 = Path(__file__).with_name("table2_vtab.csv")
VPT = Path(__file__).with_name("vtab_vpt.csv")

VPT_ROWS = {"full": "Full", "vpt-deep": "VPT-Deep"}
"""Our method -> its column among VPT's values."""

NOTES = (
    "The paper prints group means alone and does not say how they were measured; no code, no "
    "settings and no values of single tasks are published. Its rows Full and VPT are VPT's own "
    "results: settings tuned on 800 and 200 images, then the last epoch on all 1,000, mean of five "
    "seeds.",
    "Values of single tasks beside ours are VPT's, as public repositories quote them, to find "
    "gross errors; their means are those of the rows Full and VPT.",
    "The images that circulate without TensorFlow are lossy copies of the originals. Results on "
    "them are not comparable with published ones and get no delta.",
)
"""What a reader of Table 2 should know."""


def published_mean(method: str, group: str) -> float | None:
    """Return the published mean of a group of tasks, percent; None where there is none.

    Args:
        method: one of ours.
        group: natural, specialized or structured.
    """
    cell = table2().get(ROWS.get(method, ""), {}).get(group, "")
    return float(cell) if cell else None


def vpt_value(method: str, task: str) -> float | None:
    """Return VPT's accuracy on a task, percent; None where it has none.

    Args:
        method: one of ours.
        task: its name here, vtab-dtd for instance.
    """
    cell = _rows(VPT, "task")[task].get(VPT_ROWS.get(method, ""), "")
    return float(cell) if cell else None


def table2() -> dict[str, dict[str, str]]:
    """Return the published table: row -> column -> cell, "" where nothing is printed."""
    return _rows(TABLE2, "method")


@functools.cache
def _rows(path: Path, key: str) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {row[key]: row for row in rows}
