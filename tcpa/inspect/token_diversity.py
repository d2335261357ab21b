"""How diverse attention and tokens are, per block: effective rank and entropy.

Axes: N blocks, B images, H heads, L tokens, S keys, C width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import require_tensor
from ..model import PromptedViT
from .passes import batches, evaluating


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
    bits: Callable[[Tensor], Tensor] = lambda nats: nats / np.log(2)  # noqa: E731
    exact = torch.promote_types(tokens.dtype, torch.float32)
    centred = tokens.to(exact) - tokens.to(exact).mean(1, keepdim=True)
    rank = effective_rank(centred)
    return torch.stack(
        (
            effective_rank(attention).mean(1),
            bits(_entropy(attention)).mean((1, 2)),
            rank,
            bits(rank.clamp_min(1).log()),
        )
    )
