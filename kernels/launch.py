"""Launch configurations as data: block sizes, warps and pipeline stages of every kernel.

One row per operation, architecture, dtype class and shape bucket. Nothing is tuned at run time:
`choose_launch` takes the same row on every run, so results are reproducible to the bit.

An operation names one kernel ("gated_attention_fwd"). A bucket is a word that the operation's host
code derives from its shapes ("short", "long"). The dtype class is "half" (float16, bfloat16) or
"float" (float32). The architecture is what `architecture_of` returns, or "default", which serves
every device without a row of its own; every (operation, dtype class, bucket) has a "default" row.
"""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import triton

_log = logging.getLogger("tcpa.kernels")

DTYPE_CLASSES = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "float"}
DEFAULT = "default"

# Read once: `triton.jit` decides at import, and a traced graph cannot call Triton's settings.
_INTERPRETING = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How one kernel is launched."""

    blocks: Mapping[str, int]
    """Constexpr block sizes by the name of the kernel argument, in elements."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Stages of the software pipeline of loads."""
    max_registers: int | None = None
    """Registers per thread that the assembler may use (NVIDIA only); None leaves it free."""

    def options(self) -> dict[str, int]:
        """Return the keyword arguments of a kernel call, block sizes included."""
        options = {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Programs of one kernel that do the same work, for a lower bound of its time."""

    programs: int
    """How many of them one launch has."""
    trips: tuple[float, ...]
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
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.startswith("p_"):
            return pointers.get(name, f"*{element}")
        return "fp32" if name.startswith("scale") else "i32"

    return {name: type_of(name) for name in kernel.arg_names}


Row = tuple[str, str, str, str, Launch]


def row(
    operation: str,
    architecture: str,
    dtype_class: str,
    bucket: str,
    blocks: Mapping[str, int],
    num_warps: int,
    num_stages: int,
    max_registers: int | None = None,
) -> Row:
    """Write one row of the table."""
    launch = Launch(
        blocks=MappingProxyType(dict(blocks)),
        num_warps=num_warps,
        num_stages=num_stages,
        max_registers=max_registers,
    )
    return operation, architecture, dtype_class, bucket, launch


# Gated attention, chosen by offline compilation, not yet by measurement. On sm_90 at 64 columns
# (registers, shared memory -> programs per multiprocessor; none of them spills): forward 128
# queries: 126, 64 KB -> 2 of 8 warps; it reads K and V half as often from L2 as 64 queries do
# (124 -> 3 of 4 warps). dq 64 queries: 151, 57 KB -> 3. dkv 64 keys against 32 queries: 168,
# 33 KB -> 3, where 64 queries take 247 -> 2. Eight warps never share 64 rows: the products would be
# computed twice. float32 products run on the ordinary units: small blocks, few registers.
_M64_N64 = {"BLOCK_M": 64, "BLOCK_N": 64}
_M128_N64 = {"BLOCK_M": 128, "BLOCK_N": 64}
_M32_N64 = {"BLOCK_M": 32, "BLOCK_N": 64}
_M64_N32 = {"BLOCK_M": 64, "BLOCK_N": 32}
_M32_N32 = {"BLOCK_M": 32, "BLOCK_N": 32}
_B16_X128 = {"BLOCK_B": 16, "BLOCK_X": 128}
GATED_ATTENTION: tuple[Row, ...] = (
    row("gated_attention_fwd", "default", "half", "d64", _M64_N64, 4, 2),
    row("gated_attention_fwd", "default", "half", "d128", _M64_N32, 4, 2),
    row("gated_attention_fwd", "default", "float", "d64", _M32_N32, 4, 2),
    row("gated_attention_fwd", "default", "float", "d128", _M32_N32, 4, 2),
    row("gated_attention_fwd", "sm_90", "half", "d64", _M128_N64, 8, 2, 128),
    row("gated_attention_fwd", "sm_90", "half", "d128", _M64_N64, 4, 2),
    row("gated_attention_dq", "default", "half", "d64", _M64_N64, 4, 2),
    row("gated_attention_dq", "default", "half", "d128", _M64_N32, 4, 2),
    row("gated_attention_dq", "default", "float", "d64", _M32_N32, 4, 2),
    row("gated_attention_dq", "default", "float", "d128", _M32_N32, 4, 2),
    row("gated_attention_dq", "sm_80", "half", "d128", _M32_N32, 4, 2),
    row("gated_attention_dq", "sm_90", "half", "d64", _M64_N64, 4, 2, 168),
    row("gated_attention_dq", "sm_90", "half", "d128", _M64_N64, 4, 2),
    row("gated_attention_dkv", "default", "half", "d64", _M32_N64, 4, 2),
    row("gated_attention_dkv", "default", "half", "d128", _M32_N64, 4, 2),
    row("gated_attention_dkv", "default", "float", "d64", _M32_N32, 4, 2),
    row("gated_attention_dkv", "default", "float", "d128", _M32_N32, 4, 2),
    row("gated_attention_prompt_sum", "default", "float", "all", _B16_X128, 4, 2),
)


LAUNCHES: tuple[Row, ...] = (*GATED_ATTENTION,)


# Matching: rows and columns of a tile are 8 * HALVES and 32 * SLICES, one warp per slice; a whole
# row stays in registers. The bucket is the largest C. Fewer warps share a row with less to add up;
# more of them hold a wider row without spills. Offline on sm_90 at C = 768 (registers, programs per
# multiprocessor, bound of the busiest pipe): forward 4 warps 194, 2, 21 us; 8 warps 30 us; 2 warps
# spill. Gradient of x: 8 warps 178, 1, 17 us; 4 warps spill for float16.
_SLICES = {"c192": (1, 2), "c384": (2, 4), "c768": (4, 8), "c4096": (8, 8)}
_WIDE_SLICES = {"c192": (2, 4), "c384": (4, 8), "c768": (8, 8), "c4096": (8, 8)}
MATCHING: tuple[Row, ...] = (
    *(
        row(f"{name}_{kernel}", DEFAULT, dtype_class, bucket, {"HALVES": 2, "SLICES": n}, n, 1)
        for dtype_class, table in (("half", _SLICES), ("float", _WIDE_SLICES))
        for bucket, both in table.items()
        for kernel, n in zip(("fwd", "dx"), both, strict=True)
        for name in ("match_prompts", "norm_match")
    ),
    *(
        row("match_keys_bwd", DEFAULT, dtype_class, bucket, blocks, 8, 2)
        for dtype_class in ("half", "float")
        for bucket in _SLICES
        for blocks in ({"BLOCK_M": 32, "BLOCK_C": 256, "STEPS": 8},)
    ),
)
LAUNCHES += MATCHING


@functools.cache
def _table() -> Mapping[tuple[str, str, str, str], Launch]:
    table = {key: launch for *key_parts, launch in LAUNCHES for key in (tuple(key_parts),)}
    if len(table) != len(LAUNCHES):
        raise ValueError("LAUNCHES: two rows have the same operation, architecture, dtype, bucket")
    return table


@functools.cache
def choose_launch(operation: str, *, architecture: str, dtype: torch.dtype, bucket: str) -> Launch:
    """Return the launch of a kernel; unknown hardware gets the "default" row and one log line.

    Args:
        operation: name of the kernel in the table.
        architecture: from `architecture_of`.
        dtype: of the inputs: float16, bfloat16 or float32.
        bucket: the operation's name for a range of shapes.

    Raises:
        LookupError: the table has no such operation, dtype or bucket.
    """
    table, dtype_class = _table(), DTYPE_CLASSES.get(dtype, str(dtype))
    launch = table.get((operation, architecture, dtype_class, bucket))
    if launch is not None:
        return launch
    launch = table.get((operation, DEFAULT, dtype_class, bucket))
    if launch is None:
        raise LookupError(
            f"launch table: no row for {operation!r}, {dtype_class!r}, bucket {bucket!r}; "
            "add a 'default' row to kernels/launch.py"
        )
    _announce(architecture)
    return launch


@functools.cache
def _announce(architecture: str) -> None:
    """Say once per process that an architecture has no rows of its own."""
    known = {name for _, name, _, _, _ in LAUNCHES}
    if architecture not in known and architecture != "interpreter":
        _log.info("no launch table for %s: using the default launches", architecture)


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Name the architecture: "sm_90" (CUDA), "gfx942" (ROCm), "interpreter" or the device type."""
    if device.type == "cuda":
        if torch.version.hip is not None:
            return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return "interpreter" if interpreting() else device.type


def interpreting() -> bool:
    """Tell whether Triton runs kernels in its interpreter, on tensors of any device."""
    return _INTERPRETING


__all__ = [
    "LAUNCHES",
    "Launch",
    "Part",
    "StaticCase",
    "architecture_of",
    "choose_launch",
    "interpreting",
    "row",
    "static_signature",
]
