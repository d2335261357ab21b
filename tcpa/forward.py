"""One transformer block with prompts, in the fast form and in the plain form of every saving.

Rows of a block's input: L tokens (prefix tokens, then patches), then the prompts of VPT-Shallow if
any. Where prompts join the sequence they come last: attention has no order of its own, and
positions were added before.

Axes: B batch, L tokens, P prompt rows, S = L + P keys, H heads, D head dim, C width.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import blocks
from .capture import Recorder
from .config import Savings
from .dispatch import Impl
from .ops import gated_attention
from .prompt_kv import PromptKV, prompt_keys_values
from .reference import NormalizeOver, unpack_gate


class Projections(NamedTuple):
    """What a block's attention reads; `q_prompt` is computed in the plain form only, and unused."""

    q: Tensor
    k: Tensor
    v: Tensor
    prompt_kv: PromptKV | None
    q_prompt: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSettings:
    """How blocks are run; the same for all blocks of a model and one image size."""

    patches: slice
    """Rows that hold patch tokens."""

    normalize_over: NormalizeOver = "all"
    impl: Impl = "auto"
    savings: Savings = field(default_factory=Savings)
    recorder: Recorder | None = None


def run_block(
    block: blocks.ModuleLike,
    x: Tensor,
    settings: BlockSettings,
    *,
    rope: Tensor | None = None,
    prompts: Tensor | None = None,
    prompt_kv: PromptKV | None = None,
    value_affine: nn.Module | None = None,
    gate: Tensor | None = None,
    rows: int | None = None,
    normed: Tensor | None = None,
    extra_keys: Tensor | None = None,
    query_scale: Tensor | None = None,
    adapter: nn.Module | None = None,
) -> Tensor:
    """Run one block.

    Args:
        block: the timm block.
        x: residual stream `[B, L, C]`.
        settings: how to run it.
        rope: rotary embedding of the patches.
        prompts: prompts `[P, C]` or `[B, P, C]` before the first norm.
        prompt_kv: their keys and values, where computed outside.
        value_affine: module applied to the prompts' values.
        gate: int32 `[B or 1, L, W]`; None when every token sees every prompt.
        rows: compute only this many leading rows.
        normed: `x` after the first norm, where it is known.
        extra_keys: prompts `[P', H, D]` that are their own keys and values; where `prompt_kv` is
            computed outside it holds them.
        query_scale: scalar that all queries are multiplied by.
        adapter: module after or beside the MLP.

    Returns:
        `[B, rows or L, C]`.
    """
    normed = cast(Tensor, block.norm1(x)) if normed is None else normed
    if prompts is not None and not settings.savings.prompt_keys_only:
        projected = _project_joined(block, normed, prompts, value_affine)
    else:
        if prompts is not None and prompt_kv is None:
            # The plain form of prompt_kv_once: once per sample, inside the block.
            prompts = prompts if prompts.ndim == 3 else prompts.expand(x.shape[0], -1, -1)
            prompt_kv = prompt_keys_values(block, prompts, value_affine)
        projected = _project_tokens(block, normed, prompt_kv, rows)
    if extra_keys is not None:
        nothing = extra_keys[:0].to(projected.k.dtype)
        known = projected.prompt_kv or PromptKV(nothing, nothing)
        projected = projected._replace(prompt_kv=known.with_keys(extra_keys))
    if query_scale is not None:
        projected = projected._replace(q=projected.q * query_scale.to(projected.q.dtype))
    heads = _attend(block, projected, settings, rope, gate, rows)
    if rows is not None:
        x, normed = x[:, :rows], normed[:, :rows]
    x = blocks.finish_attention(block, x, normed, heads)
    return blocks.finish_block(block, x, adapter)


def run_block_on_tokens(
    block: blocks.ModuleLike,
    x: Tensor,
    settings: BlockSettings,
    *,
    rope: Tensor | None,
    prompts: Tensor,
    rows: int | None,
    **options: Any,
) -> Tensor:
    """Run one block on tokens and prompts alike, then drop the prompts: plain VPT-Deep."""
    prompts = prompts if prompts.ndim == 3 else prompts.expand(x.shape[0], -1, -1)
    joined = torch.cat((x, prompts.to(x.dtype)), dim=1)
    out = run_block(block, joined, settings, rope=rope, **options)
    return out[:, : x.shape[1] if rows is None else rows]


def _project_tokens(
    block: blocks.ModuleLike, normed: Tensor, prompt_kv: PromptKV | None, rows: int | None
) -> Projections:
    attn = block.attn
    if rows is None:
        q, k, v = blocks.project_all(attn, normed)
    else:
        q = blocks.project_queries(attn, normed[:, :rows])
        k, v = blocks.project_keys_values(attn, normed)
    return Projections(q, k, v, prompt_kv, None)


def _project_joined(
    block: blocks.ModuleLike, normed: Tensor, prompts: Tensor, value_affine: nn.Module | None
) -> Projections:
    """Send the prompts of every sample through the whole projection, as the official code does."""
    tokens = normed.shape[1]
    prompts = prompts if prompts.ndim == 3 else prompts.expand(normed.shape[0], -1, -1)
    normed_prompts = block.norm1(prompts.to(block.norm1.weight.dtype))
    joined = torch.cat((normed, normed_prompts), dim=1)
    q, k, v = blocks.project_all(block.attn, joined)
    values = v[:, tokens:] if value_affine is None else value_affine(v[:, tokens:])
    prompt_kv = PromptKV(k[:, tokens:], values)
    return Projections(q[:, :tokens], k[:, :tokens], v[:, :tokens], prompt_kv, q[:, tokens:])


def _attend(
    block: blocks.ModuleLike,
    projected: Projections,
    settings: BlockSettings,
    rope: Tensor | None,
    gate: Tensor | None,
    rows: int | None,
) -> Tensor:
    """Return the attention output `[B, rows or L, H, D]`."""
    attn = block.attn
    q, k, v, prompt_kv, q_prompt = projected
    q = blocks.rotate(attn, q, rope, settings.patches)
    k = blocks.rotate(attn, k, rope, settings.patches)
    if prompt_kv is None:
        nothing = k.new_empty((0, *k.shape[2:]))
        prompt_kv = PromptKV(nothing, nothing)
    recorder = settings.recorder
    if recorder is not None:
        recorder.gate(gate, len(q))
    if rows is not None:
        q, gate = q[:, :rows], None if gate is None else gate[:, :rows]
    options = {"scale": attn.scale, "normalize_over": settings.normalize_over}
    if recorder is not None:
        recorder.attention(q, k, prompt_kv.keys, gate, **options)
    if gate is None or settings.savings.gate_bits:
        return gated_attention(q, k, v, *prompt_kv, gate, impl=settings.impl, **options)
    return dense_gated_attention(q, k, v, *prompt_kv, gate, q_prompt=q_prompt, **options)


def dense_gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prompt: Tensor,
    v_prompt: Tensor,
    gate: Tensor,
    *,
    scale: float,
    normalize_over: NormalizeOver,
    q_prompt: Tensor | None = None,
) -> Tensor:
    """Compute `gated_attention` with a dense mask, as the official code does; the costly plain
    form.

    Takes the arguments of `gated_attention`; `q_prompt` `[B, P, H, D]` adds the prompts' own
    queries, whose rows are computed and thrown away.

    Returns:
        `[B, Lq, H, D]`.
    """
    batch, queries, heads, _ = q.shape
    if k_prompt.ndim == 3:
        k_prompt, v_prompt = (t.expand(batch, -1, -1, -1) for t in (k_prompt, v_prompt))
    keys = torch.cat((k, k_prompt), dim=1).transpose(1, 2)
    values = torch.cat((v, v_prompt), dim=1).transpose(1, 2)
    rows = q if q_prompt is None else torch.cat((q, q_prompt), dim=1)
    scores_BHLS = rows.transpose(1, 2) @ keys.mT * scale
    sees_prompts = unpack_gate(gate, k_prompt.shape[1])
    sees = torch.cat((sees_prompts.new_ones(len(gate), queries, k.shape[1]), sees_prompts), dim=-1)
    mask_BHLS = sees[:, None].to(scores_BHLS.dtype).repeat(batch // len(gate), heads, 1, 1)
    if normalize_over == "visible":
        scores_BHLS = scores_BHLS[:, :, :queries].masked_fill(mask_BHLS == 0, float("-inf"))
    probs_BHLS = scores_BHLS.softmax(dim=-1)[:, :, :queries] * mask_BHLS
    return (probs_BHLS.to(values.dtype) @ values).transpose(1, 2)
