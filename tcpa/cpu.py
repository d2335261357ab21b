"""Gated attention on the CPU, exact: over PyTorch's fused attention, or with stored probabilities.

`gated_attention_sdpa` never stores a score matrix of the tokens. Where every query sees every
prompt it is `scaled_dot_product_attention` over the concatenated keys, on any device. Else a gated
softmax is split in two and merged by its statistics. With the log-sum-exp of the tokens' scores a,
of the prompts' scores b, and c = log(exp a + exp b):

    o = exp(a - c) o_tokens + sum_r exp(s_r - c) g_r v_r.

The backward pass of the fused kernel, given the merged `o` and `c` in place of its own, returns the
token gradients of the joint softmax: it uses them only as P = exp(s - c) and delta = rowsum(do *
    o).

`gated_attention_dense` stores one matrix of probabilities `[B, H, Lq, S]`, S = L + P: in half
precision batched products are so much faster than the fused attention that it pays up to some
hundred tokens (`dispatch`). Against the reference it saves the scores, a second matrix of
probabilities and the prompts' own columns.

    P = softmax(q K^T scale),  o = (g P) V
    dP = g (do V^T),  dS = P (dP - rowsum(do * o)) scale

Axes: B batch, L tokens, P prompt rows, S keys, H heads, D head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import NormalizeOver, unpack_bits

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def sdpa_unavailable_reason(device: torch.device) -> str | None:
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
    out = _MergedAttention.apply(*tokens, *prompts, visible, hidden, factor)
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


class _MergedAttention(torch.autograd.Function):
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


def gated_attention_dense(
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
    hidden = None if gate is None else ~unpack_bits(gate, k_prompt.shape[-3])[:, None]
    # [B, L, H, D] -> [B, H, L, D]; shared prompts [P, H, D] -> [H, P, D].
    tokens = (t.transpose(1, 2) for t in (q, k, v))
    prompts = (t.transpose(-3, -2) for t in (k_prompt, v_prompt))
    before = normalize_over == "visible"
    return _DenseAttention.apply(*tokens, *prompts, hidden, before, factor).transpose(1, 2)


class _DenseAttention(torch.autograd.Function):
    """`hidden` removes prompts `before` the softmax, or zeroes them after it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_prompt: Tensor,
        v_prompt: Tensor,
        hidden: Tensor | None,
        before: bool,
        scale: float,
    ) -> Tensor:
        keys, values = _joined(k, k_prompt), _joined(v, v_prompt)
        num_tokens = k.shape[2]
        scores = (q @ keys.mT).mul_(scale)
        if before:
            _hide(scores, hidden, num_tokens, float("-inf"))
            hidden = None
        probs = torch.softmax(scores, -1)
        # The scores are not needed any more: their memory takes the gated probabilities.
        gated = probs if hidden is None else _hide(scores.copy_(probs), hidden, num_tokens, 0.0)
        out = gated @ values
        ctx.save_for_backward(q, k, v, k_prompt, v_prompt, probs, hidden, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, k_prompt, v_prompt, probs, hidden, out = ctx.saved_tensors
        grad, num_tokens = grads[0], k.shape[2]
        needs_q, *needs = ctx.needs_input_grad[:5]
        dq: Tensor | None = None
        dkeys: Any = None
        dvalues: Any = None
        dprobs = grad @ _joined(v, v_prompt).mT
        _hide(dprobs, hidden, num_tokens, 0.0)
        if needs[1] or needs[3]:
            gated = probs if hidden is None else _hide(probs.clone(), hidden, num_tokens, 0.0)
            dvalues = gated.mT @ grad
        if needs_q or needs[0] or needs[2]:
            exact = torch.promote_types(grad.dtype, torch.float32)
            delta = (grad.to(exact) * out).sum(-1, keepdim=True)
            dscores = dprobs.sub_(delta.to(dprobs.dtype)).mul_(probs).mul_(ctx.scale)
            if needs_q:
                dq = dscores @ _joined(k, k_prompt)
            if needs[0] or needs[2]:
                dkeys = dscores.mT @ q
        dk = dkeys[:, :, :num_tokens] if needs[0] else None
        dv = dvalues[:, :, :num_tokens] if needs[1] else None
        dk_prompt = _of_prompts(dkeys, num_tokens, k_prompt) if needs[2] else None
        dv_prompt = _of_prompts(dvalues, num_tokens, v_prompt) if needs[3] else None
        return dq, dk, dv, dk_prompt, dv_prompt, None, None, None


def _joined(tokens: Tensor, prompts: Tensor) -> Tensor:
    """`[B, H, L, D]` and `[H, P, D]` or `[B, H, P, D]` to `[B, H, S, D]`."""
    return torch.cat((tokens, prompts.expand(len(tokens), *prompts.shape[-3:])), dim=2)


def _hide(scores: Tensor, hidden: Tensor | None, num_tokens: int, value: float) -> Tensor:
    """Write `value` to the columns of the prompts that a row does not see."""
    if hidden is not None:
        scores[..., num_tokens:].masked_fill_(hidden, value)
    return scores


def _of_prompts(grad: Tensor, num_tokens: int, like: Tensor) -> Tensor:
    """Return the prompts' part, summed over the samples that share them."""
    return _reduce(grad[:, :, num_tokens:], like)
