"""timm's transformer blocks, opened: projections, rotary positions, residual branches.

The model needs the pieces of a block one by one: prompts are projected to keys and values only, the
last block computes few rows, and attention itself is TCPA's. Every function reuses the layers of
the timm block that it is given, so weights, names and features of timm keep working.

Axes: B batch, L tokens, P prompt rows, H heads, D head dim, C width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.norm import LayerNorm, LayerNormFp32
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .checks import require, require_tensor

ModuleLike = Any
"""A timm module; its attributes are not typed."""

SUPPORTED = "VisionTransformer (pre-norm Block) and Eva (EvaBlock; EVA-02, DINOv3, RoPE ViTs)"


def unsupported_reason(model: nn.Module) -> str | None:
    """Say why prompts cannot be put on `model`; None when they can."""
    kind = type(model).__name__
    if not isinstance(model, VisionTransformer | Eva):
        return f"{kind} is not a timm model of a kind that is covered"
    base = VisionTransformer if isinstance(model, VisionTransformer) else Eva
    if type(model).forward_features is not base.forward_features:
        return f"{kind} overrides forward_features, which tcpa replaces"
    for index, block in enumerate(model.blocks):
        if type(block) not in (Block, EvaBlock):
            return (
                f"blocks.{index} is a {type(block).__name__}; only Block and EvaBlock are covered"
            )
        attention = type(block.attn)
        if attention not in (Attention, AttentionRope, EvaAttention):
            return f"blocks.{index}.attn is a {attention.__name__}, whose attention is not covered"
        for name in ("qkv", "q_proj", "k_proj", "v_proj"):
            layer = getattr(block.attn, name, None)
            if layer is not None and type(layer) is not nn.Linear:
                return (
                    f"blocks.{index}.attn.{name} is a {type(layer).__name__}; its weight is read "
                    "directly, so only a plain nn.Linear is covered (merge adapters first)"
                )
        if getattr(block.attn, "num_kv_groups", 1) != 1:
            return f"blocks.{index}.attn shares keys between heads (grouped-query attention)"
    return None


def uncalled_hooks(model: ModuleLike) -> list[str]:
    """Name the modules that carry hooks of their own which would never be called.

    Blocks are opened: their norms, MLPs and output projections are called as modules; the block,
    its attention and the projections of queries, keys and values are not.
    """
    modules = {"": model, "blocks": model.blocks}
    for index, block in enumerate(model.blocks):
        modules |= {f"blocks.{index}": block, f"blocks.{index}.attn": block.attn}
        for name in ("qkv", "q_proj", "k_proj", "v_proj"):
            layer = getattr(block.attn, name, None)
            if layer is not None:
                modules[f"blocks.{index}.attn.{name}"] = layer
        if frozen_layer_norm(block) is not None:
            modules[f"blocks.{index}.norm1"] = block.norm1
    return [name or "the model itself" for name, module in modules.items() if _has_hooks(module)]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def settings(model: ModuleLike) -> dict[str, Any]:
    """Return what a model computes with besides its weights, as values that JSON can hold."""
    block = model.blocks[0]
    activation = getattr(block.mlp, "act", None)
    return {
        "depth": len(model.blocks),
        "heads": block.attn.num_heads,
        "patch_size": list(model.patch_embed.patch_size),
        "image_size": list(model.patch_embed.img_size or ()),
        "prefix_tokens": model.num_prefix_tokens,
        "pooling": str(model.global_pool),
        "activation": type(activation).__name__,
        "norm": type(block.norm1).__name__,
        "norm_eps": block.norm1.eps,
    }


def input_channels(model: ModuleLike) -> int:
    """Return the number of channels of the images that a model takes."""
    return getattr(model, "in_chans", None) or model.patch_embed.proj.weight.shape[1]


def input_weight(model: ModuleLike) -> Tensor:
    """Return a weight that has the device and the dtype of the images."""
    return next(model.patch_embed.parameters())


def check_images(model: ModuleLike, images: object) -> None:
    """Check that images fit a model: rank, dtype, device, channels, size."""
    images = require_tensor("images", images, "[B, channels, height, width]", 4)
    weight, channels = input_weight(model), input_channels(model)
    got, expected = f"{images.shape[1]} channels", f"{channels}"
    require(images.shape[1] == channels, "images", got, expected, "convert them")
    got, remedy = f"device {images.device}", "move images or model with .to()"
    require(images.device == weight.device, "images", got, f"{weight.device}", remedy)
    same = images.dtype == weight.dtype or torch.is_autocast_enabled(images.device.type)
    remedy = "convert the images or call under torch.autocast"
    require(same, "images", f"{images.dtype}", f"{weight.dtype}", remedy)
    size = getattr(model.patch_embed, "img_size", None)
    if size is not None and not model.dynamic_img_size:
        got, remedy = f"size {list(images.shape[2:])}", "resize them, or create the backbone with "
        remedy += "img_size=... or dynamic_img_size=True"
        require(tuple(images.shape[2:]) == tuple(size), "images", got, f"{list(size)}", remedy)


def embed_images(model: ModuleLike, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Compute the input of the first block.

    Args:
        model: the timm model.
        images: `[B, 3, height, width]`.

    Returns:
        Tokens `[B, L, C]` and, for each block, its rotary embedding (None without).
    """
    depth = len(model.blocks)
    x = model.patch_embed(images)
    if isinstance(model, Eva):
        x, rope = model._pos_embed(x)
        if rope is not None and getattr(model, "rope_mixed", False):
            return model.norm_pre(x), [*rope]
        return model.norm_pre(x), [rope] * depth
    x = model.patch_drop(model._pos_embed(x))
    return model.norm_pre(x), [None] * depth


def frozen_layer_norm(block: ModuleLike) -> nn.LayerNorm | None:
    """Return a block's first norm if it is a plain LayerNorm whose parameters are frozen."""
    norm = block.norm1
    plain = type(norm) in (nn.LayerNorm, LayerNorm, LayerNormFp32)
    return norm if plain and not any(p.requires_grad for p in norm.parameters()) else None


def rows_read_by_head(model: ModuleLike) -> int | None:
    """Return how many leading tokens the head reads; None when it reads all of them."""
    if getattr(model, "attn_pool", None) is not None or model.global_pool != "token":
        return None
    return 2 if hasattr(model, "head_dist") else 1


def classifier_names(model: ModuleLike) -> list[str]:
    """Name the classification layers: the head, and a distilled model's second one."""
    return [name for name in ("head", "head_dist") if hasattr(model, name)]


def classifier_layers(model: ModuleLike) -> list[nn.Module]:
    """Return the classification layers."""
    return [getattr(model, name) for name in classifier_names(model)]


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


def rotate(attn: ModuleLike, heads: Tensor, rope: Tensor | None, patches: slice) -> Tensor:
    """Apply rotary positions to patch tokens; prefix tokens and prompts are not rotated.

    Args:
        attn: the block's attention layer.
        heads: queries or keys `[B, L, H, D]`.
        rope: the block's rotary embedding, None for none.
        patches: the rows of `heads` that are patches; there are none in queries cut to the prefix.

    Returns:
        `[B, L, H, D]`.
    """
    if rope is None or heads.shape[1] <= patches.start:
        return heads
    half = getattr(attn, "rotate_half", False)
    # timm rotates [B, H, L, D].
    rotated = apply_rot_embed_cat(heads[:, patches].transpose(1, 2), rope, half=half)
    rotated = rotated.transpose(1, 2).to(heads.dtype)
    return torch.cat((heads[:, : patches.start], rotated, heads[:, patches.stop :]), dim=1)


def finish_attention(block: ModuleLike, x: Tensor, normed: Tensor, heads: Tensor) -> Tensor:
    """Add the attention branch to the residual stream.

    Args:
        block: the timm block.
        x: residual stream `[B, L, C]`.
        normed: the input of the attention layer `[B, L, C]`, for layers with an output gate.
        heads: attention output `[B, L, H, D]`.

    Returns:
        `[B, L, C]`.
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
