"""Backward kernels of prompt matching, alone (`match_prompts`) and with LayerNorm (`norm_match`).

With d the gradient of the distance, n the number of selections of a pool and S the entries that a
token selects (replayed from its gate words):

    dx    = d / n * (sum_S s_r x / |x| - sum_S k_r) / |x|  + LayerNorm's gradient
    g_r   = -d / n * sum over the tokens that select r of x / |x|
    dk_r  = (g_r - k_r (k_r . g_r)) / |key_r|              with unit keys k_r

One kernel reads x and the gradient of the normed rows and writes dx, from tiles as in the forward;
`keys` does dk.

Axes: B batch, L tokens, M tile rows, R pool entries, C width, W gate words.
Names in kernels: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block in registers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host import device_guard
from .inputs import Matching, dense_rows, launch_of
from .keys import launch_keys_backward
from .tiles import (
    KEY_SCALE,
    held,
    load_affine_columns,
    load_selected,
    load_tile_columns,
    pick_role,
    row_sum,
    store_tile_columns,
    tile_columns,
    tile_rows,
    unroll_factor,
)


@triton.jit
def _load_key_columns(
    p_keys, i_c, pool, C: tl.constexpr, R: tl.constexpr, SLICES: tl.constexpr, MATRIX: tl.constexpr
):  # fmt: skip
    """Load 32 * SLICES columns of the unit keys, `[SLICES, R, 32]` or `[R, 32]`, columns renamed.

    Column 8 t + 2 j + e of a group moves to 8 j + 2 t + e: a product then leaves the eight columns
    of thread t of a tile in thread t.
    """
    o_r, o_c = tl.arange(0, R), i_c + tl.arange(0, 32 * SLICES)
    m_key = (o_r < pool)[:, None] & (o_c < C)[None, :]
    b_key = tl.load(p_keys + o_r[:, None] * C + o_c[None, :], mask=m_key, other=0.0)
    b_key = tl.permute(tl.reshape(b_key, [R, SLICES, 4, 4, 2]), (1, 0, 3, 2, 4))
    shape: tl.constexpr = [R, 32] if MATRIX else [SLICES, R, 32]
    return tl.reshape(b_key, shape)


@triton.jit
def _selected_keys(
    b_selected, p_keys, i_c, pool, num_keys, C: tl.constexpr, HALVES: tl.constexpr,
    SLICES: tl.constexpr, LOW_PART: tl.constexpr,
):  # fmt: skip
    """Add the unit keys that every row selects, a tile of KEY_SCALE times their sum.

    Without LOW_PART the sum has the eleven digits of float16, which is enough for bfloat16 rows.
    """
    R: tl.constexpr = b_selected.shape[-1]
    MATRIX: tl.constexpr = not held(HALVES)
    b_high = _load_key_columns(p_keys, i_c, pool, C, R, SLICES, MATRIX)
    # [SLICES, M, R] @ [SLICES, R, 32] -> [SLICES, M, 32]
    b_sum = tl.dot(b_selected, b_high)
    if LOW_PART:
        b_low = _load_key_columns(p_keys + num_keys * C, i_c, pool, C, R, SLICES, MATRIX)
        b_sum = tl.dot(b_selected, b_low, b_sum)
    PAIRS: tl.constexpr = HALVES // 2
    b_sum = tl.reshape(b_sum, [SLICES, PAIRS, 2, 8, 4, 4, 2])
    b_sum = tl.permute(b_sum, (2, 1, 0, 3, 5, 4, 6))
    return tl.reshape(b_sum, [HALVES, SLICES, 8, 4, 8])


@triton.jit
def _load_weighted(p_dnormed, p_weight, i_c, o_c, C: tl.constexpr, BOUNDED: tl.constexpr,
                   HALVES: tl.constexpr, WEIGHT: tl.constexpr):  # fmt: skip
    """Load the gradient of the normed rows times LayerNorm's weight, fp32."""
    b_dnormed = load_tile_columns(p_dnormed, i_c, o_c, C, BOUNDED).to(tl.float32)
    if WEIGHT:
        b_dnormed *= load_affine_columns(p_weight, i_c, o_c, C, BOUNDED, HALVES)
    return b_dnormed


@triton.jit
def _dx_columns(b_x, b_dy, b_keys, moments, factors, NORM: tl.constexpr, MATCH: tl.constexpr,
                WIDE: tl.constexpr):  # fmt: skip
    """Return the gradient of some columns from x, LayerNorm's upstream and the selected keys."""
    b_mean, b_rstd, b_sum, b_dot = moments
    b_along, b_coefficient = factors
    b_x = b_x.to(tl.float32)
    if NORM and not WIDE:
        # x - mean of half rows in full would be a second copy of them in registers: their gradient
        # is a sum of multiples of x, of the upstream and of the keys, and a constant.
        b_slope = -b_rstd * b_dot
        if MATCH:
            b_slope += b_along
        b_dx = b_x * b_slope + b_rstd * (b_mean * b_dot - b_sum) + b_dy * b_rstd
    elif NORM:
        b_dx = b_rstd * (b_dy - b_sum - (b_x - b_mean) * b_dot)
        if MATCH:
            b_dx += b_x * b_along
    else:
        b_dx = b_x * b_along
    if MATCH:
        b_dx -= b_keys * (b_coefficient * (1.0 / KEY_SCALE))
    return b_dx


@triton.jit
def match_prompts_dx_kernel(
    p_x, p_weight, p_dnormed, p_ddistance, p_keys, p_gate, p_stats, p_dx,
    stride_xb, stride_xl, stride_db, stride_dl, stride_gb, stride_gl, stride_gw,
    batch, num_tokens, num_prefix, cls_pool, image_pool, cls_length, image_length,
    cls_count, image_count,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, MATCH: tl.constexpr,
    C: tl.constexpr, BLOCK_R: tl.constexpr, HALVES: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of rows of one role, from the normed rows and from the distance."""
    BLOCK_M: tl.constexpr = 8 * HALVES
    CHUNK: tl.constexpr = 32 * SLICES
    WIDE: tl.constexpr = p_x.dtype.element_ty == tl.float32
    LOW_PART: tl.constexpr = p_x.dtype.element_ty != tl.bfloat16
    is_cls, o_first, first, count = pick_role(
        tl.program_id(0), batch, num_tokens, num_prefix, BLOCK_M
    )
    m_rows = o_first + tile_rows(HALVES) < batch * count
    o_i = tl.minimum(o_first + tile_rows(HALVES), batch * count - 1)
    i_b, i_l = (o_i // count).to(tl.int64), (first + o_i % count).to(tl.int64)
    p_rows = p_x + i_b * stride_xb + i_l * stride_xl
    p_out = p_dx + (i_b * num_tokens + i_l) * C
    p_row = p_stats + i_b * num_tokens + i_l
    num_rows = tl.cast(batch, tl.int64) * num_tokens
    o_c = tile_columns(SLICES)

    p_upstream = p_dnormed + i_b * stride_db + i_l * stride_dl
    # [HALVES, 1, 8, 1, 1]
    moments, b_x, b_dy = (0.0, 0.0, 0.0, 0.0), (), ()
    if NORM:
        b_mean = tl.load(p_row + 2 * num_rows)
        b_rstd = tl.load(p_row + 3 * num_rows)
        b_sum = tl.zeros([HALVES, SLICES, 8, 4, 8], tl.float32)
        b_dot = tl.zeros([HALVES, SLICES, 8, 4, 8], tl.float32)
        if held(HALVES):
            for i_c in tl.static_range(0, C, CHUNK):
                # [HALVES, SLICES, 8, 4, 8]
                b_chunk = load_tile_columns(p_rows, i_c, o_c, C, i_c + CHUNK <= C)
                b_upstream = _load_weighted(
                    p_upstream, p_weight, i_c, o_c, C, i_c + CHUNK <= C, HALVES, WEIGHT
                )
                b_sum += b_upstream
                b_dot += b_upstream * (b_chunk.to(tl.float32) - b_mean)
                b_x += (b_chunk,)
                b_dy += (b_upstream,)
        else:
            for i_c in tl.range(0, C, CHUNK, loop_unroll_factor=unroll_factor(C, CHUNK)):
                b_chunk = load_tile_columns(p_rows, i_c, o_c, C, C % CHUNK == 0)
                b_upstream = _load_weighted(
                    p_upstream, p_weight, i_c, o_c, C, C % CHUNK == 0, HALVES, WEIGHT
                )
                b_sum += b_upstream
                b_dot += b_upstream * (b_chunk.to(tl.float32) - b_mean)
        b_sum = row_sum(b_sum) * (1.0 / C)
        b_dot = row_sum(b_dot) * (b_rstd * b_rstd * (1.0 / C))
        moments = (b_mean, b_rstd, b_sum, b_dot)
    factors = (0.0, 0.0)
    num_keys = cls_pool + image_pool
    if MATCH:
        pool = tl.where(is_cls, cls_pool, image_pool)
        p_keys += tl.where(is_cls, 0, cls_pool) * C
        o_r, o_m = tl.arange(0, BLOCK_R), o_first + tl.arange(0, BLOCK_M)
        i_bm, i_lm = (o_m // count).to(tl.int64), (first + o_m % count).to(tl.int64)
        p_words = p_gate + i_bm * stride_gb + i_lm * stride_gl
        m_entry = (o_m < batch * count)[:, None] & (o_r < pool)[None, :]
        m_selected = load_selected(
            p_words[:, None], stride_gw, o_r[None, :], tl.where(is_cls, 0, cls_pool * cls_length),
            tl.where(is_cls, cls_length, image_length), m_entry,
        )  # fmt: skip
        # [SLICES, M, R] or [M, R]
        b_selected = tl.where(m_selected, 1.0, 0.0).to(tl.float16)
        if held(HALVES):
            b_selected = tl.broadcast_to(b_selected[None, :, :], [SLICES, BLOCK_M, BLOCK_R])
        b_inverse = tl.load(p_row)
        b_similarity = tl.load(p_row + num_rows)
        coefficient = tl.load(p_ddistance) / tl.cast(
            tl.where(is_cls, cls_count, image_count), tl.float32
        )
        b_coefficient = coefficient * b_inverse
        factors = (b_coefficient * b_inverse * b_similarity, b_coefficient)
    if held(HALVES):
        for i_c in tl.static_range(0, C, CHUNK):
            if NORM:
                b_chunk, b_upstream = b_x[i_c // CHUNK], b_dy[i_c // CHUNK]
            else:
                b_chunk = load_tile_columns(p_rows, i_c, o_c, C, i_c + CHUNK <= C)
                b_upstream = 0.0
            b_keys = 0.0
            if MATCH:
                b_keys = _selected_keys(
                    b_selected, p_keys, i_c, pool, num_keys, C, HALVES, SLICES, LOW_PART
                )
            b_dx = _dx_columns(b_chunk, b_upstream, b_keys, moments, factors, NORM, MATCH, WIDE)
            store_tile_columns(p_out, i_c, o_c, b_dx, m_rows, C, i_c + CHUNK <= C)
    else:
        for i_c in tl.range(0, C, CHUNK):
            b_chunk = load_tile_columns(p_rows, i_c, o_c, C, C % CHUNK == 0)
            b_upstream, b_keys = 0.0, 0.0
            if NORM:
                b_upstream = _load_weighted(
                    p_upstream, p_weight, i_c, o_c, C, C % CHUNK == 0, HALVES, WEIGHT
                )
            if MATCH:
                b_keys = _selected_keys(
                    b_selected, p_keys, i_c, pool, num_keys, C, HALVES, SLICES, LOW_PART
                )
            b_dx = _dx_columns(b_chunk, b_upstream, b_keys, moments, factors, NORM, MATCH, WIDE)
            store_tile_columns(p_out, i_c, o_c, b_dx, m_rows, C, C % CHUNK == 0)


def launch_dx(
    dnormed: Tensor | None,
    ddistance: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor,
    stats: Tensor,
    key_parts: Tensor,
    matching: Matching,
    dx: Tensor,
) -> None:
    """Write the gradient of x; `dnormed` or `ddistance` may be absent, not both."""
    upstream = x if dnormed is None else dense_rows(dnormed)
    launch = launch_of("match_prompts_dx" if dnormed is None else "norm_match_dx", x)
    num_tiles = sum(matching.num_tiles(x, 8 * launch.blocks["HALVES"]))
    if num_tiles == 0:
        return
    match_prompts_dx_kernel[(num_tiles,)](
        x, x if weight is None else weight, upstream, stats if ddistance is None else ddistance,
        key_parts, gate, stats, dx,
        x.stride(0), x.stride(1), upstream.stride(0), upstream.stride(1), *gate.stride(),
        x.shape[0], x.shape[1], matching.num_prefix, matching.cls_pool, matching.image_pool,
        matching.cls_length, matching.image_length, *matching.counts(x),
        NORM=dnormed is not None, WEIGHT=weight is not None, MATCH=ddistance is not None,
        C=x.shape[2], BLOCK_R=matching.block_r, enable_fp_fusion=True, **launch.options(),
    )  # fmt: skip


@torch.library.custom_op("tcpa::match_prompts_backward", mutates_args=())
def match_prompts_backward(
    dnormed: Tensor | None,
    ddistance: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor,
    stats: Tensor,
    key_parts: Tensor,
    key_inverse: Tensor,
    numbers: Sequence[int],
    need_dx: bool,
    need_dkeys: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and, float32 `[R_cls + R_image, C]`, of the keys; empty if unasked.

    `numbers` are the fields of a `Matching`.
    """
    matching, x = Matching(*numbers), dense_rows(x)
    dx, dkeys = _empty_gradients(x, key_inverse, need_dx, need_dkeys)
    with device_guard(x):
        if need_dx:
            launch_dx(dnormed, ddistance, x, weight, gate, stats, key_parts, matching, dx)
        if need_dkeys:
            launch_keys_backward(ddistance, x, gate, stats, key_parts, key_inverse, matching, dkeys)
    return dx, dkeys


@match_prompts_backward.register_fake
def _(dnormed, ddistance, x, weight, gate, stats, key_parts, key_inverse, numbers, need_dx,
      need_dkeys):  # fmt: skip
    return _empty_gradients(x, key_inverse, need_dx, need_dkeys)


def _empty_gradients(
    x: Tensor, key_inverse: Tensor, need_dx: bool, need_dkeys: bool
) -> tuple[Tensor, Tensor]:
    keys_shape = (key_inverse.shape[0], x.shape[2]) if need_dkeys else (0,)
    dkeys = x.new_empty(keys_shape, dtype=torch.float32)
    return x.new_empty(x.shape if need_dx else (0,)), dkeys


__all__ = ["match_prompts_backward", "match_prompts_dx_kernel"]
