"""Gated attention over PyTorch's fused attention: no score matrix of the tokens is ever stored.

Where every query sees every prompt this is `scaled_dot_product_attention` over the concatenated
keys. On the CPU a gated softmax is split in two and merged by its statistics, exactly. With the
log-sum-exp of the tokens' scores a, of the prompts' scores b, and c = log(exp a + exp b):

    o = exp(a - c) o_tokens + sum_r exp(s_r - c) g_r v_r.

The backward pass of the fused kernel, given the merged `o` and `c` in place of its own, returns the
token gradients of the joint softmax: it uses them only as P = exp(s - c) and delta = rowsum(do *
    o).

Axes: B batch, H heads, L tokens, P prompt rows, D head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import NormalizeOver, unpack_bits

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unavailable_reason(device: torch.device) -> str | None:
    """Say why a gated softmax cannot be merged on `device`; None when it can."""
    return None if device.type == "cpu" else f"tensors are on {device.type!r}, not on the CPU"


def gated_attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prompt: Tensor,
    v_prompt: Tensor,
    gate: Tensor | None,
    *,
    scale: float | None = None,
    normalize_over: NormalizeOver = "all",
) -> Tensor:
    """Compute `gated_attention`; takes the same arguments and trusts them."""
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if gate is None or k_prompt.shape[-3] == 0:
        return _ungated(q, k, v, k_prompt, v_prompt, factor)
    visible, hidden = unpack_bits(gate, k_prompt.shape[-3])[:, None], None
    if normalize_over == "visible":
        visible, hidden = None, ~visible
    # [B, L, H, D] -> [B, H, L, D]; shared prompts [P, H, D] -> [H, P, D].
    tokens = (t.transpose(1, 2) for t in (q, k, v))
    prompts = (t.transpose(-3, -2) for t in (k_prompt, v_prompt))
    out = _GatedAttention.apply(*tokens, *prompts, visible, hidden, factor)
    return out.transpose(1, 2)


def _ungated(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor, scale: float
) -> Tensor:
    """Attend to tokens and all prompts."""
    if k_prompt.shape[-3] > 0:
        shape = (len(q), *k_prompt.shape[-3:])
        k = torch.cat((k, k_prompt.expand(shape)), dim=1)
        v = torch.cat((v, v_prompt.expand(shape)), dim=1)
    q, k, v = (_with_dense_rows(t).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


class _GatedAttention(torch.autograd.Function):
    """`visible` zeroes prompts after the softmax, `hidden` removes them before it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_prompt: Tensor,
        v_prompt: Tensor,
        visible: Tensor | None,
        hidden: Tensor | None,
        scale: float,
    ) -> Tensor:
        q, k, v = _with_dense_rows(q), _with_dense_rows(k), _with_dense_rows(v)
        token_out, token_lse = _forward(q, k, v, 0.0, False, scale=scale)
        scores = _prompt_scores(q, k_prompt, hidden, scale)
        lse = torch.logaddexp(token_lse, scores.logsumexp(-1).to(token_lse.dtype))
        probs = _gated(torch.exp(scores - lse[..., None]), visible)
        share = torch.exp(token_lse - lse)[..., None]
        out = torch.addcmul(probs.to(v.dtype) @ v_prompt, token_out, share.to(v.dtype))
        ctx.save_for_backward(q, k, v, k_prompt, v_prompt, visible, hidden, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = _with_dense_rows(grads[0])
        q, k, v, k_prompt, v_prompt, visible, hidden, out, lse = ctx.saved_tensors
        needs_q, needs_k, needs_v, needs_k_prompt, needs_v_prompt, *_ = ctx.needs_input_grad
        dq = dk = dv = dk_prompt = dv_prompt = None
        if needs_q or needs_k or needs_v:
            dq, dk, dv = _backward(grad, q, k, v, out, lse, 0.0, False, scale=ctx.scale)
        probs = torch.exp(_prompt_scores(q, k_prompt, hidden, ctx.scale) - lse[..., None])
        if needs_v_prompt:
            dv_prompt = _reduce(_gated(probs, visible).to(grad.dtype).mT @ grad, v_prompt)
        if needs_q or needs_k_prompt:
            delta = (grad * out).sum(-1, keepdim=True, dtype=probs.dtype)
            dscores = probs * (_gated((grad @ v_prompt.mT).to(probs.dtype), visible) - delta)
            dscores = (dscores * ctx.scale).to(grad.dtype)
            if needs_q:
                dq = dq + dscores @ k_prompt
            if needs_k_prompt:
                dk_prompt = _reduce(dscores.mT @ q, k_prompt)
        return dq, dk, dv, dk_prompt, dv_prompt, None, None, None


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """Make the last dimension contiguous, which the fused kernel takes for granted."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _prompt_scores(q: Tensor, k_prompt: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """Return `[B, H, L, P]` in float32 or better."""
    scores = (q @ k_prompt.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    return scores if hidden is None else scores.masked_fill(hidden, float("-inf"))


def _gated(values: Tensor, visible: Tensor | None) -> Tensor:
    return values if visible is None else values.masked_fill(~visible, 0.0)


def _reduce(grad: Tensor, like: Tensor) -> Tensor:
    """Sum per-sample gradients of prompts that the batch shares."""
    return grad if like.ndim == 4 else grad.sum(0)
