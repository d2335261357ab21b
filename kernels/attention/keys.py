"""Gated attention, backward: gradients of keys and values, of tokens and prompts (`backward`).

Axes: B batch, H heads, L tokens, P prompt rows, S = P + L keys, D head dim, W gate words.
In kernels: M queries of a block, N keys of a block; i_ index, o_ offsets, m_ mask, p_ pointers, b_
block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import architecture_of, choose_launch
from .inputs import AttentionInputs
from .tiles import exp2, load_keys, load_tile, store_tile, visible_to


@triton.jit
def _dkv_block(
    p_q, p_k, p_v, p_kp, p_vp, p_gate, p_do, p_o, p_lse, p_delta, p_dk, p_dv, p_dkp, p_dvp,
    stride_ql, stride_kl, stride_vl, stride_kpp, stride_vpp, stride_gl, stride_dol, stride_ol,
    stride_dpp, o_key, num_queries, num_tokens, num_prompts, first_token, scale, scale_log2,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DKP: tl.constexpr, NEED_DVP: tl.constexpr,
    OWN_DELTA: tl.constexpr, MIXED: tl.constexpr, GATED: tl.constexpr, VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr, NUM_WORDS: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Make dK and dV of the keys `o_key ...` of one head.

    Rows are keys: what lies in memory row by row is read row by row, and rows in the gap, which may
    become infinite, touch no other row and are not stored.
    """
    o_d = tl.arange(0, BLOCK_D)
    # [N, D]
    b_k = load_keys(
        p_kp, stride_kpp, p_k, stride_kl, o_key, num_prompts, first_token, o_d, D, BLOCK_N, MIXED
    )
    b_v = load_keys(
        p_vp, stride_vpp, p_v, stride_vl, o_key, num_prompts, first_token, o_d, D, BLOCK_N, MIXED
    )
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for o_l in range(0, num_queries, BLOCK_M):
        o_m = o_l + tl.arange(0, BLOCK_M)
        m_m = o_m < num_queries
        # [M, D]
        b_q = load_tile(p_q, stride_ql, o_l, num_queries, o_d, D, BLOCK_M)
        b_do = load_tile(p_do, stride_dol, o_l, num_queries, o_d, D, BLOCK_M)
        b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf"))
        # [N, M]
        if PRECISION == "ieee":
            # The forward's product, summed in its order: in a saturated row, scores rounded in
            # another way would change the largest probability, which plain softmax keeps exact.
            b_s = tl.trans(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION))
        else:
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_p = exp2(b_s * scale_log2 - b_lse[None, :])
        b_seen = b_p
        if GATED:
            m_gate = visible_to(
                p_gate + o_m * stride_gl, o_key, first_token, m_m, BLOCK_N, NUM_WORDS
            )
            b_seen = tl.where(m_gate, b_p, 0.0)
        if NEED_DV or (MIXED and NEED_DVP):
            # [N, M] @ [M, D] -> [N, D]
            b_dv = tl.dot(b_seen.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        if NEED_DK or (MIXED and NEED_DKP):
            if OWN_DELTA:
                b_o = load_tile(p_o, stride_ol, o_l, num_queries, o_d, D, BLOCK_M)
                b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
            else:
                b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
            # [N, D] @ [D, M] -> [N, M]
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            if GATED and VISIBLE:
                b_p = b_seen
            elif GATED:
                b_dp = tl.where(m_gate, b_dp, 0.0)
            b_ds = b_p * (b_dp - b_delta[None, :])
            # [N, M] @ [M, D] -> [N, D]
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    b_dk *= scale
    o_token = o_key - first_token
    if NEED_DK:
        store_tile(p_dk, stride_ol, o_token, num_tokens, o_d, b_dk, D, BLOCK_N)
    if NEED_DV:
        store_tile(p_dv, stride_ol, o_token, num_tokens, o_d, b_dv, D, BLOCK_N)
    if MIXED and NEED_DKP:
        store_tile(p_dkp, stride_dpp, o_key, num_prompts, o_d, b_dk, D, BLOCK_N)
    if MIXED and NEED_DVP:
        store_tile(p_dvp, stride_dpp, o_key, num_prompts, o_d, b_dv, D, BLOCK_N)


@triton.jit
def gated_attention_dkv_kernel(
    p_q, p_k, p_v, p_kp, p_vp, p_gate, p_do, p_o, p_lse, p_delta, p_dk, p_dv, p_dkp, p_dvp,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh, stride_kpb, stride_kpp, stride_kph,
    stride_vpb, stride_vpp, stride_vph, stride_gb, stride_gl, stride_dob, stride_dol, stride_doh,
    stride_dpb, stride_dpp, stride_dph,
    num_heads, num_queries, num_tokens, num_prompts, first_token, num_blocks, scale, scale_log2,
    NEED_DK: tl.constexpr, NEED_DV: tl.constexpr, NEED_DKP: tl.constexpr, NEED_DVP: tl.constexpr,
    OWN_DELTA: tl.constexpr,
    GATED: tl.constexpr, VISIBLE: tl.constexpr, PRECISION: tl.constexpr, NUM_WORDS: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per block of keys of one head."""
    i_bh = (tl.program_id(0) // num_blocks).to(tl.int64)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_kp += i_b * stride_kpb + i_h * stride_kph
    p_vp += i_b * stride_vpb + i_h * stride_vph
    p_do += i_b * stride_dob + i_h * stride_doh
    p_gate += i_b * stride_gb
    p_o += (i_b * num_queries * num_heads + i_h) * D
    p_lse += i_bh * num_queries
    p_delta += i_bh * num_queries
    i_token = (i_b * num_tokens * num_heads + i_h) * D
    i_prompt = i_b * stride_dpb + i_h * stride_dph
    p_dk += i_token
    p_dv += i_token
    p_dkp += i_prompt
    p_dvp += i_prompt
    stride_ol = num_heads * D
    o_key = tl.program_id(0) % num_blocks * BLOCK_N
    if o_key < first_token:
        _dkv_block(
            p_q, p_k, p_v, p_kp, p_vp, p_gate, p_do, p_o, p_lse, p_delta, p_dk, p_dv, p_dkp, p_dvp,
            stride_ql, stride_kl, stride_vl, stride_kpp, stride_vpp, stride_gl, stride_dol,
            stride_ol, stride_dpp, o_key, num_queries, num_tokens, num_prompts, first_token,
            scale, scale_log2, NEED_DK, NEED_DV, NEED_DKP, NEED_DVP, OWN_DELTA, True,
            GATED, VISIBLE, PRECISION, NUM_WORDS, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _dkv_block(
            p_q, p_k, p_v, p_kp, p_vp, p_gate, p_do, p_o, p_lse, p_delta, p_dk, p_dv, p_dkp, p_dvp,
            stride_ql, stride_kl, stride_vl, stride_kpp, stride_vpp, stride_gl, stride_dol,
            stride_ol, stride_dpp, o_key, num_queries, num_tokens, num_prompts, first_token,
            scale, scale_log2, NEED_DK, NEED_DV, NEED_DKP, NEED_DVP, OWN_DELTA, False,
            False, VISIBLE, PRECISION, NUM_WORDS, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip


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


def launch_dkv(
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
        launch_prompt_sum(partial, grads[3], grads[4], (need_dkp, need_dvp))


def launch_prompt_sum(partial: Tensor, dkp: Tensor, dvp: Tensor, needs: tuple[bool, bool]) -> None:
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


__all__ = ["gated_attention_dkv_kernel", "launch_dkv", "launch_prompt_sum", "prompt_sum_kernel"]
