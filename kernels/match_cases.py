"""What to compile of prompt matching without a device: the promised shapes and their work."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton

from .launch import Launch, choose_launch
from .match_backward import match_prompts_dx_kernel
from .match_forward import match_prompts_fwd_kernel
from .match_keys import match_prompts_dkeys_kernel
from .match_tiles import held
from .matching import bucket_of
from .static_case import Executed, Part, StaticCase, static_signature


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One promised shape; batch and tokens are run-time numbers of the same kernel."""

    name: str
    width: int
    block_r: int = 32
    """Entries of the larger pool, rounded up to a power of two."""
    batch: int = 128
    tokens: int = 197
    words: int = 2


SHAPES = (
    Shape(name="vit-t", width=192),
    Shape(name="vit-s", width=384),
    Shape(name="vit-b", width=768),
    Shape(name="vit-l", width=1024),
    Shape(name="vit-h", width=1280),
)
POINTERS = MappingProxyType(
    {
        "p_weight": "*fp32",
        "p_bias": "*fp32",
        "p_keys": "*fp16",
        "p_given": "*i32",
        "p_gate": "*i32",
        "p_partial": "*fp32",
        "p_stats": "*fp32",
        "p_ddistance": "*fp32",
    }
)
FLOATS = ("eps", "cls_count", "image_count")


def static_cases(architecture: str, dtype: torch.dtype) -> Iterator[StaticCase]:
    """Yield the kernels that the promised shapes launch."""
    for shape in SHAPES:
        for norm in (True, False):
            yield _fwd_case(shape, architecture, dtype, norm)
            yield _dx_case(shape, architecture, dtype, norm)
        yield _dkeys_case(shape, architecture, dtype)


def _fwd_case(shape: Shape, architecture: str, dtype: torch.dtype, norm: bool) -> StaticCase:
    operation = "norm_match_fwd" if norm else "match_prompts_fwd"
    launch = _launch(operation, shape, architecture, dtype)
    flags = {"NORM": norm, "WEIGHT": norm, "BIAS": norm, "GIVEN": False, "FARTHEST": False}
    # Two loads of 16 bytes; two products of 16 columns with both parts of the keys.
    trips = (*_passes(shape, launch, 2, 4), shape.words)
    part = Part(programs=_tiles(shape, 8 * launch.blocks["HALVES"]), trips=trips)
    return _case(operation, match_prompts_fwd_kernel, shape, dtype, flags, launch, part)


def _dx_case(shape: Shape, architecture: str, dtype: torch.dtype, norm: bool) -> StaticCase:
    operation = "norm_match_dx" if norm else "match_prompts_dx"
    launch = _launch(operation, shape, architecture, dtype)
    flags = {"NORM": norm, "WEIGHT": norm, "MATCH": True}
    # x, the upstream and the weight; 32 entries are two products for each part of the keys.
    trips = _passes(shape, launch, 6, 2 if dtype == torch.bfloat16 else 4)
    if not norm:
        trips = trips[1:]
    part = Part(programs=_tiles(shape, 8 * launch.blocks["HALVES"]), trips=trips)
    return _case(operation, match_prompts_dx_kernel, shape, dtype, flags, launch, part)


def _dkeys_case(shape: Shape, architecture: str, dtype: torch.dtype) -> StaticCase:
    launch = _launch("match_keys_bwd", shape, architecture, dtype)
    steps = launch.blocks["STEPS"]
    slabs = _tiles(shape, launch.blocks["BLOCK_M"] * steps)
    columns = triton.cdiv(shape.width, launch.blocks["BLOCK_C"])
    part = Part(programs=slabs * columns, trips=(steps,))
    return _case("match_keys_bwd", match_prompts_dkeys_kernel, shape, dtype, {}, launch, part)


def _passes(shape: Shape, launch: Launch, loads: int, products: int) -> tuple[Executed, ...]:
    """Loops over columns: none where rows are held in registers.

    `loads` and `products` are those of 32 columns, in the pass of the moments and in the second.
    """
    if held(launch.blocks["HALVES"]):
        return ()
    chunks = shape.width // 32
    return Executed("LDG", loads * chunks), Executed("HGMMA", products * chunks)


def _launch(operation: str, shape: Shape, architecture: str, dtype: torch.dtype) -> Launch:
    bucket = bucket_of(shape.width)
    return choose_launch(operation, architecture=architecture, dtype=dtype, bucket=bucket)


def _tiles(shape: Shape, rows: int) -> int:
    """Tiles of the CLS tokens and of the patches."""
    patches = shape.batch * (shape.tokens - 1)
    return triton.cdiv(shape.batch, rows) + triton.cdiv(patches, rows)


def _case(
    operation: str, kernel: object, shape: Shape, dtype: torch.dtype,
    flags: dict[str, object], launch: Launch, part: Part,
) -> StaticCase:  # fmt: skip
    constants = {**flags, "C": shape.width, "BLOCK_R": shape.block_r, **launch.blocks}
    signature = static_signature(kernel, dtype, constants, POINTERS)
    signature |= {name: "fp32" for name in FLOATS if name in signature}
    unaligned = tuple(name for name in ("stride_gb", "stride_gl", "stride_gw") if name in signature)
    return StaticCase(
        name=f"{operation} {shape.name}", kernel=kernel, signature=signature, constants=constants,
        launch=launch, promised=True, parts=(part,), unaligned=unaligned,
    )  # fmt: skip


__all__ = ["SHAPES", "Shape", "static_cases"]
