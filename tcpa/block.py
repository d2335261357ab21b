"""One timm block, opened, with prompts: in the fast form and in the plain form of every saving.

The pieces of a block are run one by one: prompts are projected to keys and values only, the last
block computes few rows, and attention is gated. All reuse the layers of the timm block, so weights,
names and features of timm keep working.

Rows of a block's input: L tokens (prefix tokens, then patches), then the prompts of VPT-Shallow if
any. Where prompts join the sequence they come last: attention has no order of its own, and
positions were added before.

Axes: B batch, L tokens, P prompt rows, S = L + P keys, H heads, D head dim, C width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from .capture import Recorder
from .config import Savings
from .dispatch import Impl
from .ops import gated_attention_unchecked
from .reference import NormalizeOver, unpack_bits
from .vit import ModuleLike


class PromptKV(NamedTuple):
    """Keys and values of one block's prompts, each `[P, H, D]` or `[B, P, H, D]`."""

    keys: Tensor
    values: Tensor

    def with_keys(self, extra: Tensor) -> "PromptKV":
        """Add prompts `[P', H, D]` that are their own keys and values."""
        extra = extra.to(self.keys.dtype)
        extra = extra if self.keys.ndim == 3 else extra.expand(len(self.keys), -1, -1, -1)
        keys, values = (torch.cat((given, extra), dim=-3) for given in self)
        return PromptKV(keys, values)


class BlockSettings(NamedTuple):
    """How blocks are run; the same for all blocks of a pass."""

    patches: slice
    """Rows that hold patch tokens."""
    impl: Impl
    savings: Savings
    normalize_over: NormalizeOver = "all"


def run_block(
    block: ModuleLike,
    x: Tensor,
    settings: BlockSettings,
    *,
    rope: Tensor | None = None,
    rows: int | None = None,
    normed: Tensor | None = None,
    prompts: Tensor | None = None,
    prompt_kv: PromptKV | None = None,
    value_affine: nn.Module | None = None,
    extra_keys: Tensor | None = None,
    query_scale: Tensor | None = None,
    gate: Tensor | None = None,
    adapter: nn.Module | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """Run one block.

    Args:
        block: the timm block.
        x: residual stream `[B, L, C]`.
        settings: how to run it.
        rope: rotary embedding of the patches.
        rows: compute only this many leading rows.
        normed: `x` after the first norm, where it is known.
        prompts: prompts `[P, C]` or `[B, P, C]` before the first norm.
        prompt_kv: their keys and values, where computed outside.
        value_affine: module applied to the prompts' values.
        extra_keys: prompts `[P', H, D]` that are their own keys and values; where `prompt_kv` is
            computed outside it holds them.
        query_scale: scalar that all queries are multiplied by.
        gate: int32 `[B or 1, L, W]`; None when every token sees every prompt.
        adapter: module after or beside the MLP.
        recorder: is shown what the attention reads.

    Returns:
        `[B, rows or L, C]`.
    """
    attn, savings, q_prompt = block.attn, settings.savings, None
    if normed is None:
        normed = block.norm1(x)
    assert normed is not None
    if prompts is not None and prompts.ndim == 2:
        # The plain forms: once per sample, inside the block.
        prompts = prompts.expand(x.shape[0], -1, -1)
    if prompts is not None and not savings.prompt_keys_only:
        q, k, v, prompt_kv, q_prompt = _project_joined(block, normed, prompts, value_affine)
    else:
        if prompts is not None and prompt_kv is None:
            prompt_kv = prompt_keys_values(block, prompts, value_affine)
        if rows is None:
            q, k, v = project_all(attn, normed)
        else:
            q = project_queries(attn, normed[:, :rows])
            k, v = project_keys_values(attn, normed)
    if prompt_kv is None:
        nothing = k.new_empty((0, *k.shape[2:]))
        prompt_kv = PromptKV(nothing, nothing)
    if extra_keys is not None:
        prompt_kv = prompt_kv.with_keys(extra_keys)
    if query_scale is not None:
        q = q * query_scale.to(q.dtype)
    if rope is not None:
        q, k = (rotate(attn, heads, rope, settings.patches) for heads in (q, k))
    if recorder is not None:
        recorder.gate(gate, len(q))
    if rows is not None:
        x, normed, q = x[:, :rows], normed[:, :rows], q[:, :rows]
        gate = None if gate is None else gate[:, :rows]
    options = {"scale": attn.scale, "normalize_over": settings.normalize_over}
    if recorder is not None:
        recorder.attention(q, k, prompt_kv.keys, gate, **options)
    if gate is None or savings.gate_bits:
        heads = gated_attention_unchecked(q, k, v, *prompt_kv, gate, impl=settings.impl, **options)
    else:
        heads = dense_gated_attention(q, k, v, *prompt_kv, gate, q_prompt=q_prompt, **options)
    x = finish_attention(block, x, normed, heads)
    return finish_block(block, x, adapter)


def prompt_keys_values(
    block: ModuleLike, prompts: Tensor, value_affine: nn.Module | None
) -> PromptKV:
    """Project raw prompts `[P, C]` or `[B, P, C]` to the keys and values of a block."""
    normed = block.norm1(prompts.to(block.norm1.weight.dtype))
    keys, values = project_keys_values(block.attn, normed)
    return PromptKV(keys, values if value_affine is None else value_affine(values))


def _project_joined(
    block: ModuleLike, normed: Tensor, prompts: Tensor, value_affine: nn.Module | None
) -> tuple[Tensor, Tensor, Tensor, PromptKV, Tensor]:
    """Send the prompts of every sample through the whole projection, as the official code does;
    their queries, which come last, are computed and unused."""
    tokens = normed.shape[1]
    normed_prompts = block.norm1(prompts.to(block.norm1.weight.dtype))
    q, k, v = project_all(block.attn, torch.cat((normed, normed_prompts), dim=1))
    values = v[:, tokens:] if value_affine is None else value_affine(v[:, tokens:])
    prompt_kv = PromptKV(k[:, tokens:], values)
    return q[:, :tokens], k[:, :tokens], v[:, :tokens], prompt_kv, q[:, tokens:]


def _weight_and_bias(attn: ModuleLike, part: int) -> tuple[Tensor, Tensor | None]:
    """Return weight `[H * D, C]` and bias of one projection: 0 queries, 1 keys, 2 values."""
    if attn.qkv is None:
        layer = (attn.q_proj, attn.k_proj, attn.v_proj)[part]
        return layer.weight, layer.bias
    width = attn.qkv.weight.shape[0] // 3
    rows = slice(part * width, (part + 1) * width)
    if hasattr(attn, "q_bias"):
        return attn.qkv.weight[rows], (attn.q_bias, attn.k_bias, attn.v_bias)[part]
    bias = attn.qkv.bias
    return attn.qkv.weight[rows], None if bias is None else bias[rows]


def key_value_parameters(attn: ModuleLike) -> tuple[Tensor, Tensor]:
    """Return weight `[2 H D, C]` and bias `[2 H D]`, zeros for none, of keys and values."""
    weights, biases = zip(*(_weight_and_bias(attn, part) for part in (1, 2)), strict=True)
    biases = [
        weight.new_zeros(weight.shape[0]) if bias is None else bias
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return torch.cat(weights), torch.cat(biases)


def split_heads(attn: ModuleLike, flat: Tensor) -> Tensor:
    """`[..., L, H * D]` -> `[..., L, H, D]`, a view."""
    return flat.unflatten(-1, (attn.num_heads, -1))


def project_queries(attn: ModuleLike, normed: Tensor) -> Tensor:
    """Project normed tokens `[..., L, C]` to queries `[..., L, H, D]`."""
    return attn.q_norm(split_heads(attn, F.linear(normed, *_weight_and_bias(attn, 0))))


def project_keys_values(attn: ModuleLike, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Project normed tokens or prompts `[..., L, C]` to keys and values `[..., L, H, D]`."""
    keys = split_heads(attn, F.linear(normed, *_weight_and_bias(attn, 1)))
    values = split_heads(attn, F.linear(normed, *_weight_and_bias(attn, 2)))
    return attn.k_norm(keys), values


def project_all(attn: ModuleLike, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project normed tokens `[B, L, C]` to queries, keys and values `[B, L, H, D]`.

    A fused projection is one matrix product and the results are views of its output.
    """
    if attn.qkv is None:
        return project_queries(attn, normed), *project_keys_values(attn, normed)
    bias = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    packed = F.linear(normed, attn.qkv.weight, bias)
    q, k, v = packed.unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
    return attn.q_norm(q), attn.k_norm(k), v


def rotate(attn: ModuleLike, heads: Tensor, rope: Tensor, patches: slice) -> Tensor:
    """Apply rotary positions to patch tokens; prefix tokens and prompts are not rotated.

    Args:
        attn: the block's attention layer.
        heads: queries or keys `[B, L, H, D]`.
        rope: the block's rotary embedding.
        patches: the rows of `heads` that are patches; there are none in queries cut to the prefix.

    Returns:
        `[B, L, H, D]`.
    """
    if heads.shape[1] <= patches.start:
        return heads
    half = getattr(attn, "rotate_half", False)
    # timm rotates [B, H, L, D].
    rotated = apply_rot_embed_cat(heads[:, patches].transpose(1, 2), rope, half=half)
    rotated = rotated.transpose(1, 2).to(heads.dtype)
    return torch.cat((heads[:, : patches.start], rotated, heads[:, patches.stop :]), dim=1)


def finish_attention(block: ModuleLike, x: Tensor, normed: Tensor, heads: Tensor) -> Tensor:
    """Add the attention branch to the residual stream.

    `normed` is the input of the attention layer, for layers with an output gate; `heads` is the
    attention's output `[B, L, H, D]`. Returns `[B, L, C]`.
    """
    attn = block.attn
    out = attn.norm(heads.flatten(-2)) if hasattr(attn, "norm") else heads.flatten(-2)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(normed).sigmoid()
    out = attn.proj_drop(attn.proj(out))
    if isinstance(block, EvaBlock):
        out = out if block.gamma_1 is None else block.gamma_1 * out
    else:
        out = block.ls1(out)
    return x + block.drop_path1(out)


def finish_block(block: ModuleLike, x: Tensor, adapter: ModuleLike | None = None) -> Tensor:
    """Add the MLP branch to the residual stream `[B, L, C]`, with an adapter after or beside it."""
    out = block.mlp(block.norm2(x))
    if adapter is not None and not adapter.beside_mlp:
        out = out + adapter(out)
    if isinstance(block, EvaBlock):
        out = out if block.gamma_2 is None else block.gamma_2 * out
    else:
        out = block.ls2(out)
    out = block.drop_path2(out)
    if adapter is not None and adapter.beside_mlp:
        out = out + adapter(x)
    return x + out


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
    sees_prompts = unpack_bits(gate, k_prompt.shape[1])
    sees = torch.cat((sees_prompts.new_ones(len(gate), queries, k.shape[1]), sees_prompts), dim=-1)
    mask_BHLS = sees[:, None].to(scores_BHLS.dtype).repeat(batch // len(gate), heads, 1, 1)
    if normalize_over == "visible":
        scores_BHLS = scores_BHLS[:, :, :queries].masked_fill(mask_BHLS == 0, float("-inf"))
    probs_BHLS = scores_BHLS.softmax(dim=-1)[:, :, :queries] * mask_BHLS
    return (probs_BHLS.to(values.dtype) @ values).transpose(1, 2)
