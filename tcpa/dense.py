"""Gated attention with one stored matrix of probabilities, for half precision on a CPU.

There, batched products are so much faster than PyTorch's fused attention that it pays, up to some
hundred tokens (`dispatch`), to store probabilities `[B, H, Lq, S]`, S = L + P. Against the
reference it saves the scores, a second matrix of probabilities and the prompts' own columns.

    P = softmax(q K^T scale),  o = (g P) V
    dP = g (do V^T),  dS = P (dP - rowsum(do * o)) scale

Axes: B batch, H heads, L tokens, P prompt rows, S keys, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from .reference import NormalizeOver, unpack_bits


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
    own = grad[:, :, num_tokens:]
    return own if like.ndim == 4 else own.sum(0)
