"""What one step of a prompted ViT computes, and the units of its cost model (`model.py`)."""

import math
from dataclasses import dataclass, field
from typing import Literal

from tcpa import AutoVPConfig, DAMVPConfig, InputConfig, Savings, VPConfig

from ..harness.case import BACKBONES, Backbone
from .operations import ITEM, Cost

Method = Literal["tcpa", "vpt-deep", "vfpt", "linear"]
Direction = Literal["forward", "backward", "update"]

MLP_RATIO = 4
CHANNELS = 3
IMAGE_PROMPT_HIDDEN, IMAGE_PROMPT_KERNEL, IMAGE_PROMPT_TRAINED = 9, 11, 6547
"""Sizes of `ConvImagePrompt`: 11 x 11 convolutions 3 -> 9 -> 3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Sizes of a step and the form in which it is computed."""

    method: Method = "tcpa"
    vit: Backbone = BACKBONES["b16"]
    patches: int = 196
    """Patches of an image; with the prefix tokens they are the L tokens."""
    prompts: int = 36
    """P, prompt rows of a block, both pools together; 0 for a linear probe."""
    entries: int | None = None
    """R, keys that TCPA matches a token with; P when absent (one row an entry)."""
    batch: int = 128
    """Images a step and GPU."""
    dtype: str = "bf16"
    per_sample: bool = False
    """Whether training gives every sample its own prompts, as prompt dropout does."""
    classes: int = 200
    image_prompt: bool = False
    """With TCPA's convolutional prompt."""
    input_prompt: InputConfig | None = None
    """What else is done to the image: frames (VP, DAM-VP) or a border (AutoVP)."""
    savings: Savings = field(default_factory=Savings)

    @property
    def tokens(self) -> int:
        """L, tokens of an image."""
        return self.vit.prefix + self.patches

    @property
    def keys(self) -> int:
        """R, keys of a block's pools; 0 where nothing is matched."""
        if self.method != "tcpa":
            return 0
        return self.prompts if self.entries is None else self.entries

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return ITEM[self.dtype]

    @property
    def pixels(self) -> int:
        """Pixels of a channel of an image."""
        return self.patches * self.vit.patch**2

    @property
    def trained(self) -> int:
        """Number of trained values: prompts, keys, prompts on the image and head."""
        rows = self.vit.depth * (self.prompts + self.keys)
        image = IMAGE_PROMPT_TRAINED * self.image_prompt + self.border_trained
        return rows * self.vit.width + (self.vit.width + 1) * self.classes + image

    @property
    def border(self) -> int:
        """Pixels of a channel of an image that `input_prompt` trains: around the image inside."""
        side, config = math.isqrt(self.pixels), self.input_prompt
        if isinstance(config, VPConfig):
            return self.pixels - (side - 2 * config.width_on(side)) ** 2
        if isinstance(config, AutoVPConfig):
            return self.pixels - config.size_on(side) ** 2
        return 0

    @property
    def border_trained(self) -> int:
        """Number of trained values of `input_prompt`: AutoVP keeps those below the image, too."""
        config, values = self.input_prompt, CHANNELS * self.border
        if isinstance(config, DAMVPConfig):
            return (config.num_clusters or 1) * values
        return CHANNELS * self.pixels if isinstance(config, AutoVPConfig) else values

    @property
    def image_gradient(self) -> bool:
        """Whether the tokens of the first block have a gradient."""
        saved = self.savings
        on_image = self.image_prompt or self.input_prompt is not None
        return on_image or not (saved.frozen_backbone and saved.skip_input_gradient)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a step."""

    name: str
    block: int | None
    """Number of the block, from 0; None outside the blocks."""
    direction: Direction
    cost: Cost
    repeated: float = 0.0
    """FLOPs of `cost` that make results of the forward pass again."""


def linear(rows: float, inputs: int, outputs: int, item: int) -> Cost:
    """Return the work of `[rows, inputs] @ [inputs, outputs]`; dX = dY W^T costs the same."""
    moved = rows * inputs + rows * outputs + inputs * outputs
    return Cost(2.0 * rows * inputs * outputs, float(item * moved))


def weight_gradient(rows: float, inputs: int, outputs: int, item: int) -> Cost:
    """Return the work of dW = X^T dY, added to a float32 gradient that is kept."""
    return linear(rows, inputs, outputs, item) + Cost(0.0, 8.0 * inputs * outputs)


def total(operations: list[Operation]) -> Cost:
    """Return the work of operations together."""
    return Cost(sum(o.cost.flops for o in operations), sum(o.cost.bytes for o in operations))
