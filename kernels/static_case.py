"""What the offline check is told of a kernel: how it is compiled, what is promised, how much work a
launch has."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from .launch import DTYPE_NAMES, Launch


@dataclass(frozen=True, slots=True)
class Executed:
    """Iterations of a loop that the compiler may unroll, by the times they execute an opcode."""

    opcode: str
    """The instruction; of several such loops only the last may contain that of a later one."""
    count: int
    """Executions by one warp, over all iterations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Programs of one kernel that do the same work, for a lower bound of its time."""

    programs: int
    """How many of them one launch has."""
    trips: tuple[float | Executed, ...]
    """Mean iterations of every loop, in the order of the machine code."""
    constants: Mapping[str, object] = field(default_factory=dict)
    """Values, also of run-time arguments, that leave only this part when compiled in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticCase:
    """One kernel to compile without a device: what the offline check reports and promises."""

    name: str
    """Kernel and shape."""
    kernel: object
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Types of all arguments in order ("*bf16", "i32", "fp32", "constexpr")."""
    constants: Mapping[str, object]
    """Values of the constexpr arguments, block sizes included."""
    launch: Launch
    """Warps, stages and registers."""
    promised: bool
    """Whether spills or missing tensor-core instructions are a failure."""
    tensor_core: bool = True
    """Whether the kernel multiplies matrices."""
    parts: tuple[Part, ...] = ()
    """The work of one launch; no lower bound is given without it."""
    unaligned: tuple[str, ...] = ()
    """Strides that are no multiples of 16; all others are, like all pointers."""


def static_signature(
    kernel: object,
    dtype: torch.dtype,
    constants: Mapping[str, object],
    pointers: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Type a kernel's arguments by their names.

    `p_...` points to `dtype` unless `pointers` says otherwise, `scale...` is a float, anything else
    that is no constant an integer.
    """
    element = DTYPE_NAMES[dtype]

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.startswith("p_"):
            return pointers.get(name, f"*{element}")
        return "fp32" if name.startswith("scale") else "i32"

    return {name: type_of(name) for name in kernel.arg_names}


__all__ = ["Executed", "Part", "StaticCase", "static_signature"]
