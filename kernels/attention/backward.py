"""Gated attention, backward: gradients of q, k, v and of the prompts, deterministic, no atomics.

With P_ij the softmax that the forward pass divided by (over all keys, or over the visible ones) and
g_ij the gate,

    dV_j   = sum_i g_ij P_ij do_i
    dP_ij  = g_ij (do_i . v_j),        delta_i = sum_j P_ij dP_ij = do_i . o_i
    dS_ij  = P_ij (dP_ij - delta_i)    over all keys: a prompt that is not seen has dS = -P delta
    dq_i   = scale sum_j dS_ij k_j,    dK_j = scale sum_i dS_ij q_i

Two kernels, each the owner of what it writes: one program per block of queries makes dq and delta,
then one program per block of keys makes dK and dV, prompts and tokens alike. Shared prompts get one
float32 partial per sample and head, summed over the batch in fixed order by a third kernel.

One program per head with all 256 keys resident (5 products, not 7) was tried and not kept: its
accumulators alone take 128 registers a thread, it spills on sm_90 (15 to 31 stores at 32 queries,
8 warps) and leaves room for one program per multiprocessor; so does one program that walks through
two halves of the keys. The split form spills nowhere, runs three CTAs per SM and
fills the device at small batches too.

Axes: B batch, H heads, L tokens, P prompt rows, S = P + L keys, D head dim, W gate words.
In kernels: M queries of a block, N keys of a block; i_ index, o_ offsets, m_ mask, p_ pointers, b_
block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host import device_guard
from .inputs import AttentionInputs, addressable
from .keys import launch_dkv
from .tiles import exp2, is_key, load_keys, load_tile, store_tile, visible_prompts

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _add_dq(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_kp, p_vp, p_words,
    stride_kl, stride_vl, stride_kpp, stride_vpp, o_key, m_m, num_prompts, first_token, scale_log2,
    MIXED: tl.constexpr, GATED: tl.constexpr, VISIBLE: tl.constexpr, PRECISION: tl.constexpr,
    NUM_WORDS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add what the keys `o_key ...` contribute to dq / scale of a block of queries."""
    o_d = tl.arange(0, BLOCK_D)
    # [N, D]
    b_k = load_keys(
        p_kp, stride_kpp, p_k, stride_kl, o_key, num_prompts, first_token, o_d, D, BLOCK_N, MIXED
    )
    # [M, D] @ [D, N] -> [M, N]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_p = exp2(b_s * scale_log2 - b_lse[:, None])
    if MIXED:
        # A key in the gap is zero, but its probability may be infinite.
        m_n = is_key(o_key + tl.arange(0, BLOCK_N), num_prompts, first_token)
        b_p = tl.where(m_n[None, :], b_p, 0.0)
    # [N, D]
    b_v = load_keys(
        p_vp, stride_vpp, p_v, stride_vl, o_key, num_prompts, first_token, o_d, D, BLOCK_N, MIXED
    )
    # [M, D] @ [D, N] -> [M, N]
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    if GATED:
        m_gate = visible_prompts(p_words, o_key, first_token, m_m, BLOCK_N, NUM_WORDS)
        if VISIBLE:
            b_p = tl.where(m_gate, b_p, 0.0)
        else:
            b_dp = tl.where(m_gate, b_dp, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    # [M, N] @ [N, D] -> [M, D]
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def _dq_block(
    p_q, p_k, p_v, p_kp, p_vp, p_gate, p_do, p_o, p_lse, p_delta, p_dq,
    stride_ql, stride_kl, stride_vl, stride_kpp, stride_vpp, stride_gl, stride_dol, stride_ol,
    o_l, num_queries, num_tokens, num_prompts, first_token, scale, scale_log2,
    GATED: tl.constexpr, VISIBLE: tl.constexpr, PRECISION: tl.constexpr, NUM_WORDS: tl.constexpr,
    END_MIXED: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Make dq and delta of the queries `o_l ...` of one head."""
    o_d = tl.arange(0, BLOCK_D)
    o_m = o_l + tl.arange(0, BLOCK_M)
    m_m = o_m < num_queries
    p_words = p_gate + o_m * stride_gl
    # [M, D]
    b_do = load_tile(p_do, stride_dol, o_l, num_queries, o_d, D, BLOCK_M)
    b_o = load_tile(p_o, stride_ol, o_l, num_queries, o_d, D, BLOCK_M)
    # [M]
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    tl.store(p_delta + o_m, b_delta, mask=m_m)
    b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf"))
    # [M, D]
    b_q = load_tile(p_q, stride_ql, o_l, num_queries, o_d, D, BLOCK_M)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for o_key in tl.range(0, END_MIXED, BLOCK_N, num_stages=1):
        b_dq = _add_dq(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_kp, p_vp, p_words,
            stride_kl, stride_vl, stride_kpp, stride_vpp,
            o_key, m_m, num_prompts, first_token, scale_log2,
            True, GATED, VISIBLE, PRECISION, NUM_WORDS, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for o_key in range(END_MIXED, first_token + num_tokens, BLOCK_N):
        b_dq = _add_dq(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, p_kp, p_vp, p_words,
            stride_kl, stride_vl, stride_kpp, stride_vpp,
            o_key, m_m, num_prompts, first_token, scale_log2,
            False, False, VISIBLE, PRECISION, NUM_WORDS, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    store_tile(p_dq, stride_ol, o_l, num_queries, o_d, b_dq * scale, D, BLOCK_M)


@triton.jit
def gated_attention_dq_kernel(
    p_q, p_k, p_v, p_kp, p_vp, p_gate, p_do, p_o, p_lse, p_delta, p_dq,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh, stride_kpb, stride_kpp, stride_kph,
    stride_vpb, stride_vpp, stride_vph, stride_gb, stride_gl, stride_dob, stride_dol, stride_doh,
    num_heads, num_queries, num_tokens, num_prompts, first_token, num_tiles, scale, scale_log2,
    GATED: tl.constexpr, VISIBLE: tl.constexpr, PRECISION: tl.constexpr, NUM_WORDS: tl.constexpr,
    END_MIXED: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per block of queries of one head."""
    i_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_kp += i_b * stride_kpb + i_h * stride_kph
    p_vp += i_b * stride_vpb + i_h * stride_vph
    p_do += i_b * stride_dob + i_h * stride_doh
    p_gate += i_b * stride_gb
    p_o += (i_b * num_queries * num_heads + i_h) * D
    p_dq += (i_b * num_queries * num_heads + i_h) * D
    p_lse += i_bh * num_queries
    p_delta += i_bh * num_queries
    o_l = tl.program_id(0) % num_tiles * BLOCK_M
    stride_ol = num_heads * D
    if TAIL > 0 and num_queries - o_l <= TAIL:
        _dq_block(
            p_q, p_k, p_v, p_kp, p_vp, p_gate, p_do, p_o, p_lse, p_delta, p_dq,
            stride_ql, stride_kl, stride_vl, stride_kpp, stride_vpp, stride_gl, stride_dol,
            stride_ol, o_l, num_queries, num_tokens, num_prompts, first_token,
            scale, scale_log2, GATED, VISIBLE, PRECISION, NUM_WORDS, END_MIXED, D, TAIL, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
    else:
        _dq_block(
            p_q, p_k, p_v, p_kp, p_vp, p_gate, p_do, p_o, p_lse, p_delta, p_dq,
            stride_ql, stride_kl, stride_vl, stride_kpp, stride_vpp, stride_gl, stride_dol,
            stride_ol, o_l, num_queries, num_tokens, num_prompts, first_token,
            scale, scale_log2, GATED, VISIBLE, PRECISION, NUM_WORDS, END_MIXED, D, BLOCK_M, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip


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
            launch_dq(inputs, do, o, lse, delta, grads[0])
        if any(needs[1:]):
            launch_dkv(inputs, do, o, lse, delta if needs[0] else None, grads, needs)
    return tuple(grads)


def launch_dq(
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


__all__ = ["gated_attention_dq_kernel", "launch_backward", "launch_dq"]
