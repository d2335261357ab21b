"""FLOPs and bytes of the attention of one block, fused or with a dense mask.

Fused: no scores reach memory; the backward pass makes them again. Dense (`Savings.gate_bits` off):
`dense_gated_attention` as PyTorch runs it, one pass over memory for each of its steps; 16-bit
scores are widened for the softmax.

Axes: B batch, H heads, D head dim, Q queries, T token rows, P prompt rows, S = T + P keys.
"""

from dataclasses import dataclass

from .operations import Cost


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSizes:
    """Sizes of one call."""

    batch: int
    heads: int
    head_dim: int
    item: int
    """Bytes of an element."""
    queries: int
    """Q, token rows that attend."""
    tokens: int
    prompts: int
    """P, keys that are prompts and have no row of their own."""
    prompt_samples: int
    """B, or 1 where the batch shares the prompts' keys and values."""
    prompt_queries: int = 0
    """Rows of prompts that attend too and are thrown away (dense form)."""
    gated: bool = False
    token_gradient: bool = True
    """Whether q, k and v of the tokens have a gradient, or only the prompts."""

    def product(self, queries: int, keys: int) -> float:
        """FLOPs of one product over `queries x keys` scores of all heads."""
        return 2.0 * self.batch * self.heads * queries * keys * self.head_dim

    def rows(self, rows: int) -> float:
        """Bytes of `[B, rows, H, D]`."""
        return float(self.batch * rows * self.heads * self.head_dim * self.item)

    @property
    def prompt_rows(self) -> float:
        """Bytes of the prompts' keys, or of their values."""
        return self.rows(self.prompts) * self.prompt_samples / self.batch

    @property
    def statistics(self) -> float:
        """Bytes of the gate words and of the softmax's float32 statistics."""
        words = -(-self.prompts // 32) if self.gated else 0
        return 4.0 * self.batch * self.queries * (words + self.heads)


def fused_forward(a: AttentionSizes) -> Cost:
    """Two products; q, k, v read, o written."""
    flops = 2 * a.product(a.queries, a.tokens + a.prompts)
    moved = 2 * a.rows(a.queries) + 2 * a.rows(a.tokens) + 2 * a.prompt_rows
    return Cost(flops, moved + a.statistics)


def fused_backward(a: AttentionSizes) -> tuple[Cost, float]:
    """Return the work, and the FLOPs of the scores that are made again.

    Five products; q, k, v, o and the gradient of o read, three gradients written. For the prompts
    alone four products over their columns: their scores again, dP, dV and dK.
    """
    if a.token_gradient:
        product, count = a.product(a.queries, a.tokens + a.prompts), 5
        moved = 4 * a.rows(a.queries) + 4 * a.rows(a.tokens)
    else:
        product, count = a.product(a.queries, a.prompts), 4
        moved = 3 * a.rows(a.queries)
    return Cost(count * product, moved + 4 * a.prompt_rows + a.statistics), product


def _dense_sizes(a: AttentionSizes) -> tuple[float, float, float, float]:
    """Scores of all rows and of those that are kept; bytes of a wide score, and of a cast."""
    heads, keys = a.batch * a.heads, a.tokens + a.prompts
    kept = float(heads * a.queries * keys)
    wide = max(4, a.item)
    return kept + heads * a.prompt_queries * keys, kept, wide, (a.item + wide) * (a.item < wide)


def dense_forward(a: AttentionSizes) -> Cost:
    """Keys and values concatenated, scores, scale, softmax, mask, and the product with the values.

    Source:
        The official attention layer: its mask is built anew in every block.
    """
    every, kept, wide, cast = _dense_sizes(a)
    keys = a.tokens + a.prompts
    flops = a.product(a.queries + a.prompt_queries, keys) + a.product(a.queries, keys)
    scores = every * (a.item + 2 * a.item + a.item + wide)  # product, scale, softmax
    masked = kept * (a.item + wide + a.item + wide + cast + a.item)  # mask, gated, cast, product
    joined = 4 * a.rows(keys) + 2 * a.rows(keys)  # read and written once, read by the products
    return Cost(flops, scores + masked + joined + 2 * a.rows(a.queries))


def dense_backward(a: AttentionSizes) -> tuple[Cost, float]:
    """Return the work of the four products, without dQ where no token has a gradient, and 0.

    Nothing is made again: what the forward pass wrote is kept and read.
    """
    every, kept, wide, cast = _dense_sizes(a)
    keys, rows = a.tokens + a.prompts, a.queries + a.prompt_queries
    flops = 2 * a.product(a.queries, keys) + (1 + a.token_gradient) * a.product(rows, keys)
    # dP, its cast, the mask, the product dV; then the slice's gradient, softmax, cast, scale, dQ
    # and dK.
    gated = kept * (a.item + cast + 2 * wide + a.item + a.item)
    padded = (kept + every) * wide if a.prompt_queries else 0.0
    scores = every * (3 * wide + cast + 2 * a.item + (1 + a.token_gradient) * a.item)
    moved = 3 * a.rows(a.queries) + 4 * a.rows(keys)
    return Cost(flops, gated + padded + scores + moved), 0.0
