"""Where tokens look: attention maps over the patches, and what goes to prompts.

Axes: N blocks, B images, H heads (1 where averaged), Q query tokens, S keys (tokens, then prompts).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..checks import require_int
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
