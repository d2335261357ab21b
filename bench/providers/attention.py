"""Who computes gated attention in the race: this library, the official algorithm, compositions.

A provider is data: its name, what it needs, and how to prepare its call on a case. Each computes
`tcpa.gated_attention(q, k, v, k_prompt, v_prompt, gate)` and the gradients of all five tensors; it
is compared with the float64 reference before it may be timed. Providers that compute another
function, as floors, say so.

What is equal for all, and where in doubt in favour of the others:

- q, k and v are views of the packed output of one linear layer; the result is `[B, L, H * D]`,
  dense, as the projection takes it.
- The gate comes in the form that the provider likes best, made before the clock starts.
- The official algorithm and ungated attention get tokens and prompts as one packed sequence, as
  their linear layer leaves it: they pay neither for the concatenation nor for the sum of shared
  prompts' gradients over the batch.

Axes: B batch, H heads, L tokens, P prompt rows, S = L + P keys, D head dim, W gate words.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import gated_attention
from ...cpu import sdpa_unavailable_reason
from ..harness.case import DTYPES
from ..harness.provider import Outputs, Prepared, Provider, compiled, eager, no_kernels
from .attention_case import AttentionCase, heads, prepared, rows
from .compositions import (
    CPU_FLASH,
    CUDA_FLASH,
    CUDNN,
    FlashPair,
    prepare_duplicated_flex,
    prepare_duplicated_sdpa,
    prepare_lse_merge,
    prepare_merged_statistics,
)

# The official algorithm ---------------------------------------------------------------------------


def _official(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend with all S queries to all S keys, drop the prompts' rows, multiply by the mask.

    Softmax and mask are float32 even where products are in half precision, as under its autocast.
    """
    q, k, v = heads(q, k, v)
    dtype = torch.promote_types(q.dtype, torch.float32)
    probs = torch.softmax((q @ k.mT) * scale, dim=-1, dtype=dtype)
    # Rows of tokens come first here, which spares it a copy.
    probs = probs[:, :, : mask.shape[2]] * mask
    return rows(probs.to(v.dtype) @ v)


def _prepare_official(
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]], case: AttentionCase, training: bool
) -> Prepared:
    leaves = case.sequence(training)
    shape, dtype = case.shape, torch.promote_types(case.dtype, torch.float32)
    # [B, H, L, S]
    seen = F.pad(case.visible, (shape.tokens, 0), value=True).to(dtype)
    mask = seen.expand(shape.batch, shape.vit.heads, -1, -1).contiguous()
    attend = wrap(_official)
    return Prepared(
        forward=lambda: (attend(*leaves, mask, case.scale),),
        leaves=leaves,
        upstream=(case.upstream,),
        read=case.read_sequence,
    )


# Floor and ours -----------------------------------------------------------------------------------


def _prepare_ungated(back_end: SDPBackend | None, case: AttentionCase, training: bool) -> Prepared:
    """Attend to all keys, without a gate; the queries of the prompts are left out."""
    _, k, v = case.sequence(training)
    q = case.leaves(training)[0]

    def forward() -> Outputs:
        with nullcontext() if back_end is None else sdpa_kernel(back_end):
            query, key, value = heads(q, k, v)
            out = F.scaled_dot_product_attention(query, key, value, scale=case.scale)
        return (rows(out),)

    return Prepared(
        forward=forward, leaves=(q, k, v), upstream=(case.upstream,), read=case.read_sequence
    )


def _prepare_ours(impl: Any, gated: bool, case: AttentionCase, training: bool) -> Prepared:
    gate = case.gate if gated else None
    return prepared(
        case, training, lambda *tensors: gated_attention(*tensors, gate=gate, impl=impl).flatten(2)
    )


_BACK_ENDS: dict[str, tuple[SDPBackend | None, tuple[str, ...]]] = {
    "default": (None, ("cpu", "cuda")),
    "flash": (SDPBackend.FLASH_ATTENTION, ("cuda",)),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, ("cuda",)),
    "math": (SDPBackend.MATH, ("cpu", "cuda")),
}
"""Of `scaled_dot_product_attention`, and where they are; the CPU's default is its flash kernel."""

_HALF = ("bf16", "fp16")
_FLASH: dict[str, tuple[FlashPair, str, tuple[str, ...]]] = {
    "flash for the CPU": (CPU_FLASH, "cpu", tuple(DTYPES)),
    "flash": (CUDA_FLASH, "cuda", _HALF),
    "cudnn": (CUDNN, "cuda", _HALF),
}
_NO_FLEX_GRADIENTS = {"cpu": "FlexAttention has no backward on the CPU"}

PROVIDERS: tuple[Provider, ...] = (
    Provider(name="official", role="official", prepare=functools.partial(_prepare_official, eager)),
    Provider(
        name="official, compiled",
        role="official",
        prepare=functools.partial(_prepare_official, compiled),
    ),
    Provider(
        name="composition A, LSE merge",
        role="composition",
        back_end="flex",
        prepare=prepare_lse_merge,
        devices=("cuda",),
        dtypes=("bf16", "fp16", "fp32"),
        needs_prompts=True,
    ),
    *(
        Provider(
            name="composition C, duplicated keys",
            role="composition",
            back_end=f"sdpa {name}",
            prepare=functools.partial(prepare_duplicated_sdpa, back_end),
            devices=devices,
            needs_prompts=True,
        )
        for name, (back_end, devices) in _BACK_ENDS.items()
        # Flash attention takes no mask.
        if name != "flash"
    ),
    Provider(
        name="composition C, duplicated keys",
        role="composition",
        back_end="flex",
        prepare=prepare_duplicated_flex,
        dtypes=("bf16", "fp16", "fp32"),
        needs_prompts=True,
        no_gradients=_NO_FLEX_GRADIENTS,
    ),
    *(
        Provider(
            name="composition D, merged statistics",
            role="composition",
            back_end=name + suffix,
            prepare=functools.partial(prepare_merged_statistics, pair, wrap),
            devices=(device,),
            dtypes=dtypes,
            needs_prompts=True,
        )
        for name, (pair, device, dtypes) in _FLASH.items()
        for suffix, wrap in (("", eager), (", compiled", compiled))
    ),
    *(
        Provider(
            name="sdpa, no gate",
            role="floor",
            same_function=False,
            back_end=name,
            prepare=functools.partial(_prepare_ungated, back_end),
            devices=devices,
        )
        for name, (back_end, devices) in _BACK_ENDS.items()
    ),
    Provider(
        name="tcpa reference",
        role="ours",
        prepare=functools.partial(_prepare_ours, "reference", True),
    ),
    Provider(
        name="tcpa sdpa",
        role="ours",
        prepare=functools.partial(_prepare_ours, "sdpa", True),
        reason=sdpa_unavailable_reason,
    ),
    Provider(
        name="tcpa dense",
        role="ours",
        prepare=functools.partial(_prepare_ours, "dense", True),
    ),
    Provider(
        name="tcpa triton",
        role="ours",
        prepare=functools.partial(_prepare_ours, "triton", True),
        dtypes=("bf16", "fp16", "fp32"),
        reason=no_kernels,
    ),
    Provider(
        name="tcpa triton, no gate",
        role="floor",
        same_function=False,
        prepare=functools.partial(_prepare_ours, "triton", False),
        dtypes=("bf16", "fp16", "fp32"),
        reason=no_kernels,
    ),
)
