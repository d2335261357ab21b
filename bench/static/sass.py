"""Machine code of NVIDIA kernels: what the assembler made of them."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Za-z0-9_]*)", re.M)
SHARED_MEMORY = {"sm_90": 233472, "sm_80": 167936}
"""Bytes of a multiprocessor's shared memory; the system takes 1 KiB of them for each CTA."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineCode:
    """What the assembler reports and made."""

    registers: int
    stack: int
    opcodes: Counter[str]
    """Instructions by opcode, without its modifiers."""


def read_cubin(cubin: bytes) -> MachineCode:
    """Disassemble a compiled kernel with the tool that ships with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        listing = _cuobjdump("-sass", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    opcodes = Counter(LINE.findall(listing))
    return MachineCode(registers=found["REG"], stack=found["STACK"], opcodes=opcodes)


def ctas_per_sm(code: MachineCode, shared: int, warps: int, shared_memory: int) -> int:
    """Return how many CTAs fit a multiprocessor by registers, shared memory and threads."""
    by_registers = 65536 // (-(-code.registers * 32 // 256) * 256 * warps)
    return min(by_registers, shared_memory // (shared + 1024), 2048 // (32 * warps), 32)


def _cuobjdump(*arguments: str) -> str:
    command = [str(TOOLS / "cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
