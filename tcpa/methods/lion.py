"""LION: equilibrium layers that prompt the image and the feature, with their exact gradient.

An equilibrium is a state that a contraction maps to itself:

    z = tanh(W z + injection),   |W| bounded so that a step brings two states together

W is scaled so that its largest sum of absolute values per output is at most `contraction`; tanh
changes at most as fast as its argument. The layers themselves are our choice; see `LIONConfig`.

Axes: B batch, C width, h hidden channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import vit
from ..checks import require, require_int, require_number
from .base import Choices, InputConfig, Modules, require_one_head
from .modules import InputPrompt

GRID = 8
"""Side of the averaged image that the prompt of the feature is made from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LIONConfig(InputConfig):
    """LION (AAAI 2024): an equilibrium layer that prompts the image, and one that prompts the
    feature before the head.

    Unverified: no code is public and the paper's equations were not at hand; what is built is what
    its abstract says, with layers of our choice (see `equilibrium`).
    """

    name: ClassVar[str] = "lion"

    hidden: int = 64
    """Channels of the equilibrium of the feature."""

    kernel_size: int = 3
    """Side of the convolutions of the equilibrium of the image, pixels, odd."""

    contraction: float = 0.5
    """Largest factor by which a step of the iteration brings two states together; the equilibrium
    then exists and is unique."""

    iterations: int = 24
    """Steps to the equilibrium, and as many for its gradient: the error is below contraction **
    iterations."""

    critical_share: float = 1.0
    """Share of the values of each prompt parameter that training updates, those with the largest
    |value * gradient| in a step; the others are only decayed. 1: all of them."""

    def __post_init__(self) -> None:
        require_int("hidden", self.hidden, 1)
        require_int("kernel_size", self.kernel_size, 1)
        require(self.kernel_size % 2 == 1, "kernel_size", self.kernel_size, "odd", "add 1")
        require_number("contraction", self.contraction, 0.0, 1.0)
        require_int("iterations", self.iterations, 1)
        require_number("critical_share", self.critical_share, 0.0)
        top = self.critical_share <= 1
        require(top, "critical_share", self.critical_share, "a share from 0 to 1", "lower it")

    def why_not_compiled(self) -> str | None:
        return "equilibrium layers, whose gradient no compiler follows"

    def validate(self, backbone: Any, choices: Choices) -> None:
        require_one_head(backbone, "tuning", "one feature to blend", "use one with one head")

    def build(self, backbone: Any, choices: Choices) -> Modules:
        channels, width = vit.input_channels(backbone), backbone.embed_dim
        return {
            "input_prompt": EquilibriumImagePrompt(self, channels),
            "feature_prompt": EquilibriumFeaturePrompt(self, channels, width),
        }


def equilibrium(step: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Tensor:
    """Return the state that `step` maps to itself, differentiable in what `step` reads.

    The gradient is that of the equilibrium, by the implicit function theorem, not that of the
    iteration: nothing of the iteration is kept. Its linear equation is solved by as many steps.

    Args:
        step: a contraction.
        start: where to begin; any state of the right shape.
        iterations: number of steps.
    """
    with torch.no_grad():
        state = start
        for _ in range(iterations):
            state = step(state)
    if not torch.is_grad_enabled():
        return state
    result = step(state)
    if not result.requires_grad:
        return result
    point = state.detach().requires_grad_()
    again = step(point)

    def solve(grad: Tensor) -> Tensor:
        solution = grad
        for _ in range(iterations):
            (moved,) = torch.autograd.grad(again, point, solution, retain_graph=True)
            solution = grad + moved
        return solution

    result.register_hook(solve)
    return result


def contracted(weight: Tensor, contraction: float) -> Tensor:
    """Scale a weight `[out, ...]` so that absolute values sum to `contraction` per output at
    most."""
    sums = weight.abs().flatten(1).sum(1).view(-1, *[1] * (weight.ndim - 1))
    return weight * (contraction / sums.clamp_min(contraction))


class EquilibriumImagePrompt(InputPrompt):
    """Add to the image the equilibrium of two convolutions of image and state; nothing at first."""

    def __init__(self, config: LIONConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        size = config.kernel_size
        self.state = nn.Conv2d(channels, channels, size, padding="same", bias=False)
        self.inject = nn.Conv2d(channels, channels, size, padding="same")
        self.state.reset_parameters()
        nn.init.zeros_(self.inject.weight)
        if self.inject.bias is not None:
            nn.init.zeros_(self.inject.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, H, W]`."""
        x = images.to(self.inject.weight.dtype)
        injected = self.inject(x)
        weight = contracted(self.state.weight, self.config.contraction)

        def step(state: Tensor) -> Tensor:
            return torch.tanh(F.conv2d(state, weight, padding="same") + injected)

        prompt = equilibrium(step, torch.zeros_like(injected), self.config.iterations)
        return (x + prompt).to(images.dtype)


class EquilibriumFeaturePrompt(nn.Module):
    """Add to the feature the equilibrium of a layer that reads the image and the feature; nothing
    at first."""

    def __init__(self, config: LIONConfig, channels: int, width: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.state = nn.Linear(hidden, hidden, bias=False)
        self.inject_image = nn.Linear(channels * GRID * GRID, hidden)
        self.inject_feature = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width)
        for layer in (self.state, self.inject_image, self.inject_feature):
            layer.reset_parameters()
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """Map features `[B, C]` of images `[B, 3, H, W]`."""
        dtype = self.out.weight.dtype
        small = F.adaptive_avg_pool2d(images.to(dtype), GRID).flatten(1)
        injected = self.inject_image(small) + self.inject_feature(features.to(dtype))
        weight = contracted(self.state.weight, self.config.contraction)

        def step(state: Tensor) -> Tensor:
            return torch.tanh(F.linear(state, weight) + injected)

        state = equilibrium(step, torch.zeros_like(injected), self.config.iterations)
        return features + self.out(state)
