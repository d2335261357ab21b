"""What to compile without a device: the kernels that the promised shapes launch.

Batch and number of tokens are run-time numbers of the same kernel; a sequence decides only how many
rows the last block of queries has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton

from ...kernels.attention import inputs as attention
from ...kernels.attention.backward import gated_attention_dq_kernel
from ...kernels.attention.forward import gated_attention_fwd_kernel
from ...kernels.attention.keys import gated_attention_dkv_kernel, prompt_sum_kernel
from ...kernels.launch import DTYPE_NAMES, Launch, choose_launch
from ...kernels.matching import inputs as matching
from ...kernels.matching.backward import match_prompts_dx_kernel
from ...kernels.matching.forward import match_prompts_fwd_kernel
from ...kernels.matching.keys import match_prompts_dkeys_kernel

POINTERS = {
    "p_delta": "*fp32",
    "p_ddistance": "*fp32",
    "p_dkp": "*fp32",
    "p_dvp": "*fp32",
    "p_gate": "*i32",
    "p_given": "*i32",
    "p_lse": "*fp32",
    "p_partial": "*fp32",
    "p_stats": "*fp32",
    "p_weight": "*fp32",
    "p_bias": "*fp32",
    "p_keys": "*fp16",
}
"""Arguments that do not point to the dtype of the operation."""
FLOATS = ("scale", "scale_log2", "eps", "cls_count", "image_count")
UNALIGNED = ("stride_gb", "stride_gl", "stride_gw")
"""Strides that are no multiples of 16; all others are, like all pointers."""


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
    promised: bool = True
    """Whether spills or missing tensor-core instructions are a failure."""
    tensor_core: bool = True
    """Whether the kernel multiplies matrices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromisedAttention:
    """One promised shape of gated attention, its gate given."""

    name: str
    """Model and resolution."""
    queries: int
    tokens: int
    head_dim: int = 64
    prompts: int = 36


VIT_B = PromisedAttention(name="vit_b16_224", queries=197, tokens=197)
ATTENTION = (
    VIT_B,
    PromisedAttention(name="vit_b16_384", queries=577, tokens=577),
    PromisedAttention(name="vit_b14_reg4_224", queries=261, tokens=261),
    PromisedAttention(name="vit_h14_224", queries=257, tokens=257, head_dim=80),
    PromisedAttention(name="vit_b16_224_cls", queries=1, tokens=197),
)
"""ViT-S and ViT-L run the kernels of ViT-B."""
WIDTHS = {"vit-t": 192, "vit-s": 384, "vit-b": 768, "vit-l": 1024, "vit-h": 1280}
"""C of the promised shapes of matching."""
BLOCK_R = 32
"""Entries of the larger pool, 18, rounded up to a power of two."""


def static_cases(architecture: str, dtype: torch.dtype) -> Iterator[StaticCase]:
    """Yield the kernels that the promised shapes launch."""
    for shape in ATTENTION:
        yield _query_case("fwd", gated_attention_fwd_kernel, shape, architecture, dtype)
        yield _query_case("dq", gated_attention_dq_kernel, shape, architecture, dtype)
        yield _dkv_case(shape, architecture, dtype, only_prompts=False)
    yield _dkv_case(VIT_B, architecture, dtype, only_prompts=True)
    yield _sum_case(VIT_B, architecture, dtype)
    for name, width in WIDTHS.items():
        for operation in ("norm_match", "match_prompts"):
            affine = dict.fromkeys(("NORM", "WEIGHT"), operation == "norm_match")
            forward = {**affine, "BIAS": affine["NORM"], "GIVEN": False, "FARTHEST": False}
            for what, kernel, flags in (
                ("fwd", match_prompts_fwd_kernel, forward),
                ("dx", match_prompts_dx_kernel, {**affine, "MATCH": True}),
            ):
                launch = match_launch(f"{operation}_{what}", width, architecture, dtype)
                constants = {**flags, "C": width, "BLOCK_R": BLOCK_R, **launch.blocks}
                yield make_case(f"{operation}_{what} {name}", kernel, dtype, constants, launch)
        launch = match_launch("match_keys_bwd", width, architecture, dtype)
        constants = {"C": width, "BLOCK_R": BLOCK_R, **launch.blocks}
        name = f"match_keys_bwd {name}"
        yield make_case(name, match_prompts_dkeys_kernel, dtype, constants, launch)


def make_case(
    name: str,
    kernel: object,
    dtype: torch.dtype,
    constants: Mapping[str, object],
    launch: Launch,
    *,
    tensor_core: bool = True,
    pointers: Mapping[str, str] = MappingProxyType({}),
) -> StaticCase:
    """Type a kernel's arguments by their names.

    `p_...` points to `dtype` unless `pointers` or POINTERS say otherwise; anything else that is
    neither a constant nor in FLOATS is an integer.
    """
    pointers = {**POINTERS, **pointers}

    def type_of(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument.startswith("p_"):
            return pointers.get(argument, f"*{DTYPE_NAMES[dtype]}")
        return "fp32" if argument in FLOATS else "i32"

    names = kernel.arg_names  # pyright: ignore[reportAttributeAccessIssue]
    return StaticCase(
        name=name,
        kernel=kernel,
        signature={argument: type_of(argument) for argument in names},
        constants=constants,
        launch=launch,
        tensor_core=tensor_core,
    )


def attention_launch(
    operation: str, shape: PromisedAttention, architecture: str, dtype: torch.dtype
) -> Launch:
    """Return the launch of a gated attention."""
    bucket = attention.bucket_of(shape.head_dim)
    return choose_launch(operation, architecture=architecture, dtype=dtype, bucket=bucket)


def match_launch(operation: str, width: int, architecture: str, dtype: torch.dtype) -> Launch:
    """Return the launch of a matching."""
    bucket = matching.bucket_of(width)
    return choose_launch(operation, architecture=architecture, dtype=dtype, bucket=bucket)


def _query_case(
    what: str, kernel: object, shape: PromisedAttention, architecture: str, dtype: torch.dtype
) -> StaticCase:
    """A kernel whose programs own blocks of queries."""
    operation = f"gated_attention_{what}"
    launch = attention_launch(operation, shape, architecture, dtype)
    block_m, block_n = launch.blocks["BLOCK_M"], launch.blocks["BLOCK_N"]
    first_token = shape.prompts + -(shape.prompts + shape.tokens) % block_n
    constants = {
        **_constants(shape, dtype, launch),
        "END_MIXED": triton.cdiv(first_token, block_n) * block_n,
        "TAIL": attention.tail_rows(shape.queries, block_m),
    }
    return make_case(f"{operation}/{shape.name}", kernel, dtype, constants, launch)


def _dkv_case(
    shape: PromisedAttention, architecture: str, dtype: torch.dtype, *, only_prompts: bool
) -> StaticCase:
    """The kernel whose programs own blocks of keys."""
    launch = attention_launch("gated_attention_dkv", shape, architecture, dtype)
    constants = {
        **_constants(shape, dtype, launch),
        **dict.fromkeys(("NEED_DK", "NEED_DV"), not only_prompts),
        **dict.fromkeys(("NEED_DKP", "NEED_DVP"), True),
        "OWN_DELTA": only_prompts,
    }
    name = f"gated_attention_dkv{'_prompts' * only_prompts}/{shape.name}"
    return make_case(name, gated_attention_dkv_kernel, dtype, constants, launch)


def _sum_case(shape: PromisedAttention, architecture: str, dtype: torch.dtype) -> StaticCase:
    """The sum over the batch for shared prompts."""
    operation = "gated_attention_prompt_sum"
    launch = choose_launch(operation, architecture=architecture, dtype=torch.float32, bucket="all")
    constants = {"D": shape.head_dim, **launch.blocks}
    name = f"{operation}/{shape.name}"
    return make_case(name, prompt_sum_kernel, dtype, constants, launch, tensor_core=False)


def _constants(shape: PromisedAttention, dtype: torch.dtype, launch: Launch) -> dict[str, object]:
    """The compile-time arguments of a gated kernel, as `AttentionInputs.constants` makes them."""
    return {
        "GATED": True,
        "VISIBLE": False,
        "PRECISION": attention.precision_of(dtype),
        "NUM_WORDS": triton.cdiv(shape.prompts, 32),
        "D": shape.head_dim,
        "BLOCK_D": attention.block_d(shape.head_dim),
        **launch.blocks,
    }
