"""Gated attention put together from stock kernels, exactly: what an expert writes without one.

Each computes `tcpa.gated_attention` and the gradients of all five tensors.

Axes: B batch, H heads, L tokens, P prompt rows, S = L + P keys, D head dim.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from ..harness.provider import Outputs, Prepared, compiled
from .attention_case import AttentionCase, heads, prepared, rows


def _flex_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, aux = flex_attention(q, k, v, scale=scale, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None, "it was asked for"
    return out, aux.lse


def lse_merge(
    attend: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]],
    visible: Tensor,
    scale: float,
    *tensors: Tensor,
) -> Tensor:
    """Composition A: attention over the tokens and over the prompts, merged by their statistics.

    `attend` returns output and log-sum-exp, both differentiable; autograd does the rest.
    """
    q, k, v, k_prompt, v_prompt = heads(*tensors)
    out, token_lse = attend(q, k, v, scale)
    scores = (q @ k_prompt.mT).to(token_lse.dtype) * scale
    lse = torch.logaddexp(token_lse, scores.logsumexp(-1))
    probs = torch.exp(scores - lse[..., None]) * visible
    share = torch.exp(token_lse - lse)[..., None]
    return rows(out * share.to(v.dtype) + probs.to(v.dtype) @ v_prompt)


def prepare_lse_merge(case: AttentionCase, training: bool) -> Prepared:
    visible, scale = case.visible, case.scale
    attend = compiled(lambda *tensors: lse_merge(_flex_with_lse, visible, scale, *tensors))
    return prepared(case, training, attend)


def _duplicated(k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor) -> Outputs:
    """Return the keys [k | kp | kp] and the values [v | vp | 0] of composition C.

    Row i sees the real copy of prompt j where its gate bit is set, else the copy whose value is
    zero: every prompt stands once in the denominator, and only a visible one in the sum.
    """
    size = (len(k), *k_prompt.shape[-3:])
    k_prompt, v_prompt = k_prompt.expand(size), v_prompt.expand(size)
    keys = torch.cat((k, k_prompt, k_prompt), dim=1)
    return heads(keys, torch.cat((v, v_prompt, torch.zeros_like(v_prompt)), dim=1))


def prepare_duplicated_sdpa(
    back_end: SDPBackend | None, case: AttentionCase, training: bool
) -> Prepared:
    # [B, 1, L, L + 2 * P]
    mask = F.pad(torch.cat((case.visible, ~case.visible), -1), (case.shape.tokens, 0), value=True)
    mask = mask.expand(case.shape.batch, -1, -1, -1)

    def attend(q: Tensor, *others: Tensor) -> Tensor:
        keys, values = _duplicated(*others)
        with nullcontext() if back_end is None else sdpa_kernel(back_end):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), keys, values, attn_mask=mask, scale=case.scale
            )
        return rows(out)

    return prepared(case, training, attend)


def prepare_duplicated_flex(case: AttentionCase, training: bool) -> Prepared:
    tokens, prompts, gate = case.shape.tokens, case.shape.prompts, case.gate
    assert gate is not None
    gate = gate.expand(case.shape.batch, -1, -1).contiguous()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        second = j >= tokens + prompts
        row = torch.where(second, j - tokens - prompts, j - tokens).clamp(0, prompts - 1)
        bit = (gate[b, i, row // 32] >> (row % 32)) & 1
        return torch.where((j < tokens) | ((bit == 1) ^ second), score, -float("inf"))

    def attend(q: Tensor, *others: Tensor) -> Tensor:
        keys, values = _duplicated(*others)
        queries = q.transpose(1, 2)
        out = flex_attention(queries, keys, values, score_mod=score_mod, scale=case.scale)
        assert isinstance(out, Tensor)
        return rows(out)

    return prepared(case, training, compiled(attend))


class FlashPair(NamedTuple):
    """Stock fused attention: forward, and a backward that takes output and log-sum-exp."""

    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Outputs]]
    """(q, k, v, scale) -> output, natural log-sum-exp `[B, H, L]`, state of the generator."""
    backward: Callable[[Outputs, Outputs, float], Outputs]
    """((grad, q, k, v, output, log-sum-exp), state, scale) -> gradients of q, k and v."""


_aten = torch.ops.aten
# No dropout, no causal mask.
_PLAIN = (0.0, False)


def _lengths(tensors: Outputs) -> tuple[None, None, int, int]:
    """Return cumulative lengths, none as all samples are equally long, and the longest ones."""
    return None, None, tensors[1].shape[2], tensors[2].shape[2]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Outputs]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, *_PLAIN, scale=scale)
    return out, lse, ()


def _cpu_backward(tensors: Outputs, state: Outputs, scale: float) -> Outputs:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, *_PLAIN, scale=scale
    )


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Outputs]:
    out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention(
        q, k, v, *_PLAIN, False, scale=scale
    )
    return out, lse, (seed, offset)


def _flash_backward(tensors: Outputs, state: Outputs, scale: float) -> Outputs:
    return _aten._scaled_dot_product_flash_attention_backward(
        *tensors, *_lengths(tensors), *_PLAIN, *state, scale=scale
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Outputs]:
    out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, *_PLAIN, False, scale=scale
    )
    # Its statistics are [B, H, L, 1].
    return out, lse.flatten(2), (seed, offset)


def _cudnn_backward(tensors: Outputs, state: Outputs, scale: float) -> Outputs:
    *others, lse = tensors
    return _aten._scaled_dot_product_cudnn_attention_backward(
        *others, lse[..., None], *state, None, *_lengths(tensors), *_PLAIN, scale=scale
    )


CPU_FLASH = FlashPair(_cpu_forward, _cpu_backward)
CUDA_FLASH = FlashPair(_flash_forward, _flash_backward)
CUDNN = FlashPair(_cudnn_forward, _cudnn_backward)


def merged_statistics(pair: FlashPair, visible: Tensor, scale: float) -> Callable[..., Tensor]:
    """Composition D: stock attention over the tokens, prompts by hand, gradients from merged
    statistics.

    A stock backward uses output and log-sum-exp only as P = exp(s - lse) and rowsum(grad * out).
    Given the merged ones, it returns the tokens' share of the joint softmax's gradients.

    Returns:
        (q, k, v `[B, H, L, D]`, k_prompt, v_prompt `[(B,) H, P, D]`) -> `[B, H, L, D]`.
    """

    def prompt_scores(q: Tensor, k_prompt: Tensor) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return (q @ k_prompt.mT).to(dtype) * scale

    class Merged(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor
        ) -> Tensor:
            token_out, token_lse, state = pair.forward(q, k, v, scale)
            scores = prompt_scores(q, k_prompt)
            lse = torch.logaddexp(token_lse, scores.logsumexp(-1).to(token_lse.dtype)).contiguous()
            probs = (torch.exp(scores - lse[..., None]) * visible).to(v.dtype)
            share = torch.exp(token_lse - lse)[..., None].to(v.dtype)
            out = token_out * share + probs @ v_prompt
            ctx.save_for_backward(q, k, v, k_prompt, v_prompt, out, lse, *state)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Outputs:
            grad = grads[0]
            q, k, v, k_prompt, v_prompt, out, lse, *state = ctx.saved_tensors
            dq, dk, dv = pair.backward((grad, q, k, v, out, lse), tuple(state), scale)
            probs = torch.exp(prompt_scores(q, k_prompt) - lse[..., None])
            delta = (grad * out).sum(-1, keepdim=True, dtype=probs.dtype)
            dscores = probs * ((grad @ v_prompt.mT) * visible - delta) * scale
            dscores = dscores.to(grad.dtype)
            dk_prompt = dscores.mT @ q
            dv_prompt = (probs * visible).to(grad.dtype).mT @ grad
            if k_prompt.ndim == 3:
                dk_prompt, dv_prompt = dk_prompt.sum(0), dv_prompt.sum(0)
            return dq + dscores @ k_prompt, dk, dv, dk_prompt, dv_prompt

    return Merged.apply


def prepare_merged_statistics(
    pair: FlashPair,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
    case: AttentionCase,
    training: bool,
) -> Prepared:
    merged = merged_statistics(pair, case.visible, case.scale)
    attend = wrap(lambda *tensors: rows(merged(*heads(*tensors))))
    return prepared(case, training, attend)
