"""Unit keys of prompt matching: normalised once per call, and the gradient that goes back to them.

A key is normalised in float32 and stored as two float16 parts, high + low = KEY_SCALE * key / |key|
to 22 digits. Backward, slab by slab of rows, x / |x| is added over the rows that select an entry;
the slabs are then added in a fixed order. No atomics.

Axes: B batch, L tokens, M tile rows, R pool entries, C width, W gate words.
Names in kernels: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inputs import Matching, launch_of
from .tiles import (
    KEY_SCALE,
    NORM_EPS,
    ROW_EXPONENT,
    load_selected,
    mantissa,
    pick_role,
    power_of_two,
    split_half,
)


@triton.jit
def _unit_keys_kernel(
    p_cls, p_image, p_parts, p_inverse, stride_cls, stride_image, cls_pool, num_keys,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalise one key per program and store it as two scaled float16 parts."""
    i_key = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    # [C] fp32
    if i_key < cls_pool:
        b_key = tl.load(p_cls + i_key * stride_cls + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    else:
        p_key = p_image + (i_key - cls_pool) * stride_image
        b_key = tl.load(p_key + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt_rn(tl.sum(b_key * b_key, 0)), NORM_EPS)
    b_high, b_low = split_half(tl.div_rn(b_key, norm) * KEY_SCALE)
    tl.store(p_parts + i_key * C + o_c, b_high, mask=o_c < C)
    tl.store(p_parts + (num_keys + i_key) * C + o_c, b_low, mask=o_c < C)
    tl.store(p_inverse + i_key, tl.div_rn(1.0, norm))


@triton.jit
def match_prompts_dkeys_kernel(
    p_x, p_gate, p_stats, p_partial,
    stride_xb, stride_xl, stride_gb, stride_gl, stride_gw,
    batch, num_tokens, num_prefix, cls_pool, image_pool, cls_length, image_length, max_pool,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Add x / |x| over the rows of a slab that select an entry, for some columns.

    The sum is held as `[C, R]`: C is the side of a product that is long enough for wgmma.
    """
    EXACT: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth == 16
    i_slab = tl.program_id(0)
    is_cls, o_first, first, count = pick_role(
        i_slab, batch, num_tokens, num_prefix, BLOCK_M * STEPS
    )
    pool = tl.where(is_cls, cls_pool, image_pool)
    first_bit = tl.where(is_cls, 0, cls_pool * cls_length)
    length = tl.where(is_cls, cls_length, image_length)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_r = tl.arange(0, BLOCK_R)
    # [C, R] fp32
    b_sum = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    num_rows = tl.minimum(batch * count - o_first, BLOCK_M * STEPS)
    for o_step in range(0, num_rows, BLOCK_M):
        o_i = o_first + o_step + tl.arange(0, BLOCK_M)
        m_i = o_i < batch * count
        i_b, i_l = (o_i // count).to(tl.int64), (first + o_i % count).to(tl.int64)
        p_rows = p_x + i_b * stride_xb + i_l * stride_xl
        m_x = m_i[:, None] & (o_c < C)[None, :]
        # [M, C]
        b_x = tl.load(p_rows[:, None] + o_c[None, :], mask=m_x, other=0.0)
        b_inverse = tl.load(p_stats + i_b * num_tokens + i_l, mask=m_i, other=1.0)
        b_scale = power_of_two(b_inverse, ROW_EXPONENT)
        p_words = p_gate + i_b * stride_gb + i_l * stride_gl
        m_entry = m_i[:, None] & (o_r < pool)[None, :]
        m_selected = load_selected(
            p_words[:, None], stride_gw, o_r[None, :], first_bit, length, m_entry
        )
        # 1 / |x| without its power of two, which scales x: 1 to 2.
        b_weight = mantissa(b_inverse)
        b_high, b_low = split_half(tl.where(m_selected, b_weight[:, None], 0.0))
        b_x_high, b_x_low = split_half(b_x.to(tl.float32) * b_scale[:, None])
        # [C, M] @ [M, R] -> [C, R]; small terms first.
        if not EXACT:
            b_sum = tl.dot(tl.trans(b_x_low), b_low, b_sum)
            b_sum = tl.dot(tl.trans(b_x_low), b_high, b_sum)
        b_sum = tl.dot(tl.trans(b_x_high), b_low, b_sum)
        b_sum = tl.dot(tl.trans(b_x_high), b_high, b_sum)
    p_sum = p_partial + (i_slab.to(tl.int64) * max_pool + o_r[None, :]) * C + o_c[:, None]
    m_sum = (o_r < pool)[None, :] & (o_c < C)[:, None]
    tl.store(p_sum, b_sum * (1.0 / 2**ROW_EXPONENT), mask=m_sum)


@triton.jit
def _unit_keys_bwd_kernel(
    p_partial, p_ddistance, p_keys, p_inverse, p_dkeys,
    cls_pool, num_keys, max_pool, num_cls_slabs, num_slabs, cls_count, image_count,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_SLABS: tl.constexpr,
):  # fmt: skip
    """Gradient of one key per program: add the slabs of its pool, go back through the norm."""
    i_key = tl.program_id(0)
    is_cls = i_key < cls_pool
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    i_entry = tl.where(is_cls, i_key, i_key - cls_pool)
    last = tl.where(is_cls, num_cls_slabs, num_slabs)
    # [SLABS, C]
    b_sums = tl.zeros([BLOCK_SLABS, BLOCK_C], tl.float32)
    for o_slab in range(tl.where(is_cls, 0, num_cls_slabs), last, BLOCK_SLABS):
        o_s = o_slab + tl.arange(0, BLOCK_SLABS)
        p_sum = p_partial + (o_s.to(tl.int64) * max_pool + i_entry)[:, None] * C + o_c[None, :]
        b_sums += tl.load(p_sum, mask=(o_s < last)[:, None] & m_c[None, :], other=0.0)
    count = tl.cast(tl.where(is_cls, cls_count, image_count), tl.float32)
    # [C]
    b_unit_grad = tl.sum(b_sums, 0) * (-tl.load(p_ddistance) / count)
    p_key = p_keys + i_key.to(tl.int64) * C + o_c
    b_key = tl.load(p_key, mask=m_c, other=0.0).to(tl.float32)
    b_key += tl.load(p_key + tl.cast(num_keys, tl.int64) * C, mask=m_c, other=0.0).to(tl.float32)
    b_key *= 1.0 / KEY_SCALE
    inverse = tl.load(p_inverse + i_key)
    # A norm that was clamped is a constant.
    along = tl.where(inverse * NORM_EPS >= 1.0, 0.0, tl.sum(b_key * b_unit_grad, 0))
    b_grad = (b_unit_grad - b_key * along) * inverse
    tl.store(p_dkeys + i_key.to(tl.int64) * C + o_c, b_grad, mask=m_c)


def launch_unit_keys(
    cls_keys: Tensor, image_keys: Tensor, key_parts: Tensor, key_inverse: Tensor
) -> None:
    """Normalise the keys of both pools into `key_parts` and `key_inverse`."""
    num_keys, width = key_inverse.shape[0], key_parts.shape[2]
    if num_keys > 0:
        _unit_keys_kernel[(num_keys,)](
            cls_keys, image_keys, key_parts, key_inverse,
            cls_keys.stride(0), image_keys.stride(0), cls_keys.shape[0], num_keys,
            C=width, BLOCK_C=triton.next_power_of_2(width), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def launch_keys_backward(
    ddistance: Tensor,
    x: Tensor,
    gate: Tensor,
    stats: Tensor,
    key_parts: Tensor,
    key_inverse: Tensor,
    matching: Matching,
    dkeys: Tensor,
) -> None:
    """Write the gradient of the keys, float32 `[R_cls + R_image, C]`, into `dkeys`."""
    num_keys, width = dkeys.shape
    if num_keys == 0:
        return
    launch = launch_of("match_keys_bwd", x)
    slabs = matching.num_tiles(x, launch.blocks["BLOCK_M"] * launch.blocks["STEPS"])
    max_pool = max(matching.cls_pool, matching.image_pool)
    partial = x.new_empty((sum(slabs), max_pool, width), dtype=torch.float32)
    if sum(slabs) > 0:
        grid = (sum(slabs), triton.cdiv(width, launch.blocks["BLOCK_C"]))
        match_prompts_dkeys_kernel[grid](
            x, gate, stats, partial, x.stride(0), x.stride(1), *gate.stride(),
            x.shape[0], x.shape[1], matching.num_prefix, matching.cls_pool, matching.image_pool,
            matching.cls_length, matching.image_length, max_pool,
            C=width, BLOCK_R=matching.block_r, enable_fp_fusion=True, **launch.options(),
        )  # fmt: skip
    _unit_keys_bwd_kernel[(num_keys,)](
        partial, ddistance, key_parts, key_inverse, dkeys,
        matching.cls_pool, num_keys, max_pool, slabs[0], sum(slabs), *matching.counts(x),
        C=width, BLOCK_C=triton.next_power_of_2(width), BLOCK_SLABS=8, num_warps=8,
        enable_fp_fusion=True,
    )  # fmt: skip


__all__ = ["launch_keys_backward", "launch_unit_keys", "match_prompts_dkeys_kernel"]
