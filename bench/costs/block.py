"""The operations of one transformer block, as `tcpa.block` runs it, with FLOPs and bytes.

Axes: B batch, L tokens, P prompt rows, R pool entries, C width.
"""

from collections.abc import Iterator

from .attention import (
    AttentionSizes,
    dense_backward,
    dense_forward,
    fused_backward,
    fused_forward,
)
from .operations import Cost
from .workload import MLP_RATIO, Direction, Operation, Workload, linear, weight_gradient


class BlockCost:
    """One block of a workload."""

    def __init__(self, work: Workload, index: int, *, train: bool) -> None:
        """Decide which rows the block computes; see `tcpa.block.run_block`."""
        saved, has_prompts = work.savings, work.prompts > 0
        self.work, self.index, self.width = work, index, work.vit.width
        # Prompts that are more than keys and values: TCPA's join the projection, VPT's the block.
        plain = has_prompts and not saved.prompt_keys_only
        self.joined = plain and work.method == "tcpa"
        self.in_block = plain and not self.joined
        self.tokens = work.tokens + work.prompts * self.in_block
        cut = saved.last_block_head_rows and index == work.vit.depth - 1 and not self.in_block
        self.rows = 1 if cut else self.tokens
        self.prompt_keys = 0 if self.in_block else work.prompts
        once = saved.prompt_kv_once and saved.prompt_keys_only
        self.prompt_samples = 1 if once and not (train and work.per_sample) else work.batch
        # An evaluation keeps what was computed outside the blocks from batch to batch.
        projected = has_prompts and not plain and (train or not once)
        self.prompt_rows = self.prompt_samples * work.prompts * projected
        tokens_differ = index > 0 and has_prompts
        self.token_gradient = work.image_gradient or tokens_differ or self.in_block
        self.has_gradient = self.token_gradient or has_prompts

    def forward(self) -> Iterator[Operation]:
        """Yield the operations of the forward pass in order."""
        stream, width = self._bytes(self.rows), self.width
        yield self._make("norm 1 + matching" if self.work.keys else "norm 1", self._norm1())
        for name, rows, outputs in self._projections():
            yield self._make(name, self._linear(rows, width, outputs))
        yield self._make("attention", self._attention_forward())
        rows, hidden = self.work.batch * self.rows, MLP_RATIO * width
        projection = self._linear(rows, width, width)
        yield self._make("projection + residual", projection + Cost(0.0, stream))
        yield self._make("norm 2", Cost(0.0, 2 * stream))
        fc1, fc2 = self._linear(rows, width, hidden), self._linear(rows, hidden, width)
        yield self._make("fc1 + GELU", fc1 + Cost(0.0, MLP_RATIO * stream))
        yield self._make("fc2 + residual", fc2 + Cost(0.0, stream))

    def backward(self) -> Iterator[Operation]:
        """Yield the operations of the backward pass in order; none where nothing is trained."""
        if not self.has_gradient:
            return
        rows, hidden, width = self.work.batch * self.rows, MLP_RATIO * self.width, self.width
        stream = self._bytes(self.rows)
        yield from self._linear_backward("fc2", rows, hidden, width)
        yield self._make("GELU", Cost(0.0, MLP_RATIO * stream), "backward")
        yield from self._linear_backward("fc1", rows, width, hidden)
        yield self._make("norm 2 + residual", Cost(0.0, 4 * stream), "backward")
        yield from self._linear_backward("projection", rows, width, width)
        cost, repeated = self._attention_backward()
        yield self._make("attention", cost, "backward", repeated)
        for name, rows, outputs in self._projections():
            if self.token_gradient or self.joined or name.startswith("prompt"):
                yield from self._linear_backward(name, rows, width, outputs)
        name = "norm 1 + matching" if self.work.keys else "norm 1 + residual"
        if self.token_gradient or self.work.keys:
            yield self._make(name, self._norm1_backward(), "backward")

    def _projections(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, rows and outputs of the products that make queries, keys and values."""
        work, width = self.work, self.width
        if self.rows == self.tokens or self.joined:
            yield "qkv", work.batch * (self.tokens + work.prompts * self.joined), 3 * width
        else:
            yield "queries", work.batch * self.rows, width
            yield "keys, values", work.batch * self.tokens, 2 * width
        if self.prompt_rows:
            yield "prompt keys, values", self.prompt_rows, 2 * width

    def _norm1(self) -> Cost:
        """Rows are read and written once; the matching reads them again unless the norm is frozen.

        The official form normalises the prompts of every sample as well.
        """
        work = self.work
        again = self._bytes(self.tokens) if work.keys and not work.savings.frozen_backbone else 0.0
        moved = 2 * self._bytes(self.tokens + work.prompts * self.joined) + again
        return Cost(self._match_product(), moved + self._match_bytes())

    def _norm1_backward(self) -> Cost:
        """Rows, gradient of the normed rows and of the residual are read, one gradient written."""
        product, stream = self._match_product(), self._bytes(self.tokens)
        if not self.token_gradient:
            return Cost(product, stream + self._match_bytes())
        return Cost(2 * product, 4 * stream + self._match_bytes())

    def _match_product(self) -> float:
        work = self.work
        return 2.0 * work.batch * work.tokens * self.width * work.keys

    def _match_bytes(self) -> float:
        """Gate words and float32 keys."""
        work = self.work
        words = -(-work.prompts // 32) if work.keys else 0
        return 4.0 * (work.batch * work.tokens * words + work.keys * self.width)

    def _attention_sizes(self) -> AttentionSizes:
        work = self.work
        return AttentionSizes(
            batch=work.batch,
            heads=work.vit.heads,
            head_dim=work.vit.head_dim,
            item=work.item,
            queries=self.rows,
            tokens=self.tokens,
            prompts=self.prompt_keys,
            prompt_samples=self.prompt_samples,
            prompt_queries=work.prompts * (self.joined and self._dense),
            gated=work.keys > 0,
            token_gradient=self.token_gradient or self.joined,
        )

    @property
    def _dense(self) -> bool:
        return self.work.keys > 0 and not self.work.savings.gate_bits

    def _attention_forward(self) -> Cost:
        return (dense_forward if self._dense else fused_forward)(self._attention_sizes())

    def _attention_backward(self) -> tuple[Cost, float]:
        return (dense_backward if self._dense else fused_backward)(self._attention_sizes())

    def _linear(self, rows: int, inputs: int, outputs: int) -> Cost:
        return linear(rows, inputs, outputs, self.work.item)

    def _linear_backward(
        self, name: str, rows: int, inputs: int, outputs: int
    ) -> Iterator[Operation]:
        yield self._make(name, self._linear(rows, inputs, outputs), "backward")
        if not self.work.savings.frozen_backbone:
            cost = weight_gradient(rows, inputs, outputs, self.work.item)
            yield self._make(f"{name}, weights", cost, "backward")

    def _bytes(self, rows: int) -> float:
        """Bytes of `[B, rows, C]`."""
        return float(self.work.batch * rows * self.width * self.work.item)

    def _make(
        self, name: str, cost: Cost, direction: Direction = "forward", repeated: float = 0.0
    ) -> Operation:
        return Operation(name, self.index, direction, cost, repeated)
