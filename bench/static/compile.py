"""Compile one kernel without a device and check what is promised of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .cases import UNALIGNED, StaticCase
from .sass import SHARED_MEMORY, ctas_per_sm, read_cubin

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
    failures: list[str] = field(default_factory=list)


def compile_case(
    case: StaticCase, architecture: str, fixed: Mapping[str, object] = MappingProxyType({})
) -> triton.compiler.CompiledKernel:
    """Compile one case for an architecture, the arguments in `fixed` compiled in."""
    constants = {**case.constants, **fixed}
    signature = {**case.signature, **dict.fromkeys(fixed, "constexpr")}
    names = list(signature)
    aligned = [
        i for i, name in enumerate(names)
        if name.startswith(("p_", "stride_")) and name not in UNALIGNED
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


def inspect_case(case: StaticCase, architecture: str, dtype: str) -> Report:
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
        _read_nvidia(report, case.launch.num_warps, compiled.asm["cubin"])
    else:
        _read_amd(report, text)
    check(report, case)
    return report


def _read_nvidia(report: Report, warps: int, cubin: bytes) -> None:
    code = read_cubin(cubin)
    report.registers, report.stack = code.registers, code.stack
    report.spill_stores, report.spill_loads = code.opcodes["STL"], code.opcodes["LDL"]
    memory = SHARED_MEMORY.get(report.architecture)
    if memory is not None:
        report.programs = ctas_per_sm(code, report.shared, warps, memory)


def _read_amd(report: Report, text: str) -> None:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    report.registers = value("vgpr_count")
    report.stack = value("private_segment_fixed_size")
    report.spill_stores = value("vgpr_spill_count")


def check(report: Report, case: StaticCase) -> None:
    """Note what a promised kernel must not do."""
    limit = ARCHITECTURES[report.architecture][1]
    if report.shared > limit:
        report.failures.append(f"shared memory: {report.shared} bytes of {limit}")
    spills = report.spill_stores + report.spill_loads
    if report.architecture in SPILL_FREE and spills:
        report.failures.append(f"spills: {report.spill_stores} stores, {report.spill_loads} loads")
    if report.architecture == "sm_90" and case.tensor_core and "wgmma" not in report.tensor:
        report.failures.append("no wgmma instruction")
