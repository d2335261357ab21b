"""E2VPT: prompt tokens that can be pruned, and prompts that are keys and values.

Axes: N blocks, B batch, P prompt tokens of a block, H heads, D head dim, C width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..checks import require, require_int, require_number
from .base import Choices, Modules, PromptConfig
from .modules import PromptSource
from .vpt import drop_elements, init_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class E2VPTConfig(PromptConfig):
    """Prompt tokens in front of every block, and prompts that are keys and values (ICCV 2023).

    Tokens, and segments of tokens, can be pruned; see `E2VPTPrompts.prune`.
    """

    name: ClassVar[str] = "e2vpt"

    length: int = 5
    """Prompt tokens of a block (T)."""

    kv_length: int = 5
    """Key-value prompts of a block (t): `[H, D]` each, used as key and as value after the
    projection."""

    segments: int = 16
    """Equal parts of a token that pruning can zero; the width must be a multiple of it."""

    dropout: float = 0.1
    """Probability with which training zeroes an element of a token, per sample."""

    def __post_init__(self) -> None:
        for name in ("length", "kv_length", "segments"):
            require_int(name, getattr(self, name), 1)
        require_number("dropout", self.dropout, 0.0, 1.0)

    @property
    def num_prompts(self) -> int:
        """P, the prompt rows of one block: tokens and key-value prompts."""
        return self.length + self.kv_length

    def describe(self) -> str:
        return f"{self.length} a block, {self.kv_length} as keys and values"

    def resized(self, rows: int) -> Self:
        return self.replace(length=rows // 2, kv_length=rows // 2, dropout=0.0)

    def validate(self, backbone: Any, choices: Choices) -> None:
        width, remedy = backbone.embed_dim, "change the number of segments"
        divides = width % self.segments == 0
        require(divides, "segments", self.segments, f"a divisor of the width {width}", remedy)

    def build(self, backbone: Any, choices: Choices) -> Modules:
        return {"tokens": E2VPTPrompts(self, backbone)}


class E2VPTPrompts(PromptSource):
    """Prompt tokens of every block, under masks, and prompts that are keys and values.

    Tokens start from VPT's U(-v, v), key-value prompts from a Kaiming-uniform distribution.

    Attributes:
        token_mask: `[P]`, 1 or 0: tokens that are left, the same in all blocks.
        segment_mask: `[P, segments]`, 1 or 0: parts of tokens that are left.
    """

    prunes = True

    token_mask: Tensor
    segment_mask: Tensor

    def __init__(self, config: E2VPTConfig, backbone: Any) -> None:
        super().__init__()
        self.config = config
        depth, width, attn = len(backbone.blocks), backbone.embed_dim, backbone.blocks[0].attn
        self.prompts = nn.Parameter(torch.empty(depth, config.length, width))
        shape = (depth, attn.num_heads, config.kv_length, attn.head_dim)
        self.key_values = nn.Parameter(torch.empty(shape))
        self.register_buffer("token_mask", torch.ones(config.length))
        self.register_buffer("segment_mask", torch.ones(config.length, config.segments))
        init_tokens(self.prompts, backbone)
        with torch.no_grad():
            for block in self.key_values:
                nn.init.kaiming_uniform_(block)

    def _mask(self) -> Tensor:
        """Return what is left of the tokens of a block, `[P, C]`, 1 or 0."""
        segments = self.segment_mask * self.token_mask[:, None]
        return segments.repeat_interleave(self.prompts.shape[-1] // segments.shape[1], dim=1)

    @property
    def num_pruned(self) -> int:
        """Number of values of the prompts that pruning has taken out; 0 without values."""
        left = self._mask()
        return 0 if left.is_meta else len(self.prompts) * int((left == 0).sum())

    def forward(self, batch_size: int) -> Tensor:
        """Return the tokens of all blocks, `[N, P, C]` or, per sample, `[N, B, P, C]`."""
        mask = self._mask()
        dropout, training = self.config.dropout, self.training
        return drop_elements(self.prompts * mask, dropout, batch_size, training, shared=False)

    def extra_keys(self) -> Tensor:
        """Return the prompts that are keys and values, `[N, P, H, D]`."""
        return self.key_values.transpose(1, 2)

    @torch.no_grad()
    def prune(
        self, token_importance: Tensor, segment_importance: Tensor, tokens: float, segments: float
    ) -> None:
        """Zero the masks of the least important tokens, then of segments of the tokens left.

        Args:
            token_importance: `[P]`, the lowest go first.
            segment_importance: `[P, segments]`, likewise.
            tokens, segments: shares to remove, rounded to whole ones; one token and one segment of
                each token that is left are always kept.
        """
        count = min(round(tokens * len(self.token_mask)), len(self.token_mask) - 1)
        self.token_mask.fill_(1)
        self.token_mask[token_importance.argsort(stable=True)[:count]] = 0
        parts = self.segment_mask.shape[1]
        count = min(round(segments * parts), parts - 1)
        lowest = segment_importance.argsort(dim=1, stable=True)[:, :count]
        self.segment_mask.fill_(1).scatter_(1, lowest, 0.0)
