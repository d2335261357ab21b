"""Adapter and AdaptFormer: bottlenecks after or beside the MLP of every block.

Sources: the VPT repository (KMnP/vpt, commit 4410440) and ShoufaChen/AdaptFormer.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import require_bool, require_int, require_number
from .base import Choices, Modules
from .heads import HeadTuning


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTuning(HeadTuning):
    """Train a bottleneck after the MLP of every block, and the head: y + U gelu(V y)."""

    name: ClassVar[str] = "adapter"

    reduction: int = 8
    """r; the bottleneck has C / r channels, at least one."""

    zero_init: bool = False
    """True, for parity: all values start from 0, as in VPT's repository, where only the biases of
    U can ever be trained. False: V starts as torch initialises it, U and its biases from 0."""

    def __post_init__(self) -> None:
        HeadTuning.__post_init__(self)
        require_int("reduction", self.reduction, 1)
        require_bool("zero_init", self.zero_init)

    def build(self, backbone: Any, choices: Choices) -> Modules:
        width = backbone.embed_dim
        hidden = max(width // self.reduction, 1)
        made = (Bottleneck(width, hidden, zero_init=self.zero_init) for _ in backbone.blocks)
        return {"adapters": nn.ModuleList(made)}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptFormerTuning(HeadTuning):
    """Train a bottleneck beside the MLP of every block, and the head: + scale U relu(V h)."""

    name: ClassVar[str] = "adaptformer"

    head: Literal["linear", "prior", "normed"] = "normed"

    bottleneck: int = 64
    """Channels between V and U."""

    scale: float = 0.1

    dropout: float = 0.1
    """Between ReLU and U."""

    def __post_init__(self) -> None:
        HeadTuning.__post_init__(self)
        require_int("bottleneck", self.bottleneck, 1)
        require_number("scale", self.scale, 0.0)
        require_number("dropout", self.dropout, 0.0, 1.0)

    def scaled_to(self, width: int, reference: int) -> Self:
        return self.replace(bottleneck=max(self.bottleneck * width // reference, 1))

    def build(self, backbone: Any, choices: Choices) -> Modules:
        made = (AdaptFormer(backbone.embed_dim, self) for _ in backbone.blocks)
        return {"adapters": nn.ModuleList(made)}


class Bottleneck(nn.Module):
    """A bottleneck of two linear layers for the tokens of one block.

    The values are kept in their own precision and used in that of the tokens.
    """

    beside_mlp = False
    """Whether the input is that of the MLP's branch; otherwise it is the MLP's output."""

    def __init__(self, width: int, hidden: int, *, zero_init: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        # A function that adds nothing at first.
        if zero_init:
            nn.init.zeros_(self.down.weight)
        else:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for values in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(values)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to tokens `[B, L, C]`."""
        down, up = self.down, self.up
        hidden = F.linear(x, down.weight.to(x.dtype), down.bias.to(x.dtype))
        hidden = self.activate(hidden)
        out = F.linear(hidden, up.weight.to(hidden.dtype), up.bias.to(hidden.dtype))
        return self.scaled(out).to(x.dtype)

    def activate(self, hidden: Tensor) -> Tensor:
        """Apply what is between the two layers."""
        return F.gelu(hidden)

    def scaled(self, out: Tensor) -> Tensor:
        """Weight the result."""
        return out


class AdaptFormer(Bottleneck):
    """A bottleneck beside the MLP, with dropout in it, and scaled."""

    beside_mlp = True

    def __init__(self, width: int, config: AdaptFormerTuning) -> None:
        super().__init__(width, config.bottleneck)
        self.scale, self.dropout = config.scale, config.dropout

    def activate(self, hidden: Tensor) -> Tensor:
        return F.dropout(F.relu(hidden), self.dropout, self.training)

    def scaled(self, out: Tensor) -> Tensor:
        return out * self.scale
