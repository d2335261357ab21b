"""Visual Prompting: a frame of trained pixels on the image.

Axes: B batch, J frames.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import vit
from ..checks import require, require_int
from .base import Choices, InputConfig, Modules
from .modules import InputPrompt

REFERENCE_SIDE = 224
"""Side of the images, pixels, for which the papers state their sizes."""

STRIPS = ("up", "down", "left", "right")


def in_proportion(pixels: int, side: int) -> int:
    """Return what `pixels` of a 224-pixel image are on an image of another side."""
    return max(round(pixels * side / REFERENCE_SIDE), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class VPConfig(InputConfig):
    """Visual Prompting (Bahng et al., 2022): a trained frame added to the normalised image."""

    name: ClassVar[str] = "vp"

    width: int | None = None
    """Width of the frame, pixels. None: 30 of 224, in proportion on other images."""

    def __post_init__(self) -> None:
        if self.width is not None:
            require_int("width", self.width, 1)

    def width_on(self, side: int) -> int:
        """Return the width of the frame on images of a side, pixels."""
        return in_proportion(30, side) if self.width is None else self.width

    def build(self, backbone: Any, choices: Choices) -> Modules:
        channels, size = vit.input_channels(backbone), image_size(backbone)
        return {"input_prompt": FramePrompt(self, channels, size)}


class FramePrompt(InputPrompt):
    """Add a frame of trained pixels to the normalised image; values start from N(0, 1)."""

    up: nn.Parameter
    down: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter

    def __init__(self, config: VPConfig, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.channels, self.size = config, channels, size
        self.width = config.width_on(min(size))
        limit = (min(size) - 1) // 2
        bound, remedy = f"at most {limit} on images of {list(size)}", "make the frame narrower"
        require(self.width <= limit, "input_prompt: width", self.width, bound, remedy)
        self._make_frames(1, None)

    def _make_frames(self, count: int, like: Tensor | None) -> None:
        (height, width), channels, border = self.size, self.channels, self.width
        shapes = {
            "up": (count, channels, border, width),
            "down": (count, channels, border, width),
            "left": (count, channels, height - 2 * border, border),
            "right": (count, channels, height - 2 * border, border),
        }
        options: dict[str, Any] = {}
        if like is not None:
            options = {"device": like.device, "dtype": like.dtype}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, **options)))
            nn.init.normal_(getattr(self, name))

    @property
    def num_frames(self) -> int:
        """J."""
        return len(self.up)

    def frames(self, index: Tensor | None = None) -> Tensor:
        """Return frames with zeros inside, `[J, 3, H, W]`, or those of an index, `[B, 3, H, W]`."""
        strips = [getattr(self, name) for name in STRIPS]
        if index is not None:
            strips = [strip[index] for strip in strips]
        up, down, left, right = strips
        inside = left.new_zeros(*left.shape[:3], self.size[1] - 2 * self.width)
        return torch.cat((up, torch.cat((left, inside, right), dim=3), down), dim=2)

    def forward(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """Add the frame, or to image b the frame `index[b]`, to images `[B, 3, H, W]`."""
        require_size(images, self.size)
        return (images + self.frames(index)).to(images.dtype)


def image_size(backbone: Any) -> tuple[int, int]:
    """Return the size of the images of a backbone, which a prompt on the image has too.

    Raises:
        ValueError: it takes images of any size.
    """
    size = getattr(backbone.patch_embed, "img_size", None)
    if size is None:
        raise ValueError(
            "input_prompt: got a backbone without image size, expected one with it; create it with "
            "img_size=..."
        )
    return tuple(size)


def require_size(images: Tensor, size: tuple[int, int]) -> None:
    """Check that images have the size of the prompt."""
    got, remedy = f"size {list(images.shape[-2:])}", "resize them"
    expected = f"{list(size)}, for which the prompt on the image was made"
    require(tuple(images.shape[-2:]) == size, "images", got, expected, remedy)
