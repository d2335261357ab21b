"""Small timm models of every covered kind, and images that fit them."""

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """A timm model made small enough for a test."""

    name: str
    size: int
    arguments: dict[str, Any] = field(default_factory=dict)

    def create(self, dtype: torch.dtype = torch.float32, num_classes: int = 5) -> nn.Module:
        torch.manual_seed(1)
        arguments = {"depth": 2, "num_classes": num_classes} | self.arguments
        model = timm.create_model(self.name, **arguments).to(dtype)
        # timm starts CLS tokens, biases and LayerScale near zero; here all must matter.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim < 2 or "token" in name or "pos_embed" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def images(self, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randn(batch, 3, self.size, self.size, generator=generator, dtype=dtype)


ARCHITECTURES = {
    "vit-base": Architecture("vit_base_patch16_224", 224),
    "vit-tiny": Architecture("vit_tiny_patch16_224", 64, {"img_size": 64}),
    "deit-distilled": Architecture("deit_tiny_distilled_patch16_224", 64, {"img_size": 64}),
    "dinov2-registers": Architecture("vit_small_patch14_reg4_dinov2", 56, {"img_size": 56}),
    "clip": Architecture("vit_base_patch32_clip_224", 96, {"img_size": 96}),
    "qk-norm": Architecture("vit_tiny_patch16_224", 64, {"img_size": 64, "qk_norm": True}),
    "gap-without-cls": Architecture("vit_base_patch16_gap_224", 48, {"img_size": 48}),
    "gap-with-register": Architecture("vit_wee_patch16_reg1_gap_256", 64, {"img_size": 64}),
    "siglip-map-pool": Architecture("vit_base_patch16_siglip_224", 48, {"img_size": 48}),
    "dynamic-size": Architecture("vit_tiny_patch16_224", 80, {"dynamic_img_size": True}),
    "eva02": Architecture("eva02_tiny_patch14_224", 56, {"img_size": 56}),
    "dinov3": Architecture("vit_small_patch16_dinov3", 64, {"img_size": 64}),
    "dinov3-swiglu": Architecture("vit_small_plus_patch16_dinov3", 48, {"img_size": 48}),
    "rope-mixed": Architecture("vit_small_patch16_rope_mixed_224", 64, {"img_size": 64}),
}
