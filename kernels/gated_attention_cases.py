"""What to compile of gated attention without a device: the promised shapes and their work."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from .attention_inputs import TAIL_ROWS, block_d, bucket_of, tail_rows
from .common import precision_of
from .gated_attention import gated_attention_fwd_kernel
from .gated_attention_backward import gated_attention_dkv_kernel, gated_attention_dq_kernel
from .gated_attention_gradients import prompt_sum_kernel
from .launch import Launch, choose_launch
from .static_case import Part, StaticCase, static_signature

POINTERS = {
    "p_gate": "*i32",
    "p_lse": "*fp32",
    "p_delta": "*fp32",
    "p_dkp": "*fp32",
    "p_dvp": "*fp32",
    "p_partial": "*fp32",
}

# No row of keys lies before this one: compiled in, it leaves the blocks of tokens alone.
NO_MIXED_KEYS = -(2**31)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One promised shape; the batch and the heads are run-time numbers of the same kernel."""

    name: str
    """Model and resolution."""
    queries: int
    """Lq."""
    tokens: int
    """L."""
    head_dim: int = 64
    """D."""
    prompts: int = 36
    """P."""
    heads: int = 12
    """H, for the work of one launch."""
    batch: int = 128
    """B, for the work of one launch."""


VIT_B = Shape(name="vit_b16_224", queries=197, tokens=197)
SHAPES = (
    VIT_B,
    Shape(name="vit_b16_384", queries=577, tokens=577),
    Shape(name="vit_b14_reg4_224", queries=261, tokens=261),
    Shape(name="vit_h14_224", queries=257, tokens=257, head_dim=80, heads=16),
    Shape(name="vit_b16_224_cls", queries=1, tokens=197),
)


def static_cases(architecture: str, dtype: torch.dtype) -> Iterator[StaticCase]:
    """Yield the kernels that the promised shapes launch; ViT-S and ViT-L run those of ViT-B."""
    for shape in SHAPES:
        yield _fwd_case(shape, architecture, dtype)
        yield _dq_case(shape, architecture, dtype)
        yield _dkv_case(shape, architecture, dtype, only_prompts=False)
    yield _dkv_case(VIT_B, architecture, dtype, only_prompts=True)
    yield _sum_case(VIT_B, architecture, dtype)


def _fwd_case(shape: Shape, architecture: str, dtype: torch.dtype) -> StaticCase:
    return _query_case(
        "gated_attention_fwd", gated_attention_fwd_kernel, shape, architecture, dtype
    )


def _dq_case(shape: Shape, architecture: str, dtype: torch.dtype) -> StaticCase:
    return _query_case("gated_attention_dq", gated_attention_dq_kernel, shape, architecture, dtype)


def _query_case(
    operation: str, kernel: object, shape: Shape, architecture: str, dtype: torch.dtype
) -> StaticCase:
    """A kernel whose programs own blocks of queries."""
    launch = _launch(operation, shape, architecture, dtype)
    block_m, block_n = launch.blocks["BLOCK_M"], launch.blocks["BLOCK_N"]
    tail = tail_rows(shape.queries, block_m)
    end_mixed = triton.cdiv(_first_token(shape, block_n), block_n) * block_n
    constants = {**_constants(shape, dtype, launch), "END_MIXED": end_mixed, "TAIL": tail}
    heads = shape.batch * shape.heads
    free = (shape.tokens + _first_token(shape, block_n) - end_mixed) / block_n
    # A single mixed block is no loop.
    trips = (free,) if end_mixed <= block_n else (end_mixed / block_n, free)
    full = triton.cdiv(shape.queries, block_m) - (tail > 0)
    parts = [Part(programs=heads * full, trips=trips, constants={"TAIL": 0})] if full else []
    if tail:
        only_tail = {"TAIL": 0, "BLOCK_M": TAIL_ROWS}
        parts.append(Part(programs=heads, trips=trips, constants=only_tail))
    return _case(operation, shape, kernel, dtype, constants, launch, tuple(parts))


def _dkv_case(
    shape: Shape, architecture: str, dtype: torch.dtype, *, only_prompts: bool
) -> StaticCase:
    """The kernel whose programs own blocks of keys."""
    launch = _launch("gated_attention_dkv", shape, architecture, dtype)
    block_n = launch.blocks["BLOCK_N"]
    first_token = _first_token(shape, block_n)
    blocks = triton.cdiv(shape.prompts if only_prompts else first_token + shape.tokens, block_n)
    mixed = min(triton.cdiv(first_token, block_n), blocks)
    steps = triton.cdiv(shape.queries, launch.blocks["BLOCK_M"])
    needs = {"NEED_DK": not only_prompts, "NEED_DV": not only_prompts}
    constants = {
        **_constants(shape, dtype, launch), **needs, "NEED_DKP": True, "NEED_DVP": True,
        "OWN_DELTA": only_prompts,
    }  # fmt: skip
    heads = shape.batch * shape.heads
    only_mixed = {"num_blocks": 1, "first_token": first_token}
    parts = (Part(programs=heads * mixed, trips=(steps,), constants=only_mixed),)
    if blocks > mixed:
        only_tokens = Part(
            programs=heads * (blocks - mixed),
            trips=(steps,),
            constants={"first_token": NO_MIXED_KEYS},
        )
        parts = (*parts, only_tokens)
    name = "gated_attention_dkv" + "_prompts" * only_prompts
    kernel = gated_attention_dkv_kernel
    return _case(name, shape, kernel, dtype, constants, launch, parts)


def _sum_case(shape: Shape, architecture: str, dtype: torch.dtype) -> StaticCase:
    """The sum over the batch for shared prompts."""
    operation = "gated_attention_prompt_sum"
    launch = choose_launch(operation, architecture=architecture, dtype=torch.float32, bucket="all")
    constants = {"D": shape.head_dim, **launch.blocks}
    columns = triton.cdiv(shape.heads * shape.prompts * shape.head_dim, constants["BLOCK_X"])
    trips = (shape.batch / constants["BLOCK_B"],)
    parts = (Part(programs=2 * columns, trips=trips),)
    return _case(operation, shape, prompt_sum_kernel, dtype, constants, launch, parts, False)


def _case(
    operation: str, shape: Shape, kernel: object, dtype: torch.dtype,
    constants: dict[str, object], launch: Launch, parts: tuple[Part, ...], tensor_core: bool = True,
) -> StaticCase:  # fmt: skip
    return StaticCase(
        name=f"{operation}/{shape.name}", kernel=kernel,
        signature=static_signature(kernel, dtype, constants, POINTERS),
        constants=constants, launch=launch, promised=True, tensor_core=tensor_core, parts=parts,
        unaligned=("stride_gb", "stride_gl"),
    )  # fmt: skip


def _launch(operation: str, shape: Shape, architecture: str, dtype: torch.dtype) -> Launch:
    bucket = bucket_of(shape.head_dim)
    return choose_launch(operation, architecture=architecture, dtype=dtype, bucket=bucket)


def _first_token(shape: Shape, block_n: int) -> int:
    return shape.prompts + -(shape.prompts + shape.tokens) % block_n


def _constants(shape: Shape, dtype: torch.dtype, launch: Launch) -> dict[str, object]:
    """The compile-time arguments of a gated kernel, as `AttentionInputs.constants` makes them."""
    return {
        "GATED": True,
        "VISIBLE": False,
        "PRECISION": precision_of(dtype),
        "NUM_WORDS": triton.cdiv(shape.prompts, 32),
        "D": shape.head_dim,
        "BLOCK_D": block_d(shape.head_dim),
        **launch.blocks,
    }


__all__ = ["SHAPES", "Shape", "static_cases"]
