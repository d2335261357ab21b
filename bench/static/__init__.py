"""Compile every kernel of the launch table without a device and check what the library promises.

Usage: `tcpa-bench static [--arch sm_90 ...] [--dtype bf16 ...] [--only TEXT] [--json PATH]`.

Columns: registers per thread; stack in bytes; spill stores and loads in instructions; shared memory
in KiB; CTAs per multiprocessor; tensor-core instructions.

Exit status 1: a promised kernel does not compile, exceeds the shared memory of its architecture,
spills on sm_80 or sm_90, or has no wgmma on sm_90. 2: nothing can be compiled.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from ...cli import UsageError, command, require_writable, write_results
from ...kernels.launch import interpreting
from .cases import StaticCase, static_cases
from .compile import ARCHITECTURES, DTYPES, Report, inspect_case


def select(
    architectures: Sequence[str], dtypes: Sequence[str], only: str
) -> list[tuple[StaticCase, str, str]]:
    """Return the cases whose name contains `only`, each with its architecture and dtype.

    Raises:
        UsageError: there is none; the message lists what there is.
    """
    found = [
        (case, architecture, dtype)
        for architecture in dict.fromkeys(architectures)
        for dtype in dict.fromkeys(dtypes)
        for case in static_cases(architecture, DTYPES[dtype])
    ]
    chosen = [row for row in found if only in row[0].name]
    if not chosen:
        names = "\n".join(f"  {name}" for name in dict.fromkeys(case.name for case, *_ in found))
        raise UsageError(f"--only: got {only!r}, expected a part of one of these names:\n{names}")
    return chosen


HEADER = (
    f"{'kernel':<46}{'arch':<8}{'dtype':<6}{'regs':>5}{'stack':>6}{'spills':>8}{'KiB':>6}"
    f"{'per SM':>7} tensor-core instructions"
)


def format_row(report: Report) -> str:
    """Return one line of the table."""
    spills = f"{report.spill_stores}/{report.spill_loads}"
    tensor = " ".join(f"{name}:{count}" for name, count in report.tensor.items())
    programs = "-" if report.programs is None else report.programs
    row = (
        f"{report.name:<46}{report.architecture:<8}{report.dtype:<6}{report.registers:>5}"
        f"{report.stack:>6}{spills:>8}{report.shared / 1024:>6.0f}{programs:>7} {tensor}"
    )
    return "\n    ".join([row, *(f"FAIL {failure}" for failure in report.failures)])


@command("tcpa-bench static")
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="tcpa-bench static", description=summary)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", default="", help="kernels and shapes whose name contains this")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    options = parser.parse_args(argv)
    if interpreting():
        raise UsageError("unset TRITON_INTERPRET; it keeps kernels from being compiled")
    rows = select(options.arch, options.dtype, options.only)
    if options.json is not None:
        require_writable(options.json, "--json")
    print(HEADER, flush=True)
    reports = []
    try:
        for row in rows:
            reports.append(inspect_case(*row))
            print(format_row(reports[-1]), flush=True)
    finally:
        # An interruption keeps what was compiled before.
        if options.json is not None and reports:
            _write(options.json, reports)
    failed = sum(report.promised and bool(report.failures) for report in reports)
    print(f"{len(reports)} kernels, {failed} broken promises")
    return int(failed > 0)


def _write(path: Path, reports: list[Report]) -> None:
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    result = {**versions, "python": platform.python_version(), "kernels": [*map(asdict, reports)]}
    write_results(path, json.dumps(result, indent=1) + "\n", "--json")
