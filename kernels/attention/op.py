"""Gated attention as operations of torch: forward, backward, and what compilers need to know."""

import torch
from torch import Tensor

from .backward import launch_backward
from .forward import launch_forward
from .inputs import AttentionInputs, check_inputs


@torch.library.custom_op("tcpa::gated_attention", mutates_args=())
def _gated_attention_op(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor, gate: Tensor | None,
    scale: float, visible: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_inputs(q, k, v, k_prompt, v_prompt, gate)
    return launch_forward(AttentionInputs.of(q, k, v, k_prompt, v_prompt, gate, scale, visible))


@_gated_attention_op.register_fake
def _(q, k, v, k_prompt, v_prompt, gate, scale, visible):
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    return o, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("tcpa::gated_attention_backward", mutates_args=())
def _gated_attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor,
    gate: Tensor | None, o: Tensor, lse: Tensor, scale: float, visible: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv, dk_prompt, dv_prompt; an empty tensor for each that is not needed."""
    inputs = AttentionInputs.of(q, k, v, k_prompt, v_prompt, gate, scale, visible)
    return launch_backward(inputs, do, o, lse, needs)


@_gated_attention_backward_op.register_fake
def _(do, q, k, v, k_prompt, v_prompt, gate, o, lse, scale, visible, needs):
    tensors = zip((q, k, v, k_prompt, v_prompt), needs, strict=True)
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in tensors)


def _setup_context(ctx, inputs, output):
    *tensors, scale, visible = inputs
    o, lse = output
    ctx.save_for_backward(*tensors, o, lse)
    ctx.scale, ctx.visible = scale, visible
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, _):
    if do is None:
        return (None,) * 8
    *inputs, o, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    grads = _gated_attention_backward_op(do, *inputs, o, lse, ctx.scale, ctx.visible, needs)
    used = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*used, None, None, None)


_gated_attention_op.register_autograd(_backward, setup_context=_setup_context)


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prompt: Tensor,
    v_prompt: Tensor,
    gate: Tensor | None,
    *,
    scale: float | None = None,
    normalize_over: str = "all",
) -> Tensor:
    """Attend to all tokens and to the prompts whose gate bit is set, in one kernel.

    Args:
        q: `[B, Lq, H, D]` float16, bfloat16 or float32 queries, D from 16 to 128.
        k, v: `[B, L, H, D]` keys and values of the tokens, read in place: only the last axis must
            be dense.
        k_prompt, v_prompt: `[P, H, D]` shared by the batch or `[B, P, H, D]`, P from 0 to 256.
        gate: int32 `[B, Lq, W]` or `[1, Lq, W]`, W = ceil(P / 32); None shows every prompt.
        scale: factor of the scores; 1 / sqrt(D) when absent.
        normalize_over: "all" keys, or "visible" keys only.

    Returns:
        Contiguous `[B, Lq, H, D]` of q's dtype.

    Raises:
        AssertionError: an argument does not fit (`tcpa.gated_attention` says more).
        RuntimeError: no kernel can be launched on this device.

    Numerics:
        Products in q's dtype with float32 accumulation (float32 inputs: no TF32), softmax in
        float32. Samples do not mix, except in the gradients of shared prompts. Deterministic.

    Cost:
        4 * B * H * Lq * S * D multiply-adds; nothing of size Lq * S reaches memory.
    """
    assert normalize_over in ("all", "visible"), normalize_over
    assert scale is None or 0 <= scale < float("inf"), scale
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = (q, k, v, k_prompt, v_prompt, gate)
    return torch.ops.tcpa.gated_attention(*tensors, scale, normalize_over == "visible")[0]


__all__ = ["gated_attention"]
