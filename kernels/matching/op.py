"""Prompt matching as operations of torch: alone, `match_prompts`, and with LayerNorm, `norm_match`.

Every prefix token selects `cls_top_k` entries of the CLS pool, every patch `image_top_k` of the
image pool, by s = x . k / (|x| |k|); the distance is the mean of 1 - s over each pool's selections.
`norm_match` normalises the same rows in the same pass over device memory (tall tiles read them a
second time, which the cache should hold). There |x| comes from LayerNorm's own sums,
|x|^2 = sum (x - mean)^2 + C mean^2, which cannot cancel.

Axes: B batch, L tokens, R pool entries, C width, P prompt rows, W = ceil(P / 32) gate words.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backward import match_prompts_backward
from .forward import launch_forward
from .inputs import Matching, Norm, check_inputs, dense_rows, empty_outputs, make_matching


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


def _save_match(ctx, inputs, output):
    x, cls_keys, image_keys, given, numbers = inputs
    _, gate, *saved = output
    ctx.save_for_backward(x, gate if given is None else given, *saved)
    ctx.numbers, ctx.dtypes = numbers, (cls_keys.dtype, image_keys.dtype)
    ctx.mark_non_differentiable(gate, *saved)
    ctx.set_materialize_grads(False)


def _match_backward(ctx, ddistance, *_):
    need_dx, *need_keys = ctx.needs_input_grad[:3]
    if ddistance is None:
        return None, None, None, None, None
    x, *saved = ctx.saved_tensors
    dx, dkeys = match_prompts_backward(
        None, ddistance, x, None, *saved, ctx.numbers, need_dx, any(need_keys)
    )
    return dx if need_dx else None, *_split_dkeys(ctx, dkeys, need_keys), None, None


def _split_dkeys(ctx, dkeys: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Hand each pool its rows of the keys' gradient, in the dtype of its keys."""
    pool = Matching(*ctx.numbers).cls_pool
    parts = (dkeys[:pool], dkeys[pool:])
    return [
        part.to(dtype) if need else None
        for part, dtype, need in zip(parts, ctx.dtypes, needed, strict=True)
    ]


_match_prompts.register_autograd(_match_backward, setup_context=_save_match)


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


@torch.library.custom_op("tcpa::norm_match", mutates_args=())
def _norm_match(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cls_keys: Tensor,
    image_keys: Tensor,
    gate: Tensor | None,
    numbers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return normed rows, distance, gate (empty where one is given), and the backward's needs."""
    matching, norm = Matching(*numbers), Norm(weight, bias, eps)
    check_inputs(x, cls_keys, image_keys, gate, matching, norm)
    keys = dense_rows(cls_keys), dense_rows(image_keys)
    return tuple(launch_forward(dense_rows(x), *keys, gate, matching, norm))


@_norm_match.register_fake
def _(x, weight, bias, eps, cls_keys, image_keys, gate, numbers):
    return tuple(empty_outputs(x, Matching(*numbers), gate is not None, True))


def _save_norm(ctx, inputs, output):
    x, weight, _, _, cls_keys, image_keys, given, numbers = inputs
    _, _, gate, *saved = output
    ctx.save_for_backward(x, weight, gate if given is None else given, *saved)
    ctx.numbers, ctx.dtypes = numbers, (cls_keys.dtype, image_keys.dtype)
    ctx.mark_non_differentiable(gate, *saved)
    ctx.set_materialize_grads(False)


def _norm_backward(ctx, dnormed, ddistance, *_):
    need_dx, *_, need_cls, need_image = ctx.needs_input_grad[:6]
    need_keys = [need and ddistance is not None for need in (need_cls, need_image)]
    need_dx = need_dx and not (dnormed is None and ddistance is None)
    grads = [None] * 8
    if need_dx or any(need_keys):
        x, weight, *saved = ctx.saved_tensors
        dx, dkeys = match_prompts_backward(
            dnormed, ddistance, x, weight, *saved, ctx.numbers, need_dx, any(need_keys)
        )
        grads[0] = dx if need_dx else None
        grads[4:6] = _split_dkeys(ctx, dkeys, need_keys)
    return tuple(grads)


_norm_match.register_autograd(_norm_backward, setup_context=_save_norm)


def norm_match(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cls_keys: Tensor,
    image_keys: Tensor,
    *,
    gate: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every token and match it with the prompt pools.

    Args:
        x: `[B, L, C]` tokens, prefix tokens first; float16, bfloat16 or float32, C <= 4096.
        weight: `[C]` frozen scale of the LayerNorm; None is one.
        bias: `[C]` frozen shift of the LayerNorm; None is zero.
        eps: added to the variance.
        cls_keys, image_keys, cls_top_k, image_top_k, num_prefix_tokens, lengths, selection, gate:
            as in `match_prompts`, which matches x itself, before the norm.

    Returns:
        normed: `[B, L, C]` of the dtype of x, (x - mean) / sqrt(variance + eps) * weight + bias.
        gate, distance: as in `match_prompts`.

    Raises:
        AssertionError: an argument does not fit (`tcpa.norm_match` says more).
        RuntimeError: no kernel can run on the device of x.

    Numerics:
        Float32 inside, one rounding of the normed rows. Matching as in `match_prompts`.
        Deterministic; samples do not mix.

    Cost:
        One read of x and one write of the normed rows.
    """
    matching = make_matching(cls_keys, image_keys, **settings)
    # Asked here: within the operation gradients are off.
    trained = any(p is not None and p.requires_grad for p in (weight, bias))
    assert not (torch.is_grad_enabled() and trained), "weight, bias: expected frozen ones"
    normed, distance, made, *_ = _norm_match(
        x, weight, bias, eps, cls_keys, image_keys, gate, list(matching)
    )
    return normed, made if gate is None else gate, distance


__all__ = ["match_prompts", "norm_match"]
