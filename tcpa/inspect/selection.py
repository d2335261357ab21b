"""Which prompts the tokens select: in order, per block, and in figures about whole pools.

Axes: N blocks, B images, L tokens of one role, R entries of their pool, K selected entries.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import require, require_choice
from ..methods.base import WITHOUT_SELECTION
from ..model import PromptedViT
from ..reference import Selection, cosine_similarity, rank_entries, split_gate
from .passes import Pool, batches, evaluating, patch_grid


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Selections:
    """What every token of some images selected."""

    image: np.ndarray
    """int16 `[N, B, L_patch, K]`, entries of the image pool, each patch's first choice first."""

    cls: np.ndarray
    """int16 `[N, B, L_prefix, K]`, entries of the CLS pool, in the same way."""

    num_pool: tuple[int, int]
    """R of the CLS pool and of the image pool."""

    grid: tuple[int, int]
    """Patches from top to bottom and from left to right."""

    def entries(self, pool: Pool) -> tuple[np.ndarray, int]:
        """Return the selected entries of a pool and its R."""
        require_choice("pool", pool, ("cls", "image"))
        return (self.cls, self.num_pool[0]) if pool == "cls" else (self.image, self.num_pool[1])

    def visible(self, pool: Pool = "image") -> np.ndarray:
        """Return bool `[N, B, L, R]`: token l sees entry r."""
        order, entries = self.entries(pool)
        found = np.zeros((*order.shape[:-1], entries), bool)
        np.put_along_axis(found, order.astype(np.int64), True, axis=-1)
        return found


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Usage:
    """How often the entries of a pool are selected, per block."""

    seen: np.ndarray
    """`[N, R]`, share of the tokens that see an entry; a row sums to K."""

    first: np.ndarray
    """`[N, R]`, share of the tokens whose first choice an entry is; a row sums to 1."""

    dead: np.ndarray
    """int64 `[N]`, entries that no token sees."""

    entropy: np.ndarray
    """`[N]`, bits, of an entry drawn from all selections; `log2(R)` if all are equally frequent."""

    first_entropy: np.ndarray
    """`[N]`, bits, of the first choices."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Overlap:
    """How alike the selections of two patches of an image are: Jaccard index, 0 to 1."""

    neighbours: np.ndarray
    """`[N]`, mean over patches that share a side."""

    pairs: np.ndarray
    """`[N]`, mean over all pairs of patches of an image."""

    chance: float
    """Expected value for two independent, uniform K-subsets of R entries."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Change:
    """How selections differ between two states of a model, for the same images."""

    replaced: np.ndarray
    """`[N]`, share of a token's selected entries that are others now."""

    first: np.ndarray
    """`[N]`, share of the tokens with another first choice."""


def selections(model: PromptedViT, images: Tensor, *, batch_size: int = 64) -> Selections:
    """Return what the tokens of images select, as evaluation does.

    Args:
        model: a TCPA model with `coordination="token"`.
        images: float `[B, channels, height, width]`, on any device.
        batch_size: images at once.

    Raises:
        TypeError: `model` is not one of ours.
        ValueError: the model selects nothing, or `images` do not fit.
    """
    with evaluating(model):
        reason = why_nothing_is_selected(model)
        require(reason is None, "model", reason, "TCPA with coordination='token'", "inspect that")
        parts = [_of_batch(model, part) for part in batches(model, images, batch_size)]
    config: Any = model.config
    cls, image = (np.concatenate([part[i] for part in parts], axis=1) for i in range(2))
    return Selections(
        image=image, cls=cls, num_pool=config.num_pool, grid=patch_grid(model, images)
    )


def why_nothing_is_selected(model: PromptedViT) -> str | None:
    """Say why a model's tokens do not select prompts; None when they do."""
    config = model.config
    return WITHOUT_SELECTION if config is None else config.why_nothing_is_selected()


def _of_batch(model: PromptedViT, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the ordered selections of a batch, of prefix tokens and of patches."""
    config: Any = model.config
    pools: Any = model.pools
    prefix = model.backbone.num_prefix_tokens
    top_k = (config.cls_top_k, config.image_top_k)
    with model.capture(attention=False, features=True) as record:
        model(images)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, block in record.items():
        gate, x = block.gate, block.inputs
        assert gate is not None and x is not None
        chosen = split_gate(gate, config.num_pool, config.lengths, prefix)
        keys = (pools.cls_keys[number], pools.image_keys[number])
        for role, tokens in enumerate((x[:, :prefix], x[:, prefix:])):
            ordered = _ordered(tokens, keys[role], chosen[role], config.selection)
            count = min(top_k[role], config.num_pool[role])
            found[role].append(ordered[..., :count].to(torch.int16).cpu())
    cls, image = (torch.stack(of_role).numpy() for of_role in found)
    return cls, image


def _ordered(x: Tensor, keys: Tensor, chosen: Tensor, selection: Selection) -> Tensor:
    """Put the entries that the gate holds first; the similarities only sort them."""
    exact = torch.promote_types(x.dtype, torch.float32)
    similarity = cosine_similarity(x.to(exact), keys.to(exact))
    last = float("-inf") if selection == "nearest" else float("inf")
    return rank_entries(similarity.masked_fill(~chosen, last), selection)


def usage(found: Selections, pool: Pool = "image") -> Usage:
    """Count how often the entries of a pool are selected."""
    order, entries = found.entries(pool)
    seen = found.visible(pool).mean(axis=(1, 2)) if entries else np.zeros((len(order), 0))
    first = np.zeros((len(order), entries))
    if order.shape[-1] and order.size:
        for row, of_block in zip(first, order[..., 0], strict=True):
            row += np.bincount(of_block.ravel(), minlength=entries) / of_block.size
    return Usage(
        seen=seen,
        first=first,
        dead=(seen == 0).sum(axis=1),
        entropy=entropy_bits(seen),
        first_entropy=entropy_bits(first),
    )


def entropy_bits(weights: np.ndarray) -> np.ndarray:
    """Return the entropy in bits of weights `[..., R]` >= 0, normalised to sum 1; 0 for none."""
    total = weights.sum(axis=-1, keepdims=True)
    shares = np.divide(weights, total, out=np.zeros(weights.shape), where=total > 0)
    logs = np.log2(shares, out=np.zeros(weights.shape), where=shares > 0)
    # Not -0.0, which a table would show.
    return np.abs((shares * logs).sum(axis=-1))


def overlap(found: Selections) -> Overlap:
    """Compare the selections of the patches of each image.

    Raises:
        ValueError: patches select nothing, or there is only one.
    """
    order, entries = found.entries("image")
    rows, columns = found.grid
    top_k, enough = order.shape[-1], rows * columns > 1
    got = f"{top_k} selected entries of {rows * columns} patches"
    require(top_k > 0 and enough, "found", got, "at least 1 of 2", "inspect another model")
    visible = found.visible("image").astype(np.float32)
    grid = visible.reshape(*visible.shape[:2], rows, columns, entries)
    pairs = ((grid[:, :, 1:], grid[:, :, :-1]), (grid[:, :, :, 1:], grid[:, :, :, :-1]))
    common = [(a * b).sum(-1).reshape(len(order), -1) for a, b in pairs]
    neighbours = _jaccard(np.concatenate(common, axis=1), top_k).mean(axis=1)
    count = rows * columns
    every = []
    for of_block in visible:
        alike = _jaccard(of_block @ of_block.swapaxes(-1, -2), top_k).mean(axis=0).sum()
        # Every patch is like itself.
        every.append((alike - count) / (count * (count - 1)))
    chance = expected_jaccard(entries, top_k)
    return Overlap(neighbours=neighbours, pairs=np.array(every), chance=chance)


def _jaccard(common: np.ndarray, top_k: int) -> np.ndarray:
    return common / (2 * top_k - common)


def expected_jaccard(entries: int, top_k: int) -> float:
    """Return the mean Jaccard index of two independent, uniform `top_k`-subsets of `entries`."""
    ways = math.comb(entries, top_k)
    return sum(
        math.comb(top_k, common) * math.comb(entries - top_k, top_k - common) / ways
        * common / (2 * top_k - common)
        for common in range(1, top_k + 1)
    )  # fmt: skip


def change(before: Selections, after: Selections, pool: Pool = "image") -> Change:
    """Compare the selections of two states of a model on the same images.

    Raises:
        ValueError: they are of different models or images, or the pool has no selections.
    """
    order, _ = after.entries(pool)
    same = order.shape == before.entries(pool)[0].shape and before.num_pool == after.num_pool
    got, wanted = f"shape {before.entries(pool)[0].shape}", f"{order.shape} as after"
    require(same, "before", got, wanted, "inspect the same images with both")
    require(order.size > 0, "after", "no selections", f"some of the {pool} pool", "take another")
    kept = (before.visible(pool) & after.visible(pool)).sum(-1) / order.shape[-1]
    others = before.entries(pool)[0][..., 0] != order[..., 0]
    return Change(replaced=1 - kept.mean(axis=(1, 2)), first=others.mean(axis=(1, 2)))
