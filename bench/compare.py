"""Compare two results files: what became slower or faster beyond the noise.

Usage: tcpa-bench compare OLD NEW [--threshold PERCENT] [--all]

The latest row of each kind counts. A change is one only if the intervals from p20 to p80 do not
overlap and the medians differ by more than the threshold (3 %); where there was one sample, such as
of memory, the threshold alone decides. Rows of a device are compared with rows of the same device
if there are any, else with another's, and that is said.

Exit status 1: something became worse.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..cli import UsageError, command, require
from .harness.results import Provenance, Row, load, number

THRESHOLD = 0.03
HIGHER_IS_BETTER = ("share", "speed", "accuracy", "MFU", "HFU")
"""How metrics begin that are no rates and better when larger."""
NOT_COMPARED = ("error", "predicted")
"""How metrics begin that are no measurement of speed or memory: errors, which a tolerance judges
where they are measured, and what was expected."""


@dataclass(frozen=True, slots=True)
class RowChange:
    """One row in both files."""

    old: Row
    new: Row
    ratio: float
    """Median of the new row by that of the old one."""
    verdict: str
    """"worse", "better" or "same"."""


def compare(
    old: Sequence[Row], new: Sequence[Row], threshold: float = THRESHOLD
) -> list[RowChange]:
    """Pair the rows of two files and judge each pair, the worst first."""
    by_device = {(row.key, row.provenance.device): row for row in old}
    by_key = {row.key: row for row in old}
    latest = {(row.key, row.provenance.device): row for row in new}
    changes = []
    for key, row in latest.items():
        before = by_device.get(key) or by_key.get(row.key)
        if before is not None and not row.metric.startswith(NOT_COMPARED):
            changes.append(_judge(before, row, threshold))
    order = {"worse": 0, "better": 1, "same": 2}
    return sorted(changes, key=lambda c: (order[c.verdict], -abs(c.ratio - 1)))


def higher_is_better(row: Row) -> bool:
    """Tell whether a larger value is the better one: rates and shares, but not times or memory."""
    return row.unit.endswith("/s") or row.metric.startswith(HIGHER_IS_BETTER)


def _judge(old: Row, new: Row, threshold: float) -> RowChange:
    if old.p50 == new.p50:
        return RowChange(old, new, 1.0, "same")
    ratio = new.p50 / old.p50 if old.p50 else float("inf")
    apart = new.p20 > old.p80 or new.p80 < old.p20
    # NaN is in no order with anything; it must not pass for "same".
    if not abs(ratio - 1) <= threshold and (apart or ratio != ratio):
        better = (ratio > 1) == higher_is_better(new) and ratio == ratio
        return RowChange(old, new, ratio, "better" if better else "worse")
    return RowChange(old, new, ratio, "same")


def differences(changes: Sequence[RowChange]) -> list[str]:
    """Say in which conditions the compared rows differ."""
    found = []
    for name in (field.name for field in fields(Provenance)):
        if name == "date":
            continue
        pairs = dict.fromkeys(
            (getattr(c.old.provenance, name), getattr(c.new.provenance, name)) for c in changes
        )
        found += [f"{name}: {before!r} -> {after!r}" for before, after in pairs if before != after]
    return found


def summary(changes: Sequence[RowChange]) -> str:
    """Return the numbers of verdicts in words."""
    counts = [sum(c.verdict == word for c in changes) for word in ("worse", "better", "same")]
    return "{} worse, {} better, {} the same within the noise".format(*counts)


def describe(change: RowChange) -> list[str]:
    """Return the cells of a change: verdict, what, medians with p20-p80, ratio."""
    new = change.new
    words = (new.command, new.operation, new.shape, new.dtype, new.mode, new.provider, new.metric)
    values = [
        f"{number(r.p50)} ({number(r.p20)}-{number(r.p80)}) {r.unit}" for r in (change.old, new)
    ]
    return [change.verdict, " / ".join(filter(None, words)), *values, f"{change.ratio:.3f}"]


@command("tcpa-bench compare")
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="tcpa-bench compare", description=summary)
    parser.add_argument("old", type=Path, help="results file")
    parser.add_argument("new", type=Path, help="results file")
    parser.add_argument("--threshold", type=float, default=100 * THRESHOLD, help="percent")
    parser.add_argument("--all", action="store_true", help="also list what stayed the same")
    options = parser.parse_args(argv)
    right = 0 <= options.threshold < float("inf")
    require(right, "--threshold", options.threshold, "a percentage from 0", "correct it")
    old, new = load_rows(options.old, "OLD"), load_rows(options.new, "NEW")
    return hand_out(compared(old, new, options.threshold / 100), everything=options.all)


def load_rows(path: Path, option: str) -> list[Row]:
    """Read a results file that must not be empty.

    Raises:
        UsageError: it cannot be read, is not ours, or has no rows.
    """
    rows = load(path, option)
    if not rows:
        raise UsageError(
            f"{option}: got {path} without a row, expected results of tcpa-bench; measure first"
        )
    return rows


def compared(old: Sequence[Row], new: Sequence[Row], threshold: float) -> list[RowChange]:
    """Return the changes.

    Raises:
        UsageError: the files have nothing in common.
    """
    changes = compare(old, new, threshold)
    if not changes:
        raise UsageError(
            "OLD and NEW have no row in common, expected the same commands, shapes and providers; "
            "measure the same in both"
        )
    return changes


def hand_out(changes: Sequence[RowChange], *, everything: bool) -> int:
    """Print the comparison and return the exit status."""
    for difference in differences(changes):
        print(f"conditions differ: {difference}")
    for change in changes:
        if everything or change.verdict != "same":
            verdict, what, before, after, ratio = describe(change)
            print(f"{verdict:<7}{ratio:>8}  {what}\n{'':<17}{before} -> {after}")
    print(summary(changes))
    return int(any(change.verdict == "worse" for change in changes))


if __name__ == "__main__":
    sys.exit(main())
