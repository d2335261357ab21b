"""Machine code of NVIDIA kernels: what the assembler made, and a lower bound of the time it needs.

The bound counts, pipe by pipe, the cycles that the instructions of one launch occupy the
multiprocessors at peak rate, every loop body weighted with its iterations. No kernel is faster
than its slowest pipe. It knows nothing of latency, caches and device memory, and counts a load that
lanes share in full.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from ..kernels.static_case import Executed

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);", re.M
)
PIPES = ("tensor", "mufu", "fma", "alu", "shared", "global", "issue")
FMA = {"FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2"}
ALU = {
    "FMNMX", "FMNMX3", "FSEL", "SEL", "FSETP", "ISETP", "LOP3", "PRMT", "SHF", "IADD3", "IADD",
    "VIADD", "LEA", "F2FP", "IMNMX", "VIMNMX", "PLOP3", "IABS", "SGXT", "FSET", "FCHK", "MOV",
}  # fmt: skip
BYTES_PER_LANE = {".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2, ".64": 8, ".128": 16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    """Peak rates of one multiprocessor, per clock, and how many there are."""

    name: str
    """The product whose clock and size are meant."""
    count: int
    """Multiprocessors."""
    clock: float
    """Hz under load."""
    tensor: int
    """Half-precision multiply-adds of the tensor cores."""
    fma: int
    """Lanes of float32 multiply-adds."""
    shared_memory: int
    """Bytes of shared memory for all programs, 1 KiB of each program's is taken by the system."""


PROCESSORS = {
    "sm_90": Processor(
        name="H200", count=132, clock=1.755e9, tensor=2048, fma=128, shared_memory=233472
    ),
    "sm_80": Processor(
        name="A100", count=108, clock=1.41e9, tensor=1024, fma=64, shared_memory=167936
    ),
}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of machine code."""

    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineCode:
    """What the assembler reports and made."""

    registers: int
    stack: int
    instructions: tuple[Instruction, ...]

    def count(self, name: str) -> int:
        """Return how many instructions have an opcode."""
        return sum(instruction.name == name for instruction in self.instructions)


def read_cubin(cubin: bytes) -> MachineCode:
    """Disassemble a compiled kernel with the tool that ships with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        listing = _cuobjdump("-sass", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    lines = (Instruction(int(a, 16), op, rest.strip()) for a, op, rest in LINE.findall(listing))
    return MachineCode(registers=found["REG"], stack=found["STACK"], instructions=tuple(lines))


def find_loops(code: MachineCode) -> list[tuple[int, int]]:
    """Return first and last address of every loop, in order of the machine code."""
    ends: dict[int, int] = {}
    for instruction in code.instructions:
        target = re.search(r"0x([0-9a-f]+)$", instruction.operands)
        if instruction.name == "BRA" and target and int(target[1], 16) < instruction.address:
            start = int(target[1], 16)
            ends[start] = max(ends.get(start, 0), instruction.address)
    return sorted(ends.items())


def count_iterations(
    code: MachineCode, trips: Sequence[float | Executed]
) -> list[tuple[int, int, float]]:
    """Return first and last address and the iterations of every loop.

    From the last loop to the first: one that lacks the instruction it should execute is another,
    and its own was unrolled altogether.

    Raises:
        ValueError: the machine code has another number of loops than `trips`.
    """
    loops, found = find_loops(code), []
    remaining = loops[:]
    for trip in reversed(trips):
        if not isinstance(trip, Executed):
            if remaining:
                found.append((*remaining.pop(), trip))
            continue
        if not remaining:
            continue
        start, end = remaining[-1]
        executed = sum(
            start <= one.address <= end and one.name == trip.opcode for one in code.instructions
        )
        if executed:
            found.append((*remaining.pop(), trip.count / executed))
    needed = sum(not isinstance(trip, Executed) for trip in trips)
    if remaining or len(found) < needed:
        raise ValueError(f"trips: got {len(trips)} loops, the machine code has {len(loops)}")
    return found[::-1]


def pipe_cycles(
    code: MachineCode, trips: Sequence[float | Executed], num_warps: int, processor: Processor
) -> dict[str, float]:
    """Return the cycles that one program occupies every pipe.

    Raises:
        ValueError: the machine code has another number of loops than `trips`.
    """
    loops = count_iterations(code, trips)
    cycles: defaultdict[str, float] = defaultdict(float)
    for instruction in code.instructions:
        weight = float(num_warps)
        for start, end, iterations in loops:
            if start <= instruction.address <= end:
                weight *= iterations
        for pipe, amount in _occupies(instruction, processor).items():
            cycles[pipe] += weight * amount
    return {pipe: cycles[pipe] for pipe in PIPES}


def programs_per_processor(code: MachineCode, shared: int, warps: int, of: Processor) -> int:
    """Return how many programs fit a multiprocessor by registers, shared memory and threads."""
    by_registers = 65536 // (-(-code.registers * 32 // 256) * 256 * warps)
    by_shared = of.shared_memory // (shared + 1024)
    return min(by_registers, by_shared, 2048 // (32 * warps), 32)


def _occupies(instruction: Instruction, processor: Processor) -> dict[str, float]:
    """Return the cycles that one warp's instruction occupies each pipe of a multiprocessor."""
    name, opcode = instruction.name, instruction.opcode
    pipes = {"issue": 0.25}
    if name == "HGMMA":
        pipes |= _occupies_hgmma(instruction, processor)
    elif name == "HMMA":
        macs = 2048 if ".16816" in opcode else 1024
        pipes["tensor"] = macs / processor.tensor
    elif name == "MUFU":
        pipes["mufu"] = 2.0
    elif name in FMA:
        pipes["fma"] = 32 / processor.fma
    elif name == "IMAD":
        pipes["fma"] = 0.5
    elif name in ALU:
        pipes["alu"] = 0.5
    elif name == "LDS":
        # Lanes may share an address: one access is certain, not one per 128 bytes.
        pipes["shared"] = 1.0
    elif name == "STS":
        pipes["shared"] = 32 * _bytes_per_lane(opcode) / 128
    elif name in ("LDSM", "STSM"):
        pipes["shared"] = 4.0 if opcode.endswith(".4") else 2.0
    elif name == "SHFL":
        pipes["shared"] = 1.0
    elif name in ("LDG", "STG", "LDGSTS"):
        pipes["global"] = 32 * _bytes_per_lane(opcode) / 64
        if name == "LDGSTS":
            pipes["shared"] = 32 * _bytes_per_lane(opcode) / 128
    return pipes


def _occupies_hgmma(instruction: Instruction, processor: Processor) -> dict[str, float]:
    """A warp-group product: four warps issue it together, so each bears a quarter."""
    m, n, k = map(int, re.findall(r"(\d+)x(\d+)x(\d+)", instruction.opcode)[0])
    a_in_shared = re.match(r"R\d+, gdesc", instruction.operands) is not None
    operand_bytes = 2 * k * (n + m * a_in_shared)
    return {"tensor": m * n * k / processor.tensor / 4, "shared": operand_bytes / 128 / 4}


def _bytes_per_lane(opcode: str) -> int:
    return next((size for mark, size in BYTES_PER_LANE.items() if mark in opcode), 4)


def _cuobjdump(*arguments: str) -> str:
    command = [str(TOOLS / "cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
