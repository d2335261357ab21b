"""What is asked of a timm Vision Transformer as a whole: whether it is covered, its sizes, the
input of its first block.

Axes: B batch, L tokens, C width.
"""

from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.norm import LayerNorm, LayerNormFp32
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


def opened_modules(model: ModuleLike) -> dict[str, nn.Module]:
    """Return the modules that are never called as such, so that hooks of theirs would be silent;
    norms as long as they are frozen, which `hooked` looks at.

    Blocks are opened: their norms, MLPs and output projections are called as modules; the block,
    its attention and the projections of queries, keys and values are not.
    """
    modules = {"the model itself": model, "blocks": model.blocks}
    for index, block in enumerate(model.blocks):
        modules |= {f"blocks.{index}": block, f"blocks.{index}.attn": block.attn}
        for name in ("qkv", "q_proj", "k_proj", "v_proj"):
            layer = getattr(block.attn, name, None)
            if layer is not None:
                modules[f"blocks.{index}.attn.{name}"] = layer
        modules[f"blocks.{index}.norm1"] = block.norm1
    return modules


def hooked(modules: dict[str, nn.Module]) -> list[str]:
    """Name the modules that carry hooks, without norms that are called because they are trained."""
    return [
        name
        for name, module in modules.items()
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
        and not (name.endswith(".norm1") and _frozen(module) is None)
    ]


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
    return _frozen(block.norm1)


def _frozen(norm: ModuleLike) -> nn.LayerNorm | None:
    if type(norm) not in (nn.LayerNorm, LayerNorm, LayerNormFp32):
        return None
    for parameter in norm._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return None
    return norm


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
