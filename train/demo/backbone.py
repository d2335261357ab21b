"""The demo's Vision Transformer: its architecture, its shipped weights and its precision."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..engine.precision import Numerics, choose_numerics

IMAGE_SIZE = 32
"""Height and width of the input, pixels."""

PATCH_SIZE = 4
"""Side of a patch, pixels: 8 x 8 patches, one for each pixel of an original digit."""

WIDTH = 128
"""C."""

NORMALIZATION = ((0.5,), (0.5,))
"""Mean and standard deviation of the one grey channel, for values in [0, 1]."""

WEIGHTS = Path(__file__).with_name("demo_vit.safetensors")


def build_backbone(num_classes: int = 0) -> VisionTransformer:
    """Build the ViT with fresh weights; 0 classes leave the class token's feature, `[B, 128]`.

    One grey channel, 64 patches, 4 blocks of width 128 with 4 heads: 0.8 million parameters.
    """
    vit = VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        in_chans=1,
        num_classes=num_classes,
        embed_dim=WIDTH,
        depth=4,
        num_heads=4,
    )
    for block in vit.blocks:
        # torch declares every attribute of a module as a tensor or a module.
        attention: Any = block.attn
        # With 65 tokens the written-out attention trains twice as fast on a CPU in bfloat16:
        # the fused one spends 43 % of a step in its backward.
        attention.fused_attn = False
    return vit


def load_backbone(path: Path = WEIGHTS) -> VisionTransformer:
    """Build the ViT in float32 and load the weights at `path` (by default the shipped ones)."""
    vit = build_backbone()
    vit.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return vit.eval()


def save_backbone(vit: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write the weights without the head, as float16, with `metadata` in the file's header."""
    weights = {
        name: value.detach().cpu().half().contiguous()
        for name, value in vit.state_dict().items()
        if not name.startswith("head.")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata)


def normalise(images: Tensor) -> Tensor:
    """Map images `[B, 1, H, W]` with values in [0, 1] to the range [-1, 1] of the pretraining."""
    (mean,), (std,) = NORMALIZATION
    return (images - mean) / std


def numerics(device: torch.device) -> Numerics:
    """Return how the demo computes: autocast to bfloat16 where that is native; weights float32."""
    return choose_numerics("auto", device, trains_weights=True)
