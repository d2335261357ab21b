"""Launch configurations as data: block sizes, warps and pipeline stages of every kernel.

One row per operation, architecture, dtype class and shape bucket. Nothing is tuned at run time:
`choose_launch` takes the same row on every run, so results are reproducible to the bit. Rows in
this file are reasoned from offline compilation; `tcpa-bench tune` measures rows on a device and
writes them to launches/ARCHITECTURE.json, which go before those here.

An operation names one kernel ("gated_attention_fwd"). A bucket is a word that the operation's host
code derives from its shapes ("short", "long"). The dtype class is "half" (float16, bfloat16) or
"float" (float32). The architecture is what `architecture_of` returns, or "default", which serves
every device without a row of its own; every (operation, dtype class, bucket) has a "default" row.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any

import torch
import triton

_log = logging.getLogger("tcpa.kernels")

DTYPE_CLASSES = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "float"}
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
DEFAULT = "default"
FOLDER = Path(__file__).parent / "launches"
"""Where the measured launches are, one file per architecture; it may be absent."""

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
# (registers, shared memory -> CTAs per SM; none of them spills): forward 128
# queries: 126, 64 KB -> 2 of 8 warps; it reads K and V half as often from L2 as 64 queries do
# (124 -> 3 of 4 warps). dq 64 queries: 151, 57 KB -> 3. dkv 64 keys against 32 queries: 168,
# 33 KB -> 3, where 64 queries take 247 -> 2. Eight warps never share 64 rows: the products would be
# computed twice. float32 products run on the ordinary units: small blocks, few registers. Rows of
# dkv with one stage spill neither with Triton 3.9 nor with 3.6, where two stages do; at head dim 80
# on sm_80 that needs 64 queries and 32 keys (bound 1295 us against 1122).
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
    row("gated_attention_dkv", "sm_80", "half", "d64", _M32_N64, 4, 1),
    row("gated_attention_dkv", "sm_80", "half", "d128", _M64_N32, 4, 1),
    row("gated_attention_dkv", "sm_90", "half", "d128", _M32_N64, 4, 1),
    row("gated_attention_dkv", "gfx942", "half", "d128", _M32_N64, 4, 1),
    row("gated_attention_prompt_sum", "default", "float", "all", _B16_X128, 4, 2),
)


LAUNCHES: tuple[Row, ...] = (*GATED_ATTENTION,)


# Matching: rows and columns of a tile are 8 * HALVES and 32 * SLICES. Two halves are held in
# registers, one warp per slice: fewer warps share a row with less to add up, more of them hold a
# wider row without spills. More halves fill the 64 rows that wgmma takes and are read twice; they
# read the keys a quarter as often. Offline on sm_90 at C = 768 in bfloat16 (registers, programs per
# multiprocessor, bound of the busiest pipe), held and read twice: norm_match forward 194, 2, 21 us
# and 130, 3, 16 us; its dx 170, 1, 17 us and 139, 3, 20 us; match_prompts forward 144, 3, 14 us
# and 128, 4, 10 us; its dx (which reads once) 64, 4, 11 us and 64, 8, 7 us. The bound does not
# count device memory: that a second reading comes from the L2 cache is for a measurement to show.
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
        row(f"{name}_{kernel}", "sm_90", "half", bucket, {"HALVES": 8, "SLICES": 1}, 4, 1)
        for bucket in _SLICES
        for kernel in ("fwd", "dx")
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


MeasuredKey = tuple[str, str, str]
_FIELDS = {
    "operation": str,
    "dtype": str,
    "bucket": str,
    "blocks": dict,
    "num_warps": int,
    "num_stages": int,
    "max_registers": (int, NoneType),
    "median_us": (int, float),
    "previous_us": (int, float, NoneType),
}


def read_measured(path: Path) -> dict[MeasuredKey, dict[str, Any]]:
    """Return the rows of a file of measured launches by operation, dtype ("bf16") and bucket.

    Raises:
        ValueError: the file is damaged; the message names it, the field and the remedy.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, "content", f"no JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise _damaged(path, "rows", "missing")
    if content.get("architecture") != path.stem:
        got = repr(content.get("architecture"))
        raise _damaged(path, "architecture", f"got {got}, expected {path.stem!r}")
    found = {}
    for i, line in enumerate(content["rows"]):
        bad = _bad_field(line)
        if bad is not None:
            raise _damaged(path, f"rows[{i}].{bad[0]}", bad[1])
        found[line["operation"], line["dtype"], line["bucket"]] = line
    return found


def _damaged(path: Path, name: str, problem: str) -> ValueError:
    remedy = "delete the file or run `tcpa-bench tune` again"
    return ValueError(f"{path}: {name}: {problem}; {remedy}")


def _bad_field(line: object) -> tuple[str, str] | None:
    """Return the first field of a measured row that cannot be used, and why."""
    for name, kinds in _FIELDS.items():
        if not isinstance(line, dict) or name not in line:
            return name, "missing"
        if not isinstance(line[name], kinds):
            return name, f"got {line[name]!r}"
    operation, dtype, bucket = line["operation"], line["dtype"], line["bucket"]
    if operation not in {known for known, *_ in LAUNCHES}:
        return "operation", f"unknown {operation!r}"
    classes = {DTYPE_NAMES[known]: name for known, name in DTYPE_CLASSES.items()}
    if dtype not in classes:
        return "dtype", f"unknown {dtype!r}"
    default = _table().get((operation, DEFAULT, classes[dtype], bucket))
    if default is None:
        return "bucket", f"unknown {bucket!r} for {operation!r} in {dtype!r}"
    if line["blocks"].keys() != default.blocks.keys():
        return "blocks", f"got {sorted(line['blocks'])}, expected {sorted(default.blocks)}"
    counts = {name: line[name] for name in ("num_warps", "num_stages", "max_registers")}
    for name, count in {**counts, **line["blocks"]}.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            return "blocks" if name in default.blocks else name, f"got {count!r} for {name}"
    return None


@functools.cache
def _measured(architecture: str) -> Mapping[MeasuredKey, Launch]:
    """Return the measured launches of an architecture; empty where nobody measured."""
    rows = read_measured(FOLDER / f"{architecture}.json")
    return {
        key: Launch(
            blocks=MappingProxyType(line["blocks"]),
            num_warps=line["num_warps"],
            num_stages=line["num_stages"],
            max_registers=line["max_registers"],
        )
        for key, line in rows.items()
    }


def forget_measured() -> None:
    """Read the files of measured launches again at the next launch."""
    _measured.cache_clear()
    choose_launch.cache_clear()


_OVERRIDES: dict[str, Launch] = {}


@contextlib.contextmanager
def override(operation: str, launch: Launch) -> Iterator[None]:
    """Launch one operation like this, whatever its dtype and bucket, in all threads."""
    if operation not in {known for known, *_ in LAUNCHES}:
        raise LookupError(f"launch table: no operation {operation!r} to override")
    before = dict(_OVERRIDES)
    _OVERRIDES[operation] = launch
    choose_launch.cache_clear()
    try:
        yield
    finally:
        _OVERRIDES.clear()
        _OVERRIDES.update(before)
        choose_launch.cache_clear()


@functools.cache
def choose_launch(operation: str, *, architecture: str, dtype: torch.dtype, bucket: str) -> Launch:
    """Return the launch of a kernel; unknown hardware gets the "default" row and one log line.

    A launch in force by `override` comes first, then one measured on this architecture, then rows
    of this file.

    Args:
        operation: name of the kernel in the table.
        architecture: from `architecture_of`.
        dtype: of the inputs: float16, bfloat16 or float32.
        bucket: the operation's name for a range of shapes.

    Raises:
        LookupError: the table has no such operation, dtype or bucket.
        ValueError: the file of measured launches is damaged.
    """
    if operation in _OVERRIDES:
        return _OVERRIDES[operation]
    launch = _measured(architecture).get((operation, DTYPE_NAMES.get(dtype, ""), bucket))
    if launch is not None:
        return launch
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
    if _measured(architecture) or architecture == "interpreter":
        return
    if architecture not in known:
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
    "DTYPE_NAMES",
    "FOLDER",
    "LAUNCHES",
    "Launch",
    "architecture_of",
    "choose_launch",
    "forget_measured",
    "interpreting",
    "override",
    "read_measured",
    "row",
]
