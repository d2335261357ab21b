"""Prompt matching: cosine similarity, exact top-k selection, gate words, distance in one pass.

Every prefix token selects `cls_top_k` entries of the CLS pool, every patch `image_top_k` of the
image pool, by s = x . k / (|x| |k|); the distance is the mean of 1 - s over each pool's selections.

Axes: B batch, L tokens, R pool entries, C width, P prompt rows, W = ceil(P / 32) gate words.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .match_backward import match_prompts_backward
from .match_forward import launch_forward
from .matching import Matching, check_inputs, dense_rows, empty_outputs, make_matching


@torch.library.custom_op("tcpa::match_prompts", mutates_args=())
def _match_prompts(
    x: Tensor, cls_keys: Tensor, image_keys: Tensor, gate: Tensor | None, numbers: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return distance, gate (empty where one is given), and what the backward needs."""
    matching = Matching(*numbers)
    check_inputs(x, cls_keys, image_keys, gate, matching)
    keys = dense_rows(cls_keys), dense_rows(image_keys)
    return launch_forward(dense_rows(x), *keys, gate, matching, None)[1:]


@_match_prompts.register_fake
def _(x, cls_keys, image_keys, gate, numbers):
    return empty_outputs(x, Matching(*numbers), gate is not None, False)[1:]


def _save(ctx, inputs, output):
    x, cls_keys, image_keys, given, numbers = inputs
    _, gate, *saved = output
    ctx.save_for_backward(x, gate if given is None else given, *saved)
    ctx.numbers, ctx.dtypes = numbers, (cls_keys.dtype, image_keys.dtype)
    ctx.mark_non_differentiable(gate, *saved)
    ctx.set_materialize_grads(False)


def _backward(ctx, ddistance, *_):
    need_dx, *need_keys = ctx.needs_input_grad[:3]
    if ddistance is None:
        return None, None, None, None, None
    x, *saved = ctx.saved_tensors
    dx, dkeys = match_prompts_backward(
        None, ddistance, x, None, *saved, ctx.numbers, need_dx, any(need_keys)
    )
    return dx if need_dx else None, *split_dkeys(ctx, dkeys, need_keys), None, None


def split_dkeys(ctx, dkeys: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Hand each pool its rows of the keys' gradient, in the dtype of its keys."""
    pool = Matching(*ctx.numbers).cls_pool
    parts = (dkeys[:pool], dkeys[pool:])
    return [
        part.to(dtype) if need else None
        for part, dtype, need in zip(parts, ctx.dtypes, needed, strict=True)
    ]


_match_prompts.register_autograd(_backward, setup_context=_save)


def match_prompts(
    x: Tensor,
    cls_keys: Tensor,
    image_keys: Tensor,
    *,
    gate: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Select prompts for every token by cosine similarity and measure the match distance.

    Args:
        x: `[B, L, C]` tokens, prefix tokens first; float16, bfloat16 or float32, C <= 4096.
        cls_keys: `[R_cls, C]` keys of the CLS pool, at most 64, any of these dtypes.
        image_keys: `[R_image, C]` keys of the image pool, likewise.
        cls_top_k: entries that a prefix token sees, 0 to R_cls.
        image_top_k: entries that a patch sees, 0 to R_image.
        num_prefix_tokens: how many leading tokens select from the CLS pool, 0 to L.
        lengths: prompt rows per entry of the CLS pool and of the image pool.
        selection: "nearest" or "farthest".
        gate: int32 `[B, L, W]`, a selection to measure in place of the nearest one.

    Returns:
        gate: int32 `[B, L, W]`, the given one where there is one.
        distance: float32 scalar, differentiable with respect to x and the keys.

    Raises:
        AssertionError: an argument does not fit (`tcpa.match_prompts` says more).
        RuntimeError: no kernel can run on the device of x.

    Numerics:
        Similarities in float32 (error at most (C / 8 + 40) 2 ** -24), ties to the lower index, NaN
        counts as most similar. Deterministic; samples do not mix.

    Cost:
        4 B L C R FLOPs on tensor cores (8 for float32 x), one read of x.
    """
    matching = make_matching(cls_keys, image_keys, **settings)
    distance, made, *_ = _match_prompts(x, cls_keys, image_keys, gate, list(matching))
    return made if gate is None else gate, distance


__all__ = ["match_prompts", "split_dkeys"]
