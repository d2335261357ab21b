"""Device primitives of prompt matching: tiles of token rows, split operands, exact selection.

A tile holds BLOCK_M = 8 * HALVES rows and 32 * SLICES columns as `[HALVES, SLICES, 8, 4, 8]`: g of
the eight rows of half h (`tile_rows`) and column 32 s + 8 t + v at index (h, s, g, t, v). Eight
consecutive columns belong to one thread, (g, t) to one warp, so that 16-byte loads from global
memory are already the operands of a tensor-core product once `fragments` has renamed the columns of
a group of 32. Two kinds of tile (`held`):

- 16 or 32 rows, slices split over the warps. All columns stay in registers, rows are read once.
  Nothing but the sum of the warps' products goes through shared memory; the products are mma.sync.
- 64 rows or more, one slice, halves split over the warps: what wgmma takes. Rows are read once for
  their moments and once for the rest, the keys a quarter as often.

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
    PAIRS: tl.constexpr = HALVES // 2
    if PAIRS > 1:
        # A warp of a tall tile holds every PAIRS-th half; a product wants it to hold 16 rows that
        # follow one another.
        o_h = o_h % PAIRS * 2 + o_h // PAIRS
    return o_h * 8 + tl.arange(0, 8)[None, None, :, None, None]


@triton.jit
def tile_columns(SLICES: tl.constexpr):
    """Return the first of every eight columns of a tile, int32 `[1, SLICES, 1, 4, 1]`."""
    o_s = tl.arange(0, SLICES)[None, :, None, None, None]
    return o_s * 32 + tl.arange(0, 4)[None, None, None, :, None] * 8


@triton.constexpr_function
def held(HALVES):
    """Return whether rows stay in registers; tiles of 64 rows or more are read once per pass."""
    return HALVES < 8


@triton.constexpr_function
def unroll_factor(C, CHUNK):
    """Return how many chunks to load at a time: a divisor, for there is no second loop."""
    chunks = -(-C // CHUNK)
    return 4 if chunks % 4 == 0 else 2 if chunks % 2 == 0 else 1


@triton.jit
def _load(pointers, mask, BOUNDED: tl.constexpr):
    if BOUNDED:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_tile_columns(p_rows, i_c, o_c, C: tl.constexpr, BOUNDED: tl.constexpr):
    """Load the chunk of columns that begins at i_c; `o_c` are the `tile_columns`.

    BOUNDED says that the chunk ends before C. Rows carry no mask: a caller repeats the last row
    instead, which costs no traffic and no select.
    """
    o_c += i_c
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
def load_affine_columns(p_row, i_c, o_c, C: tl.constexpr, BOUNDED: tl.constexpr,
                        HALVES: tl.constexpr):  # fmt: skip
    """Load columns of one row, fp32, as a tile of equal rows that broadcasts to HALVES."""
    # A row for every warp of a tall tile, so that each loads what its own threads multiply.
    ROWS: tl.constexpr = 1 if held(HALVES) else HALVES // 2
    b_row = load_tile_columns(p_row + tile_rows(ROWS) * 0, i_c, o_c, C, BOUNDED).to(tl.float32)
    if not held(HALVES):
        b_both = tl.permute(tl.join(b_row, b_row), (5, 0, 1, 2, 3, 4))
        b_row = tl.reshape(b_both, [HALVES, b_row.shape[1], 8, 4, 8])
    return b_row


@triton.jit
def store_tile_columns(
    p_rows, i_c, o_c, b_tile, m_rows, C: tl.constexpr, BOUNDED: tl.constexpr
):  # fmt: skip
    """Store what `load_tile_columns` loads."""
    o_c += i_c
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
def fragments(b_tile, MATRIX: tl.constexpr):
    """Turn `[HALVES, SLICES, 8, 4, 8]` into `[SLICES, 8 * HALVES, 32]`, columns renamed.

    MATRIX leaves out SLICES, which is 1: wgmma takes no batch.

    Column 8 t + 4 k + 2 p + e moves to 16 k + 8 p + 2 t + e, where a product of 16 x 8 x 16 wants
    what thread t holds. Both operands are renamed alike, so their product over C does not change.
    """
    HALVES: tl.constexpr = b_tile.shape[0]
    SLICES: tl.constexpr = b_tile.shape[1]
    b_tile = tl.reshape(b_tile, [2, HALVES // 2, SLICES, 8, 4, 2, 2, 2])
    b_tile = tl.permute(b_tile, (2, 1, 0, 3, 5, 6, 4, 7))
    shape: tl.constexpr = [HALVES * 8, 32] if MATRIX else [SLICES, HALVES * 8, 32]
    return tl.reshape(b_tile, shape)


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
def _transposed(b_keys):
    return tl.trans(b_keys) if len(b_keys.shape) == 2 else tl.permute(b_keys, (0, 2, 1))


@triton.jit
def add_products(b_sum, b_scaled, b_keys, b_keys_low, EXACT: tl.constexpr):
    """Add scaled token columns times both parts of the unit keys, `[SLICES, M, R]` or `[M, R]`.

    EXACT says that the tokens are float16 numbers; other tokens are split too.
    """
    MATRIX: tl.constexpr = len(b_sum.shape) == 2
    b_keys = _transposed(fragments(b_keys, MATRIX))
    b_keys_low = _transposed(fragments(b_keys_low, MATRIX))
    b_high, b_low = split_half(b_scaled)
    if not EXACT:
        b_low = fragments(b_low, MATRIX)
        # [SLICES, M, 32] @ [SLICES, 32, R] -> [SLICES, M, R]; small terms first.
        b_sum = tl.dot(b_low, b_keys_low, b_sum)
        b_sum = tl.dot(b_low, b_keys, b_sum)
    b_high = fragments(b_high, MATRIX)
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


@triton.jit
def row_vector(b_rows):
    """Turn a value per row, `[HALVES, 1, 8, 1, 1]`, into `[8 * HALVES]` in the order of rows."""
    HALVES: tl.constexpr = b_rows.shape[0]
    b_rows = tl.permute(tl.reshape(b_rows, [2, HALVES // 2, 8]), (1, 0, 2))
    return tl.reshape(b_rows, [8 * HALVES])
