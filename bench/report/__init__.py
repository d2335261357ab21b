"""Figures, tables and one HTML page from results files.

Usage: tcpa-bench report RESULTS... [--output DIR] [--markdown [FILE]] [--baseline OLD]
[--static FILE] [--no-figures]

The latest row of each kind and device counts, whichever file it is in. DIR gets `index.html`, which
needs nothing else, and every figure as PNG. `--markdown FILE` fills the tables between the markers
of a README (see `readme.py`); without FILE all tables are printed.

What the figures take from the rows:

- bars: metrics "time" and "seconds per epoch", at the promised shape or else at the first one;
  providers that compute another function have "no gate", "ungated", "floor" or "other function" in
  their names;
- roofline: metric "time" of the operations in `costs.operations.OPERATIONS`, ceilings of the
  command "ceilings" with the metrics "bandwidth" and "rate";
- kernel-time breakdown: metric "time of KIND", such as "time of matrix products", one row per
  kind, provider and mode; they are stacked, so that they should not overlap;
- scaling: metric "time" at three or more shapes that differ in P, batch or image size alone.

Exit status 1: something is worse than in the baseline.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...cli import UsageError, command, output_folder, require
from ..compare import THRESHOLD, RowChange, compared, hand_out, load_rows
from ..harness.results import Row
from .data import latest
from .page import measurements_page, read_static
from .readme import all_tables, update

if TYPE_CHECKING:
    from ...inspect.style import Drawing

PRINT = Path("-")


def draw(rows: Sequence[Row]) -> "list[Drawing]":
    """Draw the figures.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from .figures import draw_all
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UsageError(
            "matplotlib is not installed (extra 'plot'); run: pip install 'tcpa[plot]', or pass "
            "--no-figures"
        ) from None
    return draw_all(rows)


def write(directory: Path, text: str, drawings: "Sequence[Drawing]") -> None:
    """Write the page and its figures into a folder.

    Raises:
        UsageError: that is not possible.
    """
    with output_folder(directory):
        for drawing in drawings:
            (directory / f"{drawing.name}.png").write_bytes(drawing.png)
        (directory / "index.html").write_text(text, encoding="utf-8")


@command("tcpa-bench report")
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="tcpa-bench report", description=summary)
    parser.add_argument("results", type=Path, nargs="+", help="results files, oldest first")
    parser.add_argument("--output", type=Path, help="folder for index.html and the figures")
    parser.add_argument(
        "--markdown", type=Path, nargs="?", const=PRINT, help="file with markers; or print tables"
    )
    parser.add_argument("--baseline", type=Path, help="results file to compare with")
    parser.add_argument("--static", type=Path, help="file of tcpa-bench static --json, to show")
    parser.add_argument("--no-figures", action="store_true", help="needs no matplotlib")
    options = parser.parse_args(argv)
    wanted = options.output or options.markdown
    require(bool(wanted), "report", "neither --output nor --markdown", "one of them", "add it")
    rows = latest(row for path in options.results for row in load_rows(path, "RESULTS"))
    static = None if options.static is None else read_static(options.static)
    changes: list[RowChange] = []
    if options.baseline is not None:
        changes = compared(load_rows(options.baseline, "--baseline"), rows, THRESHOLD)
    if options.output is not None:
        drawings = [] if options.no_figures else draw(rows)
        text = measurements_page(rows, drawings, changes=changes, static=static)
        write(options.output, text, drawings)
        print(f"{options.output / 'index.html'}: {len(rows)} values, {len(drawings)} figures")
    if options.markdown == PRINT:
        print(all_tables(rows), end="")
    elif options.markdown is not None:
        count, empty = update(options.markdown, rows)
        print(f"{options.markdown}: {count} tables")
        for name in empty:
            print(f"left as it is, no rows: bench:{name}")
    return hand_out(changes, everything=False) if changes else 0


if __name__ == "__main__":
    sys.exit(main())
