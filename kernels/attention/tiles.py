"""Device primitives of gated attention: tiles of rows, the one sequence of keys, gate bits.

Axes: B batch, H heads, L query tokens, P prompt rows, S = L + P keys, D head dim, W gate words.
Names in kernels: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block in registers.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(p_rows, stride, o_row, num_rows, o_d, D: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Load rows `o_row ...` of a matrix; rows and columns past its end are zero."""
    o_r = tl.arange(0, BLOCK_ROWS)
    p_tile = p_rows + tl.cast(o_row, tl.int64) * stride + o_r[:, None] * stride + o_d[None, :]
    m_tile = (o_row + o_r < num_rows)[:, None] & (o_d < D)[None, :]
    # [BLOCK_ROWS, D]
    return tl.load(p_tile, mask=m_tile, other=0.0)


@triton.jit
def store_tile(
    p_rows, stride, o_row, num_rows, o_d, b_tile, D: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Store the rows of `b_tile` that lie inside the matrix; `o_row` may be negative."""
    o_r = tl.arange(0, BLOCK_ROWS)
    p_tile = p_rows + tl.cast(o_row, tl.int64) * stride + o_r[:, None] * stride + o_d[None, :]
    m_row = (o_row + o_r >= 0) & (o_row + o_r < num_rows)
    m_tile = m_row[:, None] & (o_d < D)[None, :]
    tl.store(p_tile, b_tile.to(p_tile.dtype.element_ty), mask=m_tile)


@triton.jit
def load_keys(
    p_prompts, stride_p, p_tokens, stride_l, o_key, num_prompts, first_token, o_d,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Load keys (or values) `o_key ...` of the one sequence prompts, gap, tokens.

    Rows 0 to P - 1 are prompts, rows `first_token ...` tokens. The gap between them is zero; it
    fills up the sequence to whole blocks, so that the blocks of tokens alone (`MIXED` false) are
    full and need no mask. A mixed block is two masked loads: one load from selected pointers would
    not be vectorised.
    """
    o_n = tl.arange(0, BLOCK_N)
    m_d = (o_d < D)[None, :]
    p_rows = p_tokens + tl.cast(o_key - first_token, tl.int64) * stride_l
    p_rows = p_rows + o_n[:, None] * stride_l + o_d[None, :]
    if not MIXED:
        # [N, D]
        return tl.load(p_rows, mask=m_d, other=0.0)
    m_token = (o_key + o_n >= first_token)[:, None]
    m_prompt = (o_key + o_n < num_prompts)[:, None]
    b_token = tl.load(p_rows, mask=m_token & m_d, other=0.0)
    p_rows = p_prompts + tl.cast(o_key, tl.int64) * stride_p
    p_rows = p_rows + o_n[:, None] * stride_p + o_d[None, :]
    # [N, D]
    return tl.load(p_rows, mask=m_prompt & m_d, other=b_token)


@triton.jit
def is_key(o_row, num_prompts, first_token):
    """Return bool [N]: rows of the key sequence outside its gap."""
    return (o_row < num_prompts) | (o_row >= first_token)


@triton.jit
def gate_bits(o_n, i_word: tl.constexpr):
    """Return int32 [N]: the bit of key `o_n` in word `i_word` of its block, 0 outside this word."""
    return tl.where(o_n // 32 == i_word, 1 << (o_n % 32), 0)


@triton.jit
def visible_prompts(
    p_words, o_key, first_token, m_m, BLOCK_N: tl.constexpr, NUM_WORDS: tl.constexpr
):
    """Return bool [M, N]: the keys of a block that each query may use; tokens always."""
    o_n = tl.arange(0, BLOCK_N)
    # [1, N]
    b_set = tl.where(o_key + o_n >= first_token, 1, 0)[None, :]
    for i_word in tl.static_range(min(NUM_WORDS, BLOCK_N // 32)):
        # [M]
        o_w = tl.where(m_m, o_key // 32 + i_word, NUM_WORDS)
        b_word = tl.load(p_words + o_w, mask=o_w < NUM_WORDS, other=0)
        # [M, N]
        b_set |= b_word[:, None] & gate_bits(o_n, i_word)[None, :]
    return b_set != 0


@triton.jit
def visible_to(p_words, o_key, first_token, m_m, BLOCK_N: tl.constexpr, NUM_WORDS: tl.constexpr):
    """Return bool [N, M]: the transpose of `visible_prompts`."""
    o_n = tl.arange(0, BLOCK_N)
    # [N, 1]
    b_set = tl.where(o_key + o_n >= first_token, 1, 0)[:, None]
    for i_word in tl.static_range(min(NUM_WORDS, BLOCK_N // 32)):
        # [M]
        o_w = tl.where(m_m, o_key // 32 + i_word, NUM_WORDS)
        b_word = tl.load(p_words + o_w, mask=o_w < NUM_WORDS, other=0)
        # [N, M]
        b_set |= gate_bits(o_n, i_word)[:, None] & b_word[None, :]
    return b_set != 0


@triton.jit
def exp2(x):
    """Return 2 ** x."""
    return tl.math.exp2(x)


__all__ = [
    "exp2",
    "gate_bits",
    "is_key",
    "load_keys",
    "load_tile",
    "store_tile",
    "visible_prompts",
    "visible_to",
]
