"""Device primitives of prompt matching: tiles of token rows, split operands, exact selection.

A tile holds BLOCK_M = 8 * HALVES rows and 32 * SLICES columns as `[HALVES, SLICES, 8, 4, 8]`: row
8 h + g and column 32 s + 8 t + v at index (h, s, g, t, v). Eight consecutive columns belong to one
thread, (g, t) to one warp and s to the warps, so that 16-byte loads from global memory are already
the operands of a tensor-core product once `fragments` has renamed the columns of a group of 32.
Products over C are split over the warps; nothing but their sum goes through shared memory.

Axes: B batch, L tokens, M tile rows, R pool entries, C width, W gate words.
Names in kernels: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block in registers.
"""

import triton
import triton.language as tl

# Unit keys are stored as two float16 parts, scaled so that the low part keeps all its digits.
KEY_SCALE = tl.constexpr(32768.0)
NORM_EPS = tl.constexpr(1e-12)
# A row times power_of_two(1 / |x|, ROW_EXPONENT) has norm 2 ** 13 to 2 ** 14, within float16.
ROW_EXPONENT = tl.constexpr(14)


@triton.jit
def pick_role(i_tile, batch, num_tokens, num_prefix, BLOCK_M: tl.constexpr):
    """Return whether a tile holds prefix tokens, its first row, its first token and their number.

    Tiles never mix: those of all prefix tokens come first, then those of all patches. Row i of a
    role is token `first + i % count` of sample `i // count`.
    """
    num_cls_tiles = tl.cdiv(batch * num_prefix, BLOCK_M)
    is_cls = i_tile < num_cls_tiles
    o_row = tl.where(is_cls, i_tile, i_tile - num_cls_tiles) * BLOCK_M
    first = tl.where(is_cls, 0, num_prefix)
    return is_cls, o_row, first, tl.where(is_cls, num_prefix, num_tokens - num_prefix)


@triton.jit
def key_row(is_cls, cls_pool, image_pool):
    """Return the first key of a role and its last entry; of an empty pool some key that exists."""
    pool = tl.where(is_cls, cls_pool, image_pool)
    first = tl.where(is_cls | (image_pool == 0), 0, cls_pool)
    return first, tl.maximum(pool, 1) - 1


@triton.jit
def tile_rows(HALVES: tl.constexpr):
    """Return the rows of a tile, int32 `[HALVES, 1, 8, 1, 1]`."""
    o_h = tl.arange(0, HALVES)[:, None, None, None, None]
    return o_h * 8 + tl.arange(0, 8)[None, None, :, None, None]


@triton.jit
def tile_columns(SLICES: tl.constexpr):
    """Return the first of every eight columns of a tile, int32 `[1, SLICES, 1, 4, 1]`."""
    o_s = tl.arange(0, SLICES)[None, :, None, None, None]
    return o_s * 32 + tl.arange(0, 4)[None, None, None, :, None] * 8


@triton.jit
def _load(pointers, mask, BOUNDED: tl.constexpr):
    if BOUNDED:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_tile_columns(p_rows, I_C: tl.constexpr, o_c, C: tl.constexpr):
    """Load the chunk of columns that begins at I_C; `o_c` are the `tile_columns`.

    Rows carry no mask: a caller repeats the last row instead, which costs no traffic and no select.
    """
    BOUNDED: tl.constexpr = I_C + 32 * o_c.shape[1] <= C
    o_c += I_C
    p_first = p_rows + o_c
    if p_first.dtype.element_ty.primitive_bitwidth == 32:
        # Two loads of 16 bytes keep the eight columns in one thread.
        o_v = tl.arange(0, 4)[None, None, None, None, :]
        b_low = _load(p_first + o_v, o_c + o_v < C, BOUNDED)
        b_high = _load(p_first + 4 + o_v, o_c + 4 + o_v < C, BOUNDED)
        b_both = tl.permute(tl.join(b_low, b_high), (0, 1, 2, 3, 5, 4))
        shape: tl.constexpr = b_low.shape
        return tl.reshape(b_both, [shape[0], shape[1], shape[2], 4, 8])
    o_v = tl.arange(0, 8)[None, None, None, None, :]
    return _load(p_first + o_v, o_c + o_v < C, BOUNDED)


@triton.jit
def store_tile_columns(p_rows, I_C: tl.constexpr, o_c, b_tile, m_rows, C: tl.constexpr):
    """Store what `load_tile_columns` loads."""
    BOUNDED: tl.constexpr = I_C + 32 * o_c.shape[1] <= C
    o_c += I_C
    p_first = p_rows + o_c
    b_tile = b_tile.to(p_first.dtype.element_ty)
    if p_first.dtype.element_ty.primitive_bitwidth == 32:
        o_v = tl.arange(0, 4)[None, None, None, None, :]
        m_low = m_rows if BOUNDED else m_rows & (o_c + o_v < C)
        m_high = m_rows if BOUNDED else m_rows & (o_c + 4 + o_v < C)
        shape: tl.constexpr = b_tile.shape
        b_both = tl.reshape(b_tile, [shape[0], shape[1], shape[2], 4, 2, 4])
        b_low, b_high = tl.split(tl.permute(b_both, (0, 1, 2, 3, 5, 4)))
        tl.store(p_first + o_v, b_low, mask=m_low)
        tl.store(p_first + 4 + o_v, b_high, mask=m_high)
    else:
        o_v = tl.arange(0, 8)[None, None, None, None, :]
        tl.store(p_first + o_v, b_tile, mask=m_rows if BOUNDED else m_rows & (o_c + o_v < C))


@triton.jit
def fragments(b_tile):
    """Turn `[HALVES, SLICES, 8, 4, 8]` into `[SLICES, 8 * HALVES, 32]`, columns renamed.

    Column 8 t + 4 k + 2 p + e moves to 16 k + 8 p + 2 t + e, where a product of 16 x 8 x 16 wants
    what thread t holds. Both operands are renamed alike, so their product over C does not change.
    """
    HALVES: tl.constexpr = b_tile.shape[0]
    SLICES: tl.constexpr = b_tile.shape[1]
    b_tile = tl.reshape(b_tile, [HALVES, SLICES, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(b_tile, (1, 0, 2, 4, 5, 3, 6)), [SLICES, HALVES * 8, 32])


@triton.jit
def power_of_two(b_inverse, EXPONENT: tl.constexpr):
    """Return 2 ** (floor(log2(b_inverse)) + EXPONENT), float32, of a positive float32."""
    b_exponent = b_inverse.to(tl.int32, bitcast=True) >> 23
    return ((b_exponent + EXPONENT) << 23).to(tl.float32, bitcast=True)


@triton.jit
def mantissa(b_value):
    """Return a positive normal float32 divided by its power of two, in [1, 2)."""
    b_bits = b_value.to(tl.int32, bitcast=True)
    return ((b_bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def split_half(b_value):
    """Split float32 into two float16 parts whose sum has 22 digits."""
    b_high = b_value.to(tl.float16)
    return b_high, (b_value - b_high.to(tl.float32)).to(tl.float16)


@triton.jit
def add_products(b_sum, b_scaled, b_keys, b_keys_low, EXACT: tl.constexpr):
    """Add scaled token columns times both parts of the unit keys, `[SLICES, M, R]`.

    EXACT says that the tokens are float16 numbers; other tokens are split too.
    """
    b_keys = tl.permute(fragments(b_keys), (0, 2, 1))
    b_keys_low = tl.permute(fragments(b_keys_low), (0, 2, 1))
    b_high, b_low = split_half(b_scaled)
    if not EXACT:
        b_low = fragments(b_low)
        # [SLICES, M, 32] @ [SLICES, 32, R] -> [SLICES, M, R]; small terms first.
        b_sum = tl.dot(b_low, b_keys_low, b_sum)
        b_sum = tl.dot(b_low, b_keys, b_sum)
    b_high = fragments(b_high)
    b_sum = tl.dot(b_high, b_keys_low, b_sum)
    return tl.dot(b_high, b_keys, b_sum)


@triton.jit
def preference(b_similarity, m_entry, FARTHEST: tl.constexpr):
    """Map similarities to integers so that the preferred entry is the larger one.

    Differences of two of them fit int32. NaN counts as most similar, as in torch.argsort; entries
    outside the pool come last. Cosines beyond +-2 (not from finite rows) are clamped.
    """
    # -0.0 + 0.0 is 0.0: equal similarities must become equal integers.
    b_bits = (b_similarity + 0.0).to(tl.int32, bitcast=True)
    b_order = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    b_order = tl.minimum(tl.maximum(b_order, -0x3FFFFFFD), 0x3FFFFFFD)
    b_order = tl.where(b_similarity != b_similarity, 0x3FFFFFFE, b_order)
    if FARTHEST:
        b_order = -b_order
    return tl.where(m_entry, b_order, -0x3FFFFFFF)


@triton.jit
def count_ahead(b_order, b_other, o_first):
    """Count for every entry `[M, R]` how many of `[M, N]`, entries `o_first ...`, go before it."""
    o_own = tl.arange(0, b_order.shape[1])
    o_other = o_first + tl.arange(0, b_other.shape[1])
    # [N, R]: an entry of lower index wins a tie.
    b_wins_tie = (o_other[:, None] < o_own[None, :]).to(tl.int32)
    # [N, M, R]: the sign bit says that the other entry goes before.
    b_lead = b_order[None, :, :] - tl.trans(b_other)[:, :, None] - b_wins_tie[:, None, :]
    return -tl.sum(b_lead >> 31, 0)


@triton.jit
def rank_entries(b_order, WHOLE: tl.constexpr):
    """Return the place of every entry of `[M, R]` in its row, 0 for the most preferred.

    Up to WHOLE entries are compared with all others at once, more in two halves.
    """
    M: tl.constexpr = b_order.shape[0]
    R: tl.constexpr = b_order.shape[1]
    if R <= WHOLE:
        return count_ahead(b_order, b_order, 0)
    # One half after the other: all pairs at once would not fit the registers.
    b_halves = tl.permute(tl.reshape(b_order, [M, 2, R // 2]), (0, 2, 1))
    b_left, b_right = tl.split(b_halves)
    return count_ahead(b_order, b_left, 0) + count_ahead(b_order, b_right, R // 2)


@triton.jit
def entry_bits(o_r, first_bit, length, i_word):
    """Return int32 `[R]`: the bits of each entry's `length` prompt rows in one gate word."""
    b_start = first_bit + o_r * length - 32 * i_word
    b_low = tl.minimum(tl.maximum(b_start, 0), 32)
    b_count = tl.minimum(tl.maximum(b_start + length, 0), 32) - b_low
    b_ones = tl.full(o_r.shape, 0xFFFFFFFF, tl.uint32) >> tl.minimum(32 - b_count, 31).to(tl.uint32)
    b_bits = (b_ones << tl.minimum(b_low, 31).to(tl.uint32)).to(tl.int32, bitcast=True)
    return tl.where(b_count > 0, b_bits, 0)


@triton.jit
def load_selected(p_gate_rows, stride_w, o_r, first_bit, length, mask):
    """Return bool: the first prompt row of entry `o_r` is visible in a row's gate words."""
    o_bit = first_bit + o_r * length
    b_word = tl.load(p_gate_rows + (o_bit // 32) * stride_w, mask=mask, other=0)
    return ((b_word >> (o_bit % 32)) & 1) != 0


@triton.jit
def row_sum(b_tile):
    """Add the columns of a tile: `[HALVES, SLICES, 8, 4, 8]` to `[HALVES, 1, 8, 1, 1]`."""
    return tl.sum(tl.sum(tl.sum(b_tile, 4), 3), 1)[:, None, :, None, None]
