"""Compile every kernel of the launch table without a device and check what the library promises.

Usage: `tcpa-bench static [--arch sm_90 ...] [--dtype bf16 ...] [--only TEXT] [--json PATH]`.

Columns: registers per thread; stack in bytes; spill stores and loads in instructions; shared memory
in KiB; tensor-core instructions; programs per multiprocessor; the lower bound of one launch in
microseconds and the pipe that sets it (B = 128 on one H200 or A100, see `sass.py`).

Exit status 1: a promised kernel does not compile, exceeds the shared memory of its architecture,
spills on sm_80 or sm_90, or has no wgmma on sm_90. 2: nothing can be compiled.
"""

import argparse
import importlib
import json
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..cli import UsageError, command, require_writable, write_results
from ..kernels.launch import interpreting
from ..kernels.static_case import Part, StaticCase
from .sass import PROCESSORS, pipe_cycles, programs_per_processor, read_cubin

MODULES = ("gated_attention_cases", "match_cases")
"""Modules of `tcpa.kernels` with `static_cases(architecture, dtype)`."""
ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
"""Compile target and bytes of shared memory that one program may use."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SPILL_FREE = ("sm_80", "sm_90")
TENSOR_INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "mma.sync": "mma.sync",
    "tcgen05": "tcgen05.mma",
    "mfma": "v_mfma",
}


@dataclass(kw_only=True, slots=True)
class Report:
    """What became of one case on one architecture."""

    name: str
    architecture: str
    dtype: str
    promised: bool
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    tensor: dict[str, int] = field(default_factory=dict)
    programs: int | None = None
    pipes_us: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    note: str = ""


def compile_case(
    case: StaticCase, architecture: str, part: Part | None = None
) -> triton.compiler.CompiledKernel:
    """Compile one case, or one part of its work, for an architecture."""
    overrides = {} if part is None else part.constants
    constants = {**case.constants, **overrides}
    signature = {**case.signature, **dict.fromkeys(overrides, "constexpr")}
    names = list(signature)
    aligned = [
        i for i, name in enumerate(names)
        if name.startswith(("p_", "stride_")) and name not in case.unaligned
        and signature[name] != "constexpr"
    ]  # fmt: skip
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {**case.launch.options(), "enable_fp_fusion": True}
    options = {name: value for name, value in options.items() if name not in case.launch.blocks}
    return triton.compile(source, target=ARCHITECTURES[architecture][0], options=options)


def inspect(case: StaticCase, architecture: str, dtype: str) -> Report:
    """Compile one case and check it."""
    report = Report(name=case.name, architecture=architecture, dtype=dtype, promised=case.promised)
    try:
        compiled = compile_case(case, architecture)
    except Exception as error:
        # Whatever the compiler raises is the finding, not an accident of this program.
        cause = error.__cause__ or error
        report.failures.append(f"does not compile: {str(cause).strip().splitlines()[-1]}")
        return report
    report.shared = compiled.metadata.shared
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    report.tensor = {
        name: count for name, mark in TENSOR_INSTRUCTIONS.items() if (count := text.count(mark))
    }
    if "cubin" in compiled.asm:
        _read_nvidia(report, case, compiled.asm["cubin"])
    else:
        _read_amd(report, text)
    _check(report, case)
    return report


def _read_nvidia(report: Report, case: StaticCase, cubin: bytes) -> None:
    code = read_cubin(cubin)
    report.registers, report.stack = code.registers, code.stack
    report.spill_stores, report.spill_loads = code.count("STL"), code.count("LDL")
    processor = PROCESSORS.get(report.architecture)
    if processor is None:
        return
    warps = case.launch.num_warps
    report.programs = programs_per_processor(code, report.shared, warps, processor)
    for part in case.parts:
        if part.constants:
            code = read_cubin(compile_case(case, report.architecture, part).asm["cubin"])
        try:
            cycles = pipe_cycles(code, part.trips, warps, processor)
        except ValueError as error:
            report.note, report.pipes_us = f"no lower bound: {error}", {}
            return
        seconds_per_cycle = part.programs / processor.count / processor.clock
        for pipe, amount in cycles.items():
            microseconds = amount * seconds_per_cycle * 1e6
            report.pipes_us[pipe] = report.pipes_us.get(pipe, 0.0) + microseconds


def _read_amd(report: Report, text: str) -> None:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    report.registers = value("vgpr_count")
    report.stack = value("private_segment_fixed_size")
    report.spill_stores = value("vgpr_spill_count")


def _check(report: Report, case: StaticCase) -> None:
    """Note what a promised kernel must not do."""
    limit = ARCHITECTURES[report.architecture][1]
    if report.shared > limit:
        report.failures.append(f"shared memory: {report.shared} bytes of {limit}")
    spills = report.spill_stores + report.spill_loads
    if report.architecture in SPILL_FREE and spills:
        report.failures.append(f"spills: {report.spill_stores} stores, {report.spill_loads} loads")
    if report.architecture == "sm_90" and case.tensor_core and "wgmma" not in report.tensor:
        report.failures.append("no wgmma instruction")


def collect(architecture: str, dtype: str) -> Iterator[StaticCase]:
    """Yield the cases of all kernel modules."""
    for module in MODULES:
        cases = importlib.import_module(f"..kernels.{module}", __package__).static_cases
        yield from cases(architecture, DTYPES[dtype])


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
        for case in collect(architecture, dtype)
    ]
    chosen = [row for row in found if only in row[0].name]
    if not chosen:
        names = "\n".join(f"  {name}" for name in dict.fromkeys(case.name for case, *_ in found))
        raise UsageError(f"--only: got {only!r}, expected a part of one of these names:\n{names}")
    return chosen


HEADER = (
    f"{'kernel':<46}{'arch':<8}{'dtype':<6}{'regs':>5}{'stack':>6}{'spills':>8}{'KiB':>6}"
    f"{'per SM':>7}{'us >=':>7} {'pipe':<7} tensor-core instructions"
)


def format_row(report: Report) -> str:
    """Return one line of the table."""
    pipe = max(report.pipes_us, key=report.pipes_us.__getitem__, default="")
    bound = f"{report.pipes_us[pipe]:.1f}" if pipe else "-"
    spills = f"{report.spill_stores}/{report.spill_loads}"
    tensor = " ".join(f"{name}:{count}" for name, count in report.tensor.items())
    programs = "-" if report.programs is None else report.programs
    row = (
        f"{report.name:<46}{report.architecture:<8}{report.dtype:<6}{report.registers:>5}"
        f"{report.stack:>6}{spills:>8}{report.shared / 1024:>6.0f}{programs:>7}{bound:>7} "
        f"{pipe:<7} {tensor}"
    )
    remarks = [f"FAIL {failure}" for failure in report.failures] + [report.note] * bool(report.note)
    return "\n    ".join([row, *remarks])


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
            reports.append(inspect(*row))
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


if __name__ == "__main__":
    sys.exit(main())
