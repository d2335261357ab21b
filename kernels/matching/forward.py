"""Forward kernels of prompt matching, alone (`match_prompts`) and with LayerNorm (`norm_match`).

Every prefix token selects `top_k` entries of the CLS pool, every patch `top_k` of the image pool,
by s = x . k / (|x| |k|). One kernel does all for a tile of rows: LayerNorm, norm, similarities,
ranks, gate words, partial distances. Which tiles it holds in registers, and which it reads a second
time, `tiles` tells.

Similarities have float32 accuracy from tensor-core products: a row scaled by a power of two is a
float16 number per element (two of them for float32 x), a unit key is the sum of two. Their products
are exact, so with u = 2 ** -24 the error of s is at most (C / 8 + 40) u: 4 u for the splits, 2 u
for each of the C / 16 accumulations (which may truncate), the rest for both norms.

Axes: B batch, L tokens, M tile rows, R pool entries, C width, W gate words.
Names in kernels: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host import device_guard
from ..launch import Launch
from .inputs import Matched, Matching, Norm, empty_outputs, launch_of
from .keys import launch_unit_keys
from .tiles import (
    KEY_SCALE,
    NORM_EPS,
    ROW_EXPONENT,
    add_products,
    entry_bits,
    held,
    key_row,
    load_affine_columns,
    load_selected,
    load_tile_columns,
    mantissa,
    pick_role,
    power_of_two,
    preference,
    rank_entries,
    row_sum,
    row_vector,
    store_tile_columns,
    tile_columns,
    tile_rows,
    unroll_factor,
)


@triton.jit
def _held_moments(b_x, o_c, C: tl.constexpr, CENTRED: tl.constexpr):
    """Return mean (0 unless CENTRED) and sum of squares around it, `[HALVES, 1, 8, 1, 1]`."""
    CHUNK: tl.constexpr = b_x[0].shape[1] * 32
    b_mean = tl.zeros([b_x[0].shape[0], 1, 8, 1, 1], tl.float32)
    o_v = tl.arange(0, 8)[None, None, None, None, :]
    if CENTRED:
        b_sum = b_x[0].to(tl.float32)
        for i in tl.static_range(1, len(b_x)):
            b_sum += b_x[i].to(tl.float32)
        b_mean = row_sum(b_sum) * (1.0 / C)
    b_squares = tl.zeros(b_x[0].shape, tl.float32)
    for i in tl.static_range(len(b_x)):
        b_centred = b_x[i].to(tl.float32) - b_mean
        if CENTRED and (i + 1) * CHUNK > C:
            # Columns past the end are not part of the row.
            b_centred = tl.where(o_c + o_v < C - i * CHUNK, b_centred, 0.0)
        b_squares += b_centred * b_centred
    return b_mean, row_sum(b_squares)


@triton.jit
def _streamed_moments(
    p_rows, o_c, C: tl.constexpr, CHUNK: tl.constexpr, CENTRED: tl.constexpr
):  # fmt: skip
    """Return what `_held_moments` returns, reading the rows once.

    Squares are summed around the mean of the first columns. Those are part of the row, so its
    deviation is never small against the distance of both means: whatever the row, the variance
    loses at most log2(C / 32) of its 24 binary digits, which half rows do not show. Rows of float32
    are held (`launch`).
    """
    BOUNDED: tl.constexpr = C % CHUNK == 0
    o_v = tl.arange(0, 8)[None, None, None, None, :]
    b_first = load_tile_columns(p_rows, 0, o_c, C, CHUNK <= C).to(tl.float32)
    b_shift = row_sum(b_first) * (1.0 / min(C, CHUNK)) if CENTRED else 0.0
    b_sum = tl.zeros(b_first.shape, tl.float32)
    b_squares = tl.zeros(b_first.shape, tl.float32)
    for i_c in tl.range(0, C, CHUNK, loop_unroll_factor=unroll_factor(C, CHUNK)):
        b_shifted = load_tile_columns(p_rows, i_c, o_c, C, BOUNDED).to(tl.float32) - b_shift
        if CENTRED and not BOUNDED:
            b_shifted = tl.where(i_c + o_c + o_v < C, b_shifted, 0.0)
        b_sum += b_shifted
        b_squares += b_shifted * b_shifted
    b_total = row_sum(b_squares)
    if CENTRED:
        b_sum = row_sum(b_sum)
        b_offset = b_sum * (1.0 / C)
        return b_shift + b_offset, tl.maximum(b_total - b_sum * b_offset, 0.0)
    return tl.zeros(b_total.shape, tl.float32), b_total


@triton.jit
def _norm_and_multiply(
    b_chunk, b_sum, moments, affine, keys, p_out, i_c, o_c, m_store,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, C: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Store some normed columns; add their products with both parts of the keys to `b_sum`."""
    EXACT: tl.constexpr = b_chunk.dtype.primitive_bitwidth == 16
    HALVES: tl.constexpr = b_chunk.shape[0]
    b_mean, b_rstd, b_scale = moments
    p_weight, p_bias = affine
    p_key, p_key_low = keys
    if not held(HALVES):
        # No load overtakes a store. A row held in registers leaves none to load so early.
        b_key = load_tile_columns(p_key, i_c, o_c, C, BOUNDED)
        b_low = load_tile_columns(p_key_low, i_c, o_c, C, BOUNDED)
    b_chunk = b_chunk.to(tl.float32)
    if NORM:
        # For half rows not x - mean: it would stay as a second copy of the row in registers.
        b_normed = b_chunk * b_rstd - b_mean * b_rstd if EXACT else (b_chunk - b_mean) * b_rstd
        if WEIGHT:
            b_normed *= load_affine_columns(p_weight, i_c, o_c, C, BOUNDED, HALVES)
        if BIAS:
            b_normed += load_affine_columns(p_bias, i_c, o_c, C, BOUNDED, HALVES)
        store_tile_columns(p_out, i_c, o_c, b_normed, m_store, C, BOUNDED)
    if held(HALVES):
        b_key = load_tile_columns(p_key, i_c, o_c, C, BOUNDED)
        b_low = load_tile_columns(p_key_low, i_c, o_c, C, BOUNDED)
    return add_products(b_sum, b_chunk * b_scale, b_key, b_low, EXACT)


@triton.jit
def match_prompts_fwd_kernel(
    p_x, p_weight, p_bias, p_keys, p_given, p_normed, p_gate, p_partial, p_stats,
    stride_xb, stride_xl, stride_gb, stride_gl, stride_gw,
    batch, num_tokens, num_prefix, cls_pool, image_pool, cls_top_k, image_top_k,
    cls_length, image_length, num_words, eps,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, GIVEN: tl.constexpr,
    FARTHEST: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr,
    HALVES: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows of one role."""
    BLOCK_M: tl.constexpr = 8 * HALVES
    CHUNK: tl.constexpr = 32 * SLICES
    i_tile = tl.program_id(0)
    is_cls, o_first, first, count = pick_role(i_tile, batch, num_tokens, num_prefix, BLOCK_M)
    pool = tl.where(is_cls, cls_pool, image_pool)
    num_keys = cls_pool + image_pool
    first_key, last_entry = key_row(is_cls, cls_pool, image_pool)
    p_keys += first_key * C

    o_i = tl.minimum(o_first + tile_rows(HALVES), batch * count - 1)
    i_b, i_l = (o_i // count).to(tl.int64), first + o_i % count
    p_rows = p_x + i_b * stride_xb + i_l.to(tl.int64) * stride_xl
    p_out = p_normed + (i_b * num_tokens + i_l) * C
    o_c = tile_columns(SLICES)
    b_x = ()
    if held(HALVES):
        for i_c in tl.static_range(0, C, CHUNK):
            # [HALVES, SLICES, 8, 4, 8]
            b_x += (load_tile_columns(p_rows, i_c, o_c, C, i_c + CHUNK <= C),)
        b_mean, b_squares = _held_moments(b_x, o_c, C, NORM)
    else:
        b_mean, b_squares = _streamed_moments(p_rows, o_c, C, CHUNK, NORM)

    b_rstd = b_mean
    if NORM:
        b_rstd = tl.math.rsqrt(b_squares * (1.0 / C) + tl.cast(eps, tl.float32))
    b_norm2 = b_squares + b_mean * b_mean * C
    b_inverse = tl.math.rsqrt(tl.maximum(b_norm2, NORM_EPS * NORM_EPS))
    b_scale = power_of_two(b_inverse, ROW_EXPONENT)
    p_key = p_keys + tl.minimum(tile_rows(BLOCK_R // 8), last_entry) * C
    m_store = o_first + tile_rows(HALVES) < batch * count
    moments, affine = (b_mean, b_rstd, b_scale), (p_weight, p_bias)
    keys = (p_key, p_key + num_keys * C)
    shape: tl.constexpr = [SLICES, BLOCK_M, BLOCK_R] if held(HALVES) else [BLOCK_M, BLOCK_R]
    b_sum = tl.zeros(shape, tl.float32)
    if held(HALVES):
        for i in tl.static_range(len(b_x)):
            b_sum = _norm_and_multiply(
                b_x[i], b_sum, moments, affine, keys, p_out, i * CHUNK, o_c, m_store,
                NORM, WEIGHT, BIAS, C, (i + 1) * CHUNK <= C,
            )  # fmt: skip
    else:
        for i_c in tl.range(0, C, CHUNK):
            b_chunk = load_tile_columns(p_rows, i_c, o_c, C, C % CHUNK == 0)
            b_sum = _norm_and_multiply(
                b_chunk, b_sum, moments, affine, keys, p_out, i_c, o_c, m_store,
                NORM, WEIGHT, BIAS, C, C % CHUNK == 0,
            )  # fmt: skip
    o_i = o_first + tl.arange(0, BLOCK_M)
    m_rows = o_i < batch * count
    i_b, i_l = (o_i // count).to(tl.int64), first + o_i % count
    # What is left of 1 / |x| once both scales are undone, exactly.
    UNSCALE: tl.constexpr = 1.0 / (KEY_SCALE * 2**ROW_EXPONENT)
    # Products with an infinite element must not pass for similarities: times 0 they are NaN.
    b_unscale = tl.where(b_norm2 < float("inf"), mantissa(b_inverse) * UNSCALE, 0.0)
    b_unscale = row_vector(b_unscale)
    o_r = tl.arange(0, BLOCK_R)
    # [M, R] fp32
    b_similarity = (tl.sum(b_sum, 0) if held(HALVES) else b_sum) * b_unscale[:, None]
    first_bit = tl.where(is_cls, 0, cls_pool * cls_length)
    length = tl.where(is_cls, cls_length, image_length)
    m_entry = m_rows[:, None] & (o_r < pool)[None, :]
    if GIVEN:
        p_given += i_b * stride_gb + i_l.to(tl.int64) * stride_gl
        m_selected = load_selected(
            p_given[:, None], stride_gw, o_r[None, :], first_bit, length, m_entry
        )
    else:
        top_k = tl.where(is_cls, cls_top_k, image_top_k)
        b_order = preference(b_similarity, (o_r < pool)[None, :], FARTHEST)
        # One warp, or two that also normalise, have no registers for all pairs of 32 entries.
        AT_ONCE: tl.constexpr = 16 if SLICES == 1 or (NORM and SLICES == 2) else 32
        m_selected = m_entry & (rank_entries(b_order, AT_ONCE) < top_k)
        for i_word in range(num_words):
            b_bits = entry_bits(o_r, first_bit, length, i_word)
            b_word = tl.sum(tl.where(m_selected, b_bits[None, :], 0), 1)
            tl.store(p_gate + (i_b * num_tokens + i_l) * num_words + i_word, b_word, mask=m_rows)

    # [M]: over the selected entries, the sum of s and of 1 - s.
    b_selected = tl.sum(tl.where(m_selected, b_similarity, 0.0), 1)
    b_count = tl.sum(m_selected.to(tl.int32), 1) if GIVEN else tl.where(m_rows, top_k, 0)
    tl.store(p_partial + i_tile, tl.sum(b_count.to(tl.float32) - b_selected, 0))
    # Saved for the backward: 1 / |x|, the selected similarities, mean and 1 / deviation. A norm
    # that was clamped is a constant: it hands no gradient on.
    p_row = p_stats + i_b * num_tokens + i_l
    num_rows = tl.cast(batch, tl.int64) * num_tokens
    m_clamped = row_vector(b_norm2) < NORM_EPS * NORM_EPS
    tl.store(p_row, row_vector(b_inverse), mask=m_rows)
    tl.store(p_row + num_rows, tl.where(m_clamped, 0.0, b_selected), mask=m_rows)
    if NORM:
        tl.store(p_row + 2 * num_rows, row_vector(b_mean), mask=m_rows)
        tl.store(p_row + 3 * num_rows, row_vector(b_rstd), mask=m_rows)


@triton.jit
def _distance_kernel(
    p_partial, p_distance, num_cls, num_image, cls_count, image_count, BLOCK: tl.constexpr
):
    """Add the partial distances of both pools in a fixed order, one program."""
    o_i = tl.arange(0, BLOCK)
    b_cls = tl.zeros([BLOCK], tl.float32)
    b_image = tl.zeros([BLOCK], tl.float32)
    for o_first in range(0, num_cls, BLOCK):
        b_cls += tl.load(p_partial + o_first + o_i, mask=o_first + o_i < num_cls, other=0.0)
    for o_first in range(0, num_image, BLOCK):
        m_i = o_first + o_i < num_image
        b_image += tl.load(p_partial + num_cls + o_first + o_i, mask=m_i, other=0.0)
    distance = tl.div_rn(tl.sum(b_cls, 0), tl.cast(cls_count, tl.float32))
    distance += tl.div_rn(tl.sum(b_image, 0), tl.cast(image_count, tl.float32))
    tl.store(p_distance, distance)


def launch_forward(
    x: Tensor,
    cls_keys: Tensor,
    image_keys: Tensor,
    given: Tensor | None,
    matching: Matching,
    norm: Norm | None,
) -> Matched:
    """Match the tokens of `x`; arguments are checked and rows are dense."""
    out = empty_outputs(x, matching, given is not None, norm is not None)
    launch = launch_of("match_prompts_fwd" if norm is None else "norm_match_fwd", x)
    num_tiles = matching.num_tiles(x, 8 * launch.blocks["HALVES"])
    partial = x.new_empty((sum(num_tiles),), dtype=torch.float32)
    with device_guard(x):
        launch_unit_keys(cls_keys, image_keys, out.key_parts, out.key_inverse)
        if sum(num_tiles) > 0:
            _launch_tiles(x, given, matching, norm, out, partial, launch)
        _distance_kernel[(1,)](
            partial, out.distance, *num_tiles, *matching.counts(x), BLOCK=1024, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _launch_tiles(
    x: Tensor, given: Tensor | None, matching: Matching, norm: Norm | None, out: Matched,
    partial: Tensor, launch: Launch,
) -> None:  # fmt: skip
    weight, bias, eps = norm or Norm(None, None, 0.0)
    gate_strides = (0, 0, 0) if given is None else given.stride()
    match_prompts_fwd_kernel[partial.shape](
        x, x if weight is None else weight, x if bias is None else bias, out.key_parts,
        out.gate if given is None else given, out.normed, out.gate, partial, out.stats,
        x.stride(0), x.stride(1), *gate_strides,
        x.shape[0], x.shape[1], matching.num_prefix, matching.cls_pool, matching.image_pool,
        matching.cls_top_k, matching.image_top_k, matching.cls_length, matching.image_length,
        matching.num_words, eps,
        NORM=norm is not None, WEIGHT=weight is not None, BIAS=bias is not None,
        GIVEN=given is not None, FARTHEST=matching.farthest,
        C=x.shape[2], BLOCK_R=matching.block_r, enable_fp_fusion=True, **launch.options(),
    )  # fmt: skip


__all__ = ["launch_forward", "match_prompts_fwd_kernel"]
