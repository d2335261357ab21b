"""Gated attention, forward: attention to tokens and prompts with one visibility bit per prompt.

Fused: scores, base-2 online softmax, gate and product with the values, reading q, k, v in place.

    s_ij = scale * q_i . k_j
    o_i  = sum_j softmax_j(s_ij) g_ij v_j               normalize_over = "all"
    o_i  = sum_j g_ij exp(s_ij) v_j / sum_j g_ij exp(s_ij)            "visible"

The S = P + L keys are one sequence in two places: first the P prompts, then the L tokens, so that
only the first blocks of keys need the gate. A remainder of at most 16 queries (197 = 3 * 64 + 5,
577 = 9 * 64 + 1) is attended in a block of 16 rows instead of a whole one.

A softmax over whole rows, all 233 keys of ViT-B in one block of 256, was tried and not kept: for
sm_90 it spills (64 queries: 74 stores with 4 warps, 5 with 8; 128 queries: 28) and its lower bound,
71 us at B = 128, is above the 54 us of blocks of 64 keys.

Axes: B batch, H heads, L tokens, P prompt rows, S = P + L keys, D head dim, W gate words.
In kernels: M queries of a block, N keys of a block; i_ index, o_ offsets, m_ mask, p_ pointers, b_
block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host import device_guard
from .inputs import AttentionInputs
from .tiles import exp2, is_key, load_keys, load_tile, store_tile, visible_prompts


@triton.jit
def _add_keys(
    b_q, b_acc, b_max, b_sum, p_k, p_v, p_kp, p_vp, p_words,
    stride_kl, stride_vl, stride_kpp, stride_vpp,
    o_key, m_m, num_prompts, first_token, scale_log2,
    MIXED: tl.constexpr, GATED: tl.constexpr, VISIBLE: tl.constexpr, PRECISION: tl.constexpr,
    NUM_WORDS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the keys `o_key ...` to the running softmax of a block of queries."""
    o_d = tl.arange(0, BLOCK_D)
    # [N, D]
    b_k = load_keys(
        p_kp, stride_kpp, p_k, stride_kl, o_key, num_prompts, first_token, o_d, D, BLOCK_N, MIXED
    )
    b_v = load_keys(
        p_vp, stride_vpp, p_v, stride_vl, o_key, num_prompts, first_token, o_d, D, BLOCK_N, MIXED
    )
    # [M, D] @ [D, N] -> [M, N]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if MIXED:
        m_n = is_key(o_key + tl.arange(0, BLOCK_N), num_prompts, first_token)
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    if GATED and VISIBLE:
        m_gate = visible_prompts(p_words, o_key, first_token, m_m, BLOCK_N, NUM_WORDS)
        b_s = tl.where(m_gate, b_s, float("-inf"))
    # [M]
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_shift = b_new
    if GATED and VISIBLE:
        # A query may see no key of this block; -inf - -inf would be NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_decay = exp2(b_max - b_shift)
    # [M, N]
    b_p = exp2(b_s * scale_log2 - b_shift[:, None])
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    if GATED and not VISIBLE:
        # After the sum: a prompt that is not seen still counts in the denominator.
        m_gate = visible_prompts(p_words, o_key, first_token, m_m, BLOCK_N, NUM_WORDS)
        b_p = tl.where(m_gate, b_p, 0.0)
    # [M, N] @ [N, D] -> [M, D]
    b_acc = b_acc * b_decay[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_new, b_sum


@triton.jit
def _attend(
    p_q, p_k, p_v, p_kp, p_vp, p_gate, p_o, p_lse,
    stride_ql, stride_kl, stride_vl, stride_kpp, stride_vpp, stride_gl, stride_ol,
    o_l, num_queries, num_tokens, num_prompts, first_token, scale_log2,
    GATED: tl.constexpr, VISIBLE: tl.constexpr, PRECISION: tl.constexpr, NUM_WORDS: tl.constexpr,
    END_MIXED: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attend from the queries `o_l ...` of one head to all its keys."""
    o_d = tl.arange(0, BLOCK_D)
    o_m = o_l + tl.arange(0, BLOCK_M)
    m_m = o_m < num_queries
    p_words = p_gate + o_m * stride_gl
    # [M, D]
    b_q = load_tile(p_q, stride_ql, o_l, num_queries, o_d, D, BLOCK_M)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    # Mostly one block; with a constant bound it is no loop and needs fewer registers.
    for o_key in tl.range(0, END_MIXED, BLOCK_N, num_stages=1):
        b_acc, b_max, b_sum = _add_keys(
            b_q, b_acc, b_max, b_sum, p_k, p_v, p_kp, p_vp, p_words,
            stride_kl, stride_vl, stride_kpp, stride_vpp,
            o_key, m_m, num_prompts, first_token, scale_log2,
            True, GATED, VISIBLE, PRECISION, NUM_WORDS, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for o_key in range(END_MIXED, first_token + num_tokens, BLOCK_N):
        b_acc, b_max, b_sum = _add_keys(
            b_q, b_acc, b_max, b_sum, p_k, p_v, p_kp, p_vp, p_words,
            stride_kl, stride_vl, stride_kpp, stride_vpp,
            o_key, m_m, num_prompts, first_token, scale_log2,
            False, False, VISIBLE, PRECISION, NUM_WORDS, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    b_acc *= (1.0 / b_sum)[:, None]
    store_tile(p_o, stride_ol, o_l, num_queries, o_d, b_acc, D, BLOCK_M)
    tl.store(p_lse + o_m, b_max + tl.math.log2(b_sum), mask=m_m)


@triton.jit
def gated_attention_fwd_kernel(
    p_q, p_k, p_v, p_kp, p_vp, p_gate, p_o, p_lse,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh, stride_kpb, stride_kpp, stride_kph,
    stride_vpb, stride_vpp, stride_vph, stride_gb, stride_gl,
    num_heads, num_queries, num_tokens, num_prompts, first_token, num_tiles, scale_log2,
    GATED: tl.constexpr, VISIBLE: tl.constexpr, PRECISION: tl.constexpr, NUM_WORDS: tl.constexpr,
    END_MIXED: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per block of queries of one head; blocks of a head are neighbours in L2."""
    i_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_kp += i_b * stride_kpb + i_h * stride_kph
    p_vp += i_b * stride_vpb + i_h * stride_vph
    p_gate += i_b * stride_gb
    p_o += (i_b * num_queries * num_heads + i_h) * D
    p_lse += i_bh * num_queries
    o_l = tl.program_id(0) % num_tiles * BLOCK_M
    if TAIL > 0 and num_queries - o_l <= TAIL:
        _attend(
            p_q, p_k, p_v, p_kp, p_vp, p_gate, p_o, p_lse,
            stride_ql, stride_kl, stride_vl, stride_kpp, stride_vpp, stride_gl, num_heads * D,
            o_l, num_queries, num_tokens, num_prompts, first_token, scale_log2,
            GATED, VISIBLE, PRECISION, NUM_WORDS, END_MIXED, D, TAIL, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _attend(
            p_q, p_k, p_v, p_kp, p_vp, p_gate, p_o, p_lse,
            stride_ql, stride_kl, stride_vl, stride_kpp, stride_vpp, stride_gl, num_heads * D,
            o_l, num_queries, num_tokens, num_prompts, first_token, scale_log2,
            GATED, VISIBLE, PRECISION, NUM_WORDS, END_MIXED, D, BLOCK_M, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip


def launch_forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Return o `[B, Lq, H, D]` and the base-2 log-sum-exp of the scores, float32 `[B, H, Lq]`."""
    batch, queries, heads, _ = inputs.q.shape
    o = torch.empty_like(inputs.q, memory_format=torch.contiguous_format)
    lse = inputs.q.new_empty((batch, heads, queries), dtype=torch.float32)
    if o.numel() == 0 or inputs.num_keys == 0:
        return o.zero_(), lse.fill_(float("-inf"))
    launch = inputs.launch("gated_attention_fwd")
    block_m, block_n = launch.blocks["BLOCK_M"], launch.blocks["BLOCK_N"]
    tiles = triton.cdiv(queries, block_m)
    with device_guard(o):
        gated_attention_fwd_kernel[(batch * heads * tiles,)](
            *inputs.pointers(), o, lse, *inputs.strides(), *inputs.sizes(block_n), tiles,
            inputs.scale_log2, **inputs.block_constants(launch), **inputs.constants(),
            **launch.options(),
        )  # fmt: skip
    return o, lse


__all__ = ["gated_attention_fwd_kernel", "launch_forward"]
