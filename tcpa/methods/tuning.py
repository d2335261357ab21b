"""Modules and parameters of the tunings: heads, adapters, the side network, weights to train.

Axes: B batch, L tokens, C width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import blocks
from .tuning_config import (
    AdapterTuning,
    AdaptFormerTuning,
    BiasTuning,
    FullTuning,
    HeadTuning,
    LastBlockTuning,
    MLPHeadTuning,
)

PRIOR = 0.01
"""Probability that every class starts with under the "prior" head: biases are -log 99."""

ALEXNET_PIXELS = 63
"""Smallest images that AlexNet's convolutions take."""


class HeadNorm(nn.BatchNorm1d):
    """Batch normalisation of features `[B, C]` that also takes a training batch of one image,
    normalised by the running statistics."""

    def __init__(self, width: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(width, eps=eps, affine=affine)
        self.num_batches_tracked = None

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) == 1:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(input, mean, var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def make_head(config: HeadTuning, linear: nn.Module) -> nn.Module:
    """Return the head of a tuning around the fresh last layer that timm made.

    Args:
        config: the tuning.
        linear: `nn.Linear`, or `nn.Identity` for a model without a head.
    """
    if not isinstance(linear, nn.Linear):
        return linear
    if config.head == "prior":
        nn.init.kaiming_normal_(linear.weight, mode="fan_out")
        nn.init.constant_(linear.bias, -math.log((1 - PRIOR) / PRIOR))
    if config.head == "normed":
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        norm = HeadNorm(linear.in_features, eps=1e-6, affine=False)
        return nn.Sequential(norm, linear)
    if not isinstance(config, MLPHeadTuning):
        return linear
    width, layers = linear.in_features, []
    for _ in range(config.hidden_layers):
        hidden = nn.Linear(width, width)
        nn.init.kaiming_normal_(hidden.weight, mode="fan_out")
        layers += [hidden, nn.ReLU(), HeadNorm(width), nn.Dropout(config.dropout)]
    return nn.Sequential(*layers, linear)


class Adapter(nn.Module):
    """A bottleneck of two linear layers for the tokens of one block.

    The values are kept in their own precision and used in that of the tokens.
    """

    def __init__(self, config: AdapterTuning | AdaptFormerTuning, width: int) -> None:
        super().__init__()
        self.config = config
        beside = isinstance(config, AdaptFormerTuning)
        hidden = config.bottleneck if beside else max(width // config.reduction, 1)
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        self.reset_parameters()

    @property
    def beside_mlp(self) -> bool:
        """Whether the input is that of the MLP's branch; otherwise it is the MLP's output."""
        return isinstance(self.config, AdaptFormerTuning)

    def reset_parameters(self) -> None:
        """Start from a function that adds nothing."""
        if isinstance(self.config, AdapterTuning) and self.config.zero_init:
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added, `[B, L, C]`."""
        hidden = F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype))
        if isinstance(self.config, AdaptFormerTuning):
            hidden = F.dropout(F.relu(hidden), self.config.dropout, self.training)
            factor = self.config.scale
        else:
            hidden, factor = F.gelu(hidden), 1.0
        out = F.linear(hidden, self.up.weight.to(hidden.dtype), self.up.bias.to(hidden.dtype))
        return (out * factor).to(x.dtype)


def for_alexnet(images: Tensor) -> Tensor:
    """Return images `[B, 1 or 3, H, W]` as AlexNet takes them: three channels, grey ones three
    times, and a shorter side of 63 pixels at least, small ones enlarged."""
    shorter = min(images.shape[-2:])
    if shorter < ALEXNET_PIXELS:
        size = [round(side * ALEXNET_PIXELS / shorter) for side in images.shape[-2:]]
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    return images.expand(-1, 3, -1, -1)


class SideNetwork(nn.Module):
    """AlexNet's convolutions on the image, mapped to the backbone's width and blended with its
    feature; sigmoid of `blend`, 0 at first, is the backbone's share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from torchvision.models import alexnet

        self.features = alexnet(weights=None).features
        self.pool = nn.AdaptiveAvgPool2d((6, 6))
        self.project = nn.Linear(256 * 6 * 6, width, bias=False)
        self.blend = nn.Parameter(torch.zeros(()))

    def load_pretrained(self) -> None:
        """Take torchvision's ImageNet-1k weights.

        Raises:
            RuntimeError: they are not there and cannot be downloaded.
        """
        from torchvision.models import AlexNet_Weights

        try:
            state = AlexNet_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        except Exception as error:  # What a failed download raises differs between versions.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"tuning: torchvision could not load AlexNet's weights ({reason}); connect once so "
                "that they are cached, or pass SideTuning(pretrained=False)"
            ) from error
        own = {name.removeprefix("features."): v for name, v in state.items() if "features" in name}
        self.features.load_state_dict(own)

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """Blend the backbone's features `[B, C]` with those of images `[B, 3, H, W]`."""
        x = self.features(for_alexnet(images.to(self.project.weight.dtype)))
        if x.shape[-2:] != (6, 6):
            x = self.pool(x)
        x = x.flatten(1)
        share = torch.sigmoid(self.blend)
        return share * features + (1 - share) * self.project(x)


def backbone_parameters(config: HeadTuning, backbone: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of the backbone that a tuning trains, the head's apart, by name."""
    heads = {id(p) for head in blocks.classifier_layers(backbone) for p in head.parameters()}
    named = {n: p for n, p in backbone.named_parameters() if id(p) not in heads}
    if isinstance(config, FullTuning):
        return named
    if isinstance(config, BiasTuning):
        return {name: p for name, p in named.items() if "bias" in name}
    if isinstance(config, LastBlockTuning):
        depth = len(backbone.blocks)
        parts = [f"blocks.{index}." for index in range(depth - config.num_blocks, depth)]
        parts += ["norm.", "fc_norm."]
        return {name: p for name, p in named.items() if name.startswith(tuple(parts))}
    return {}


def dropout_layers(config: HeadTuning, backbone: Any) -> list[nn.Dropout]:
    """Return the dropout layers of the backbone that training switches on, with their rate set."""
    if not isinstance(config, FullTuning) or config.dropout == 0:
        return []
    owners = [backbone, *(block.mlp for block in backbone.blocks)]
    layers = [getattr(m, name, None) for m in owners for name in ("pos_drop", "drop1", "drop2")]
    found = [layer for layer in layers if isinstance(layer, nn.Dropout)]
    for layer in found:
        layer.p = config.dropout
    return found
