"""Launches of the backward pass of gated attention, and the batch sum for shared prompts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_inputs import AttentionInputs
from .common import addressable, device_guard
from .gated_attention_backward import gated_attention_dkv_kernel, gated_attention_dq_kernel
from .launch import architecture_of, choose_launch

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def prompt_sum_kernel(
    p_partial, p_out_k, p_out_v, num_samples, num_heads, num_prompts, first_out,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Sum float32 `[2, B, H, P, D]` over the batch in a fixed order into two `[P, H, D]`."""
    o_x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    size = num_heads * num_prompts * D
    m_x = o_x < size
    i_out = tl.program_id(1) + first_out
    p_partial += tl.cast(i_out, tl.int64) * num_samples * size
    b_sum = tl.zeros([BLOCK_B, BLOCK_X], tl.float32)
    for i_b in range(0, num_samples, BLOCK_B):
        o_b = i_b + tl.arange(0, BLOCK_B)
        p_rows = p_partial + o_b.to(tl.int64)[:, None] * size + o_x[None, :]
        # [BLOCK_B, BLOCK_X]
        b_sum += tl.load(p_rows, mask=(o_b < num_samples)[:, None] & m_x[None, :], other=0.0)
    # [BLOCK_X]
    b_out = tl.sum(b_sum, 0).to(p_out_k.dtype.element_ty)
    i_h = o_x // (num_prompts * D)
    o_out = (o_x // D % num_prompts) * num_heads * D + i_h * D + o_x % D
    if i_out == 0:
        tl.store(p_out_k + o_out, b_out, mask=m_x)
    else:
        tl.store(p_out_v + o_out, b_out, mask=m_x)


def launch_backward(
    inputs: AttentionInputs, do: Tensor, o: Tensor, lse: Tensor, needs: list[bool]
) -> Gradients:
    """Return dq, dk, dv, dk_prompt, dv_prompt; an empty tensor for each that is not needed."""
    do = addressable(do)
    names = (inputs.q, inputs.k, inputs.v, inputs.k_prompt, inputs.v_prompt)
    grads = [t.new_empty(t.shape if need else (0,)) for t, need in zip(names, needs, strict=True)]
    if o.numel() == 0 or inputs.num_keys == 0:
        return tuple(grad.zero_() for grad in grads)
    delta = torch.empty_like(lse)
    with device_guard(o):
        if needs[0]:
            _launch_dq(inputs, do, o, lse, delta, grads[0])
        if any(needs[1:]):
            _launch_dkv(inputs, do, o, lse, delta if needs[0] else None, grads, needs)
    return tuple(grads)


def _launch_dq(
    inputs: AttentionInputs, do: Tensor, o: Tensor, lse: Tensor, delta: Tensor, dq: Tensor
) -> None:
    """Launch the kernel that owns dq and delta."""
    batch, queries, heads, _ = o.shape
    launch = inputs.launch("gated_attention_dq")
    block_m, block_n = launch.blocks["BLOCK_M"], launch.blocks["BLOCK_N"]
    tiles = triton.cdiv(queries, block_m)
    gated_attention_dq_kernel[(batch * heads * tiles,)](
        *inputs.pointers(), do, o, lse, delta, dq, *inputs.strides(), *do.stride()[:3],
        *inputs.sizes(block_n), tiles, inputs.scale, inputs.scale_log2,
        **inputs.block_constants(launch), **inputs.constants(), **launch.options(),
    )  # fmt: skip


def _launch_dkv(
    inputs: AttentionInputs, do: Tensor, o: Tensor, lse: Tensor, delta: Tensor | None,
    grads: list[Tensor], needs: list[bool],
) -> None:  # fmt: skip
    """Launch the kernel that owns dK and dV, and the sum over the batch for shared prompts."""
    batch, _, heads, head_dim = o.shape
    launch = inputs.launch("gated_attention_dkv")
    block_n, prompts = launch.blocks["BLOCK_N"], inputs.num_prompts
    # Without token gradients only the blocks that hold prompts are visited.
    rows = inputs.first_token(block_n) + inputs.k.shape[1] if needs[1] or needs[2] else prompts
    blocks = triton.cdiv(rows, block_n)
    if blocks == 0:
        return
    dkp, dvp = grads[3:]
    strides = prompts * heads * head_dim, heads * head_dim, head_dim
    partial = None
    if inputs.shared and prompts > 0 and (needs[3] or needs[4]):
        partial = o.new_empty((2, batch, heads, prompts, head_dim), dtype=torch.float32)
        dkp, dvp = partial[0], partial[1]
        strides = prompts * heads * head_dim, head_dim, prompts * head_dim
    need_dk, need_dv, need_dkp, need_dvp = needs[1:]
    gated_attention_dkv_kernel[(batch * heads * blocks,)](
        *inputs.pointers(), do, o, lse, lse if delta is None else delta, *grads[1:3], dkp, dvp,
        *inputs.strides(), *do.stride()[:3], *strides, *inputs.sizes(block_n), blocks,
        inputs.scale, inputs.scale_log2, NEED_DK=need_dk, NEED_DV=need_dv, NEED_DKP=need_dkp,
        NEED_DVP=need_dvp, OWN_DELTA=delta is None, **inputs.constants(), **launch.options(),
    )  # fmt: skip
    if partial is not None:
        _launch_prompt_sum(partial, grads[3], grads[4], (need_dkp, need_dvp))


def _launch_prompt_sum(partial: Tensor, dkp: Tensor, dvp: Tensor, needs: tuple[bool, bool]) -> None:
    """Sum the partial gradients of shared prompts over the batch."""
    _, batch, heads, prompts, head_dim = partial.shape
    architecture = architecture_of(partial.device)
    launch = choose_launch(
        "gated_attention_prompt_sum", architecture=architecture, dtype=torch.float32, bucket="all"
    )
    columns = triton.cdiv(heads * prompts * head_dim, launch.blocks["BLOCK_X"])
    prompt_sum_kernel[(columns, sum(needs))](
        partial, dkp, dvp, batch, heads, prompts, 0 if needs[0] else 1,
        D=head_dim, enable_fp_fusion=True, **launch.options(),
    )  # fmt: skip


__all__ = ["launch_backward", "prompt_sum_kernel"]
