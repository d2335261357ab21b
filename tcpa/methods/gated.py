"""Gated prompts: VPT-Shallow with a gate after every block and a temperature in it.

Axes: B batch, P prompt tokens, C width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import require_int, require_number
from .base import Choices, Modules, PromptConfig
from .modules import PromptSource
from .vpt import drop_elements, init_tokens

TEMPERATURES = (0.01, 10.0)
"""Range of the temperatures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedPromptConfig(PromptConfig):
    """VPT-Shallow whose prompts a gate per block mixes with what the block made of them, and a
    temperature per block for the attention (Yoo et al., ICML 2023)."""

    name: ClassVar[str] = "gated"

    length: int = 100
    """Prompt tokens."""

    gate_init: float = 10.0
    """The gates start from sigmoid(-gate_init), so that blocks hardly change the prompts."""

    dropout: float = 0.1
    """Probability with which training zeroes a prompt element, per sample."""

    def __post_init__(self) -> None:
        require_int("length", self.length, 1)
        require_number("gate_init", self.gate_init, 0.0)
        require_number("dropout", self.dropout, 0.0, 1.0)

    def describe(self) -> str:
        return f"{self.length} with gates"

    def build(self, backbone: Any, choices: Choices) -> Modules:
        return {"tokens": GatedPrompts(self, backbone)}


class GatedPrompts(PromptSource):
    """Prompt tokens of the first block, a gate after every block but the last, a temperature for
    every block's attention."""

    shallow = True

    def __init__(self, config: GatedPromptConfig, backbone: Any) -> None:
        super().__init__()
        self.config = config
        depth = len(backbone.blocks)
        self.prompts = nn.Parameter(torch.empty(1, config.length, backbone.embed_dim))
        self.gates = nn.Parameter(torch.empty(depth - 1))
        self.temperatures = nn.Parameter(torch.empty(depth))
        init_tokens(self.prompts, backbone)
        nn.init.constant_(self.gates, -config.gate_init)
        nn.init.ones_(self.temperatures)

    def forward(self, batch_size: int) -> Tensor:
        """Return the prompts of the first block, `[1, P, C]` or, per sample, `[1, B, P, C]`."""
        dropout, training = self.config.dropout, self.training
        return drop_elements(self.prompts, dropout, batch_size, training, shared=False)

    def query_scale(self, index: int) -> Tensor:
        """Return what a block's queries are multiplied by, a scalar: 1 / temperature."""
        return 1 / self.temperatures[index].clamp(*TEMPERATURES)

    def after_block(self, index: int, before: Tensor, after: Tensor, num_tokens: int) -> Tensor:
        """Mix the prompts before and after a block, but for the last."""
        if index == len(self.gates):
            return after
        gate = torch.sigmoid(self.gates[index]).to(after.dtype)
        mixed = gate * after[:, num_tokens:] + (1 - gate) * before[:, num_tokens:]
        return torch.cat((after[:, :num_tokens], mixed), dim=1)
