"""LayerNorm and prompt matching of the same rows, fused in one pass over device memory.

Tall tiles read their rows a second time, which the cache should hold (see `match_tiles`).

|x| comes from LayerNorm's own sums, |x|^2 = sum (x - mean)^2 + C mean^2, which cannot cancel.

Axes: B batch, L tokens, R pool entries, C width, P prompt rows, W = ceil(P / 32) gate words.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .match_backward import match_prompts_backward
from .match_forward import launch_forward
from .match_prompts import split_dkeys
from .matching import Matching, Norm, check_inputs, dense_rows, empty_outputs, make_matching


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


def _save(ctx, inputs, output):
    x, weight, _, _, cls_keys, image_keys, given, numbers = inputs
    _, _, gate, *saved = output
    ctx.save_for_backward(x, weight, gate if given is None else given, *saved)
    ctx.numbers, ctx.dtypes = numbers, (cls_keys.dtype, image_keys.dtype)
    ctx.mark_non_differentiable(gate, *saved)
    ctx.set_materialize_grads(False)


def _backward(ctx, dnormed, ddistance, *_):
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
        grads[4:6] = split_dkeys(ctx, dkeys, need_keys)
    return tuple(grads)


_norm_match.register_autograd(_backward, setup_context=_save)


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
    normed, distance, made, *_ = _norm_match(
        x, weight, bias, eps, cls_keys, image_keys, gate, list(matching)
    )
    return normed, made if gate is None else gate, distance


__all__ = ["norm_match"]
