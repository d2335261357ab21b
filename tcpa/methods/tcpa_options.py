"""What the official TCPA code can do besides, by its flags: a map of the prompts' values, a
convolutional prompt on the image, attention over pixels.

Axes: B batch, P prompt rows, H heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor, nn


class ValueAffine(nn.Module):
    """Scale and shift the values of every prompt row, shared by all blocks (official flag ADVP)."""

    def __init__(self, num_prompts: int, backbone: Any) -> None:
        super().__init__()
        attn = backbone.blocks[0].attn
        width = attn.num_heads * attn.head_dim
        self.scale = nn.Parameter(torch.empty(1, num_prompts, width))
        self.shift = nn.Parameter(torch.empty(1, num_prompts, width))
        # Near the identity: 1 + 0.1 z and 0.1 z with Kaiming-normal z.
        for parameter, offset in ((self.scale, 1.0), (self.shift, 0.0)):
            if parameter.numel():
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            with torch.no_grad():
                parameter.mul_(0.1).add_(offset)

    def forward(self, values: Tensor) -> Tensor:
        """Map prompt values `[P, H, D]` or `[B, P, H, D]`."""
        heads = values.shape[-2:]
        scale, shift = self.scale[0].unflatten(-1, heads), self.shift[0].unflatten(-1, heads)
        return (values * scale + shift).to(values.dtype)


class ConvImagePrompt(nn.Module):
    """Add a learned residual to the normalised image: 11 x 11 convolutions 3 -> 9 -> 3 with
    PReLU."""

    def __init__(self, channels: int = 3, hidden: int = 9, kernel_size: int = 11) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, kernel_size, padding="same")
        self.activation = nn.PReLU()
        self.contract = nn.Conv2d(hidden, channels, kernel_size, padding="same")

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, height, width]`."""
        # The convolutions stay in float32 when frozen weights and images are in less.
        x = images.to(self.expand.weight.dtype)
        return images + self.contract(self.activation(self.expand(x))).to(images.dtype)


class SimAM(nn.Module):
    """Weight every pixel by a parameter-free attention over its channel (SimAM, ICML 2021)."""

    def __init__(self, regularizer: float = 1e-3) -> None:
        super().__init__()
        self.regularizer = regularizer

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, height, width]`."""
        deviation = (images - images.mean(dim=(-2, -1), keepdim=True)).square()
        pixels = images.shape[-2] * images.shape[-1]
        variance = deviation.sum(dim=(-2, -1), keepdim=True) / (pixels - 1)
        return images * torch.sigmoid(deviation / (4 * (variance + self.regularizer)) + 0.5)
