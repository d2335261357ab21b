"""FLOPs and bytes of the operations, from formulas. A multiply-add counts as two FLOPs.

Bytes are what has to cross the memory bus at least: every input read once, every output written
once.
"""

from dataclasses import dataclass

from ..harness.case import DTYPES, Shape


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one call."""

    flops: float
    """FLOPs of the matrix products."""
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return what arithmetic or memory, whichever takes longer, takes at these rates."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def gated_attention(shape: Shape, dtype: str, mode: str) -> Cost:
    """Return the work of `gated_attention`, tokens and prompts, one layer.

    Forward: two products over L x (L + P) scores, q, k, v read, o written. Backward: five products;
    q, k, v, o and the gradient of o read, three gradients written.
    """
    vit, tokens, prompts = shape.vit, shape.tokens, shape.prompts
    product = 2.0 * shape.batch * vit.heads * tokens * (tokens + prompts) * vit.head_dim
    item = DTYPES[dtype].itemsize
    rows = shape.batch * tokens * vit.width * item
    own = shape.batch if shape.per_sample else 1
    prompt_rows = own * prompts * vit.width * item
    words = 4.0 * shape.batch * tokens * -(-prompts // 32)
    statistics = 4.0 * shape.batch * vit.heads * tokens
    forward = Cost(2 * product, 4 * rows + 2 * prompt_rows + words + statistics)
    backward = Cost(5 * product, 8 * rows + 4 * prompt_rows + words + statistics)
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def match_prompts(shape: Shape, dtype: str, mode: str) -> Cost:
    """Return the work of `match_prompts`, one layer.

    Forward: one product with the keys of both pools; x read, gate words written. Backward: one
    product for x, one for the keys; x read, its gradient written.
    """
    vit, entries = shape.vit, shape.prompts
    product = 2.0 * shape.batch * shape.tokens * vit.width * entries
    rows = shape.batch * shape.tokens * vit.width * DTYPES[dtype].itemsize
    words = 4.0 * shape.batch * shape.tokens * -(-entries // 32)
    keys = 4.0 * entries * vit.width
    forward = Cost(product, rows + words + keys)
    backward = Cost(2 * product, 2 * rows + words + 2 * keys)
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def norm_match(shape: Shape, dtype: str, mode: str) -> Cost:
    """Return the work of `norm_match`: that of `match_prompts`, and the normed rows.

    Forward: they are written. Backward: their gradient is read.
    """
    rows = shape.batch * shape.tokens * shape.vit.width * DTYPES[dtype].itemsize
    count = 2 if mode == "both" else 1
    return match_prompts(shape, dtype, mode) + Cost(0.0, float(count * rows))


OPERATIONS = {
    "gated_attention": gated_attention,
    "match_prompts": match_prompts,
    "norm_match": norm_match,
}
