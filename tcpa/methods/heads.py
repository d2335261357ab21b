"""Heads: a linear one, or one of several layers, and their initial values.

Sources: the VPT repository (KMnP/vpt, commit 4410440) and ShoufaChen/AdaptFormer.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import require_choice, require_int, require_number
from .base import TuningConfig

HEADS = ("linear", "prior", "normed")

PRIOR = 0.01
"""Probability that every class starts with under the "prior" head: biases are -log 99."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadTuning(TuningConfig):
    """Train the classification head; nothing of the backbone."""

    name: ClassVar[str] = "head"

    head: Literal["linear", "prior", "normed"] = "linear"
    """"linear": a linear layer as torch initialises it (TCPA). "prior": Kaiming-normal weights and
    biases -log 99 (VPT). "normed": batch normalisation without parameters, then a linear layer with
    truncated normal weights of 0.01 (AdaptFormer). A head that the model already has and keeps is
    not initialised."""

    def __post_init__(self) -> None:
        require_choice("head", self.head, HEADS)

    @property
    def plain_head(self) -> bool:
        return self.head == "linear"

    @property
    def needs_own_head(self) -> bool:
        return self.head == "normed"

    def make_head(self, linear: nn.Module) -> nn.Module:
        if not isinstance(linear, nn.Linear):
            return linear
        if self.head == "prior":
            nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            nn.init.constant_(linear.bias, -math.log((1 - PRIOR) / PRIOR))
        if self.head == "normed":
            nn.init.trunc_normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            norm = HeadNorm(linear.in_features, eps=1e-6, affine=False)
            return nn.Sequential(norm, linear)
        return linear


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPHeadTuning(HeadTuning):
    """Train a head of several layers: (linear, ReLU, batch norm, dropout), then linear."""

    name: ClassVar[str] = "mlp-head"

    head: Literal["linear", "prior", "normed"] = "prior"
    """Initial values of the last layer; "normed" would normalise what is normalised already."""

    hidden_layers: int = 2
    """Layers of the backbone's width before the last one. MLP-3 is 2: three layers in all (whether
    the paper counts so cannot be told from its code)."""

    dropout: float = 0.1
    """After each hidden layer."""

    def __post_init__(self) -> None:
        require_choice("head", self.head, ("linear", "prior"))
        require_int("hidden_layers", self.hidden_layers, 1)
        require_number("dropout", self.dropout, 0.0, 1.0)

    @property
    def plain_head(self) -> bool:
        return False

    @property
    def needs_own_head(self) -> bool:
        return True

    def make_head(self, linear: nn.Module) -> nn.Module:
        last = HeadTuning.make_head(self, linear)
        if not isinstance(last, nn.Linear):
            return last
        width, layers = last.in_features, []
        for _ in range(self.hidden_layers):
            hidden = nn.Linear(width, width)
            nn.init.kaiming_normal_(hidden.weight, mode="fan_out")
            layers += [hidden, nn.ReLU(), HeadNorm(width), nn.Dropout(self.dropout)]
        return nn.Sequential(*layers, last)


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
