"""Token prompts of E2VPT and gated prompts.

Axes: N blocks, B batch, P prompt tokens of a block, H heads, D head dim, C width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import require
from ..prompts import drop_elements, init_tokens
from .token_config import E2VPTConfig, GatedPromptConfig

TEMPERATURES = (0.01, 10.0)
"""Range of the gated prompts' temperatures."""


class E2VPTPrompts(nn.Module):
    """Prompt tokens of every block, under masks, and prompts that are keys and values.

    Tokens start from VPT's U(-v, v), key-value prompts from a Kaiming-uniform distribution.

    Attributes:
        token_mask: `[P]`, 1 or 0: tokens that are left, the same in all blocks.
        segment_mask: `[P, segments]`, 1 or 0: parts of tokens that are left.
    """

    token_mask: Tensor
    segment_mask: Tensor

    def __init__(self, config: E2VPTConfig, backbone: Any) -> None:
        super().__init__()
        self.config = config
        self.patch_area = math.prod(backbone.patch_embed.patch_size)
        depth, width, attn = len(backbone.blocks), backbone.embed_dim, backbone.blocks[0].attn
        divides = width % config.segments == 0
        remedy = "change the number of segments"
        require(divides, "segments", config.segments, f"a divisor of the width {width}", remedy)
        self.prompts = nn.Parameter(torch.empty(depth, config.length, width))
        shape = (depth, attn.num_heads, config.kv_length, attn.head_dim)
        self.key_values = nn.Parameter(torch.empty(shape))
        self.register_buffer("token_mask", torch.ones(config.length))
        self.register_buffer("segment_mask", torch.ones(config.length, config.segments))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prompts anew; the masks stay."""
        init_tokens(self.prompts, self.patch_area)
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


class GatedPrompts(nn.Module):
    """Prompt tokens of the first block, a gate after every block but the last, a temperature for
    every block's attention."""

    def __init__(self, config: GatedPromptConfig, backbone: Any) -> None:
        super().__init__()
        self.config = config
        self.patch_area = math.prod(backbone.patch_embed.patch_size)
        depth = len(backbone.blocks)
        self.prompts = nn.Parameter(torch.empty(1, config.length, backbone.embed_dim))
        self.gates = nn.Parameter(torch.empty(depth - 1))
        self.temperatures = nn.Parameter(torch.empty(depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prompts from VPT's U(-v, v); gates nearly shut, temperatures 1."""
        init_tokens(self.prompts, self.patch_area)
        nn.init.constant_(self.gates, -self.config.gate_init)
        nn.init.ones_(self.temperatures)

    def forward(self, batch_size: int) -> Tensor:
        """Return the prompts of the first block, `[1, P, C]` or, per sample, `[1, B, P, C]`."""
        dropout, training = self.config.dropout, self.training
        return drop_elements(self.prompts, dropout, batch_size, training, shared=False)

    def query_scale(self, index: int) -> Tensor:
        """Return what a block's queries are multiplied by, a scalar: 1 / temperature."""
        return 1 / self.temperatures[index].clamp(*TEMPERATURES)

    def mix(self, index: int, before: Tensor, after: Tensor) -> Tensor:
        """Mix the prompts `[B, P, C]` before and after a block."""
        gate = torch.sigmoid(self.gates[index]).to(after.dtype)
        return gate * after + (1 - gate) * before
