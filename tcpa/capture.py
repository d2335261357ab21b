"""Recording of one forward pass: gates, attention probabilities and tokens of the blocks.

A recorder reads what a pass computes and puts nothing into it: the logits are bit-equal with and
without. `PromptedViT.capture` starts one.

Axes: B batch, H heads, L tokens, Q recorded query tokens, P prompt rows, S = L + P keys, D head
dim, C width, W gate words.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .checks import require, require_bool, require_int
from .dispatch import autocast_dtype, without_autocast
from .reference import NormalizeOver, unpack_bits


@dataclass(slots=True)
class BlockRecord:
    """What one block did in the recorded pass; tensors without gradients, on the model's device."""

    gate: Tensor | None = None
    """int32 `[B, L, W]`; None where every token sees every prompt. `tcpa.unpack_gate` reads it."""

    attention: Tensor | None = None
    """`[B, H, Q, S]`, float32 (float64 of a float64 model): the weights of tokens, then prompts,
    in the sum over values. With `normalize_over="all"` a row whose token does not see every prompt
    sums to less than 1."""

    queries: Tensor | None = None
    """int64 `[Q]`, the tokens whose rows `attention` has."""

    inputs: Tensor | None = None
    """`[B, L, C]`, the residual stream before the block, which the matching reads."""

    outputs: Tensor | None = None
    """`[B, L, C]` (fewer tokens after a last block that computes no more), after the block."""


_compilations: list[bool] = []
"""Not empty: a compiler has traced a pass that was to be recorded."""


@torch.compiler.assume_constant_result
def _note_compilation() -> bool:
    """Note it while tracing; a traced assignment would be carried out by the compiled code only."""
    _compilations.append(True)
    return True


class Capture(Mapping[int, BlockRecord]):
    """Records of the latest forward pass, by the number of the block from 0.

    Attributes:
        num_tokens: L; prompts have the columns from there on.
    """

    def __init__(
        self,
        depth: int,
        *,
        blocks: Sequence[int] | None,
        queries: Sequence[int] | None,
        attention: bool,
        features: bool,
    ) -> None:
        require_bool("attention", attention)
        require_bool("features", features)
        self._blocks = _numbers("blocks", blocks, -depth, depth - 1)
        self._queries = _numbers("queries", queries, 0, None)
        if self._blocks is None:
            self._blocks = tuple(range(depth))
        self._blocks = tuple(sorted({number % depth for number in self._blocks}))
        _compilations.clear()
        self._attention, self._features = attention, features
        self._records: dict[int, BlockRecord] = {}
        self.num_tokens = 0

    def __getitem__(self, block: int) -> BlockRecord:
        return self._records[block]

    def __iter__(self) -> Iterator[int]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def begin(self, num_tokens: int) -> None:
        """Forget the last pass, at the start of the next.

        Raises:
            ValueError: there is no such query.
            RuntimeError: the pass is compiled.
        """
        if torch.compiler.is_compiling():
            _note_compilation()
            raise RuntimeError(COMPILED)
        if _compilations:
            # A compiler that met the error above runs the pass itself, in pieces.
            _compilations.clear()
            raise RuntimeError(COMPILED)
        for query in self._queries or ():
            require_int("queries", query, 0, num_tokens - 1)
        self.num_tokens = num_tokens
        self._records = {number: BlockRecord() for number in cast(tuple, self._blocks)}

    def recorder(self, block: int, patches: slice) -> "Recorder | None":
        """Return what records the attention of a block; None if it is not to be recorded."""
        found = self._records.get(block)
        if found is None:
            return None
        return Recorder(found, patches.stop, self._queries, self._attention)

    def tokens(self, block: int, before: Tensor, after: Tensor) -> None:
        """Record the residual stream around a block, where that was asked for."""
        found = self._records.get(block)
        if found is not None and self._features:
            # Nothing in the model writes into the stream: views are enough.
            found.inputs = before.detach()[:, : self.num_tokens]
            found.outputs = after.detach()[:, : self.num_tokens]


@contextmanager
def capture(
    model: Any,
    *,
    blocks: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
    attention: bool = True,
    features: bool = False,
) -> Iterator[Capture]:
    """Record what the blocks of a model do, without changing the result.

    with model.capture() as record: model(images) leaves in `record[block]` the gate and the
    attention probabilities of that pass, computed from its own queries, keys and gate, prompts
    included. A further pass replaces them.

    Args:
        blocks: which blocks, negative ones from the end; all by default.
        queries: for which tokens; by default for all that a block computes. `model(images)`
            computes in the last block only the tokens that the head reads,
            `model.forward_features(images)` all of them.
        attention: record probabilities, `[B, H, Q, L + P]` per block; False for the gates only.
        features: record the tokens before and after each block too.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: another capture of this model is open, or the pass is compiled.
    """
    if model.recording is not None:
        raise RuntimeError(
            "capture: got a second one while the first is open, expected one at a time; leave "
            "the first `with` block, or read its record"
        )
    depth = len(model.backbone.blocks)
    model.recording = record = Capture(
        depth, blocks=blocks, queries=queries, attention=attention, features=features
    )
    try:
        yield record
    finally:
        model.recording = None


COMPILED = (
    "capture: got a compiled pass, expected an ordinary one: compiled code stores no probabilities "
    "to read; call the model itself in place of torch.compile(model), or model.forward(images) "
    "after model.compile()"
)


def _numbers(
    name: str, values: Sequence[int] | None, low: int, high: int | None
) -> tuple[int, ...] | None:
    """Check a list of numbers, sorted and without repeats; None stands for all."""
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Sequence):
        got = type(values).__name__
        raise TypeError(f"{name}: got {got}, expected a list of integers; pass [{values!r}]")
    for value in values:
        require_int(name, value, low, high)
    require(len(values) > 0, name, "an empty list", "at least one", "leave it out for all")
    return tuple(sorted(set(values)))


@dataclass(frozen=True, slots=True)
class Recorder:
    """Writes the gate and the attention of one block into its record."""

    record: BlockRecord
    num_tokens: int
    queries: tuple[int, ...] | None
    with_attention: bool

    def gate(self, gate: Tensor | None, batch_size: int) -> None:
        """Record the gate `[B or 1, L, W]` of all tokens."""
        if gate is not None:
            self.record.gate = gate.detach().expand(batch_size, -1, -1)

    @torch.no_grad()
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        k_prompt: Tensor,
        gate: Tensor | None,
        *,
        scale: float,
        normalize_over: NormalizeOver,
    ) -> None:
        """Record the probabilities from what `gated_attention` is about to read.

        Args:
            q: `[B, Lq, H, D]`; queries beyond the tokens (prompts of plain VPT) are left out.
            k: `[B, L, H, D]`, or with such prompts at its end.
            k_prompt: `[P, H, D]` or `[B, P, H, D]`.
            gate: int32 `[B or 1, Lq, W]` or None.
            scale, normalize_over: as in `gated_attention`.
        """
        if not self.with_attention:
            return
        present = min(q.shape[1], self.num_tokens)
        wanted = range(present) if self.queries is None else self.queries
        rows = torch.tensor([row for row in wanted if row < present], device=q.device)
        rows = rows.long()
        self.record.queries = rows
        # The precision that the operation reads, then no further rounding.
        dtype = autocast_dtype(q.device) or q.dtype
        exact = torch.promote_types(dtype, torch.float32)
        q, k, k_prompt = (t.to(dtype).to(exact) for t in (q[:, rows], k, k_prompt))
        with without_autocast(q.device):
            shared = k_prompt.expand(len(k), *k_prompt.shape[-3:])
            # [B, Q, H, D] x [B, S, H, D] -> [B, H, Q, S]
            keys = torch.cat((k, shared), dim=1).transpose(1, 2)
            scores_BHQS = q.transpose(1, 2) @ keys.mT * scale
            if gate is None:
                self.record.attention = scores_BHQS.softmax(-1)
                return
            hidden = ~unpack_bits(gate[:, rows], k_prompt.shape[-3])[:, None]
            prompts = slice(k.shape[1], None)
            if normalize_over == "visible":
                scores_BHQS[..., prompts].masked_fill_(hidden, float("-inf"))
            probs_BHQS = scores_BHQS.softmax(-1)
            probs_BHQS[..., prompts].masked_fill_(hidden, 0.0)
            self.record.attention = probs_BHQS
