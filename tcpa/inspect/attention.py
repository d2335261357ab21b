"""Where tokens look, and how diverse attention and tokens are: effective rank and entropy.

Axes: N blocks, B images, H heads (1 where averaged), L tokens, Q query tokens, S keys (tokens, then
prompts), C width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..checks import require_int, require_tensor
from ..model import PromptedViT
from .passes import batches, evaluating, patch_grid


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class AttentionMaps:
    """Weights with which tokens read the others, the gate included."""

    weights: np.ndarray
    """float32 `[N, B, H, Q, S]`."""

    blocks: tuple[int, ...]
    queries: tuple[int, ...]
    """Sorted."""

    num_prefix_tokens: int
    grid: tuple[int, int]
    """Patches from top to bottom and from left to right."""

    @property
    def num_tokens(self) -> int:
        """L, prefix tokens and patches."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    def patches(self) -> np.ndarray:
        """Return the weights of the patches where they lie, `[N, B, H, Q, rows, columns]`."""
        flat = self.weights[..., self.num_prefix_tokens : self.num_tokens]
        return flat.reshape(*flat.shape[:-1], *self.grid)

    def shares(self) -> np.ndarray:
        """Return the sums over prefix tokens, patches and prompts, `[N, B, H, Q, 3]`.

        They sum to 1 where a token sees every prompt, and to less where hidden prompts keep their
        share of the softmax (`normalize_over="all"`).
        """
        ends = (0, self.num_prefix_tokens, self.num_tokens, self.weights.shape[-1])
        parts = [self.weights[..., a:b].sum(-1) for a, b in pairwise(ends)]
        return np.stack(parts, axis=-1)


def attention_maps(
    model: PromptedViT,
    images: Tensor,
    *,
    blocks: Sequence[int] | None = None,
    queries: Sequence[int] = (0,),
    head: int | None = None,
    batch_size: int = 16,
) -> AttentionMaps:
    """Return where some tokens look, as the model computes it in evaluation.

    Args:
        model: any model of ours.
        images: float `[B, channels, height, width]`, on any device.
        blocks: which blocks; all by default.
        queries: token numbers; 0 is the class token where there is one. `patch_token` gives those
            of patches.
        head: one head; by default the mean over all heads.
        batch_size: images at once.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    if head is not None:
        require_int("head", head, 0, model.backbone.blocks[0].attn.num_heads - 1)
    parts: list[Tensor] = []
    with evaluating(model), model.capture(blocks=blocks, queries=queries) as record:
        for batch in batches(model, images, batch_size):
            # Unlike model(...), all tokens of the last block too.
            model.forward_features(batch)
            found = [block.attention for block in record.values()]
            kept = [
                a.mean(1, keepdim=True) if head is None else a[:, head : head + 1]
                for a in found
                if a is not None
            ]
            # Prompts may be fewer in some blocks.
            width = max(a.shape[-1] for a in kept)
            padded = [torch.nn.functional.pad(a, (0, width - a.shape[-1])) for a in kept]
            parts.append(torch.stack(padded).float().cpu())
        numbers = tuple(record)
    return AttentionMaps(
        weights=torch.cat(parts, dim=1).numpy(),
        blocks=numbers,
        queries=tuple(sorted(set(queries))),
        num_prefix_tokens=model.backbone.num_prefix_tokens,
        grid=patch_grid(model, images),
    )


def patch_token(model: PromptedViT, images: Tensor, row: int, column: int) -> int:
    """Return the token number of a patch.

    Args:
        model: any model of ours.
        images: float `[B, channels, height, width]`; only the size matters.
        row, column: of the patch, from 0 at the top left.

    Raises:
        TypeError, ValueError: there is no such patch.
    """
    rows, columns = patch_grid(model, images)
    require_int("row", row, 0, rows - 1)
    require_int("column", column, 0, columns - 1)
    return model.backbone.num_prefix_tokens + row * columns + column


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Diversity:
    """Figures of each block and image, float64 `[N, B]`."""

    attention_rank: np.ndarray
    """Effective rank of the attention matrix `[L, S]`, mean over the heads."""

    attention_entropy: np.ndarray
    """Bits, of a row of the attention matrix; rows are normalised to sum 1, then averaged over
    tokens and heads."""

    feature_rank: np.ndarray
    """Effective rank of the tokens after the block, `[L, C]`, minus their mean."""

    feature_entropy: np.ndarray
    """Bits, of the normalised singular values of the same matrix: the rank's logarithm."""


def effective_rank(matrix: Tensor) -> Tensor:
    """Return exp(H), H the entropy of the singular values divided by their sum.

    1 for a matrix of rank 1, min(n, m) if all singular values are equal, 0 for a zero matrix.

    Args:
        matrix: float `[..., n, m]`.

    Returns:
        float32 (float64 for float64) `[...]`.

    Source:
        Roy and Vetterli, "The effective rank" (EUSIPCO 2007).
    """
    require_tensor("matrix", matrix, "[..., n, m]", *range(2, 9))
    exact = torch.promote_types(matrix.dtype, torch.float32)
    values = torch.linalg.svdvals(matrix.to(exact))
    rank = _entropy(values).exp()
    return torch.where(values.sum(-1) > 0, rank, 0.0)


def _entropy(weights: Tensor) -> Tensor:
    """Return the entropy in nats of weights `[..., n]` >= 0, normalised to sum 1."""
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return -torch.special.xlogy(shares, shares).sum(-1)


def diversity(model: PromptedViT, images: Tensor, *, batch_size: int = 8) -> Diversity:
    """Measure attention and tokens of every block, for every image, as evaluation computes them.

    Attention is that of all tokens over tokens and prompts, the gate included.

    Args:
        model: any model of ours.
        images: float `[B, channels, height, width]`, on any device.
        batch_size: images at once; a block's attention of all of them is kept.

    Cost:
        One singular value decomposition `[L, S]` per head, block and image.

    Source:
        Section 4 of the paper argues with the rank of the attention (Theorems 4.1 and 4.2).
    """
    parts: list[Tensor] = []
    with evaluating(model):
        for batch in batches(model, images, batch_size):
            with model.capture(features=True) as record:
                model.forward_features(batch)
            figures = []
            for block in record.values():
                assert block.attention is not None and block.outputs is not None
                figures.append(_of_block(block.attention, block.outputs))
            parts.append(torch.stack(figures, dim=1).double().cpu())
    names = tuple(Diversity.__slots__)
    return Diversity(**dict(zip(names, torch.cat(parts, dim=2).numpy(), strict=True)))


def _of_block(attention: Tensor, tokens: Tensor) -> Tensor:
    """Return the four figures of a block, `[4, B]`."""
    exact = torch.promote_types(tokens.dtype, torch.float32)
    centred = tokens.to(exact) - tokens.to(exact).mean(1, keepdim=True)
    rank = effective_rank(centred)
    return torch.stack(
        (
            effective_rank(attention).mean(1),
            (_entropy(attention) / math.log(2)).mean((1, 2)),
            rank,
            rank.clamp_min(1).log() / math.log(2),
        )
    )
