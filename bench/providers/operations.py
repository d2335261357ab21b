"""The operations of the race, and who computes each."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..harness.case import Shape
from ..harness.provider import Provider
from .attention import PROVIDERS
from .attention_case import AttentionCase
from .matching import MATCH_PROVIDERS, NORM_PROVIDERS, MatchCase


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of the library and who computes it."""

    name: str
    make_inputs: Callable[[Shape, str, torch.device], Any]
    providers: tuple[Provider, ...]

    def refuses(self, shape: Shape) -> str | None:
        """Say why it is not measured on a shape; None when it is."""
        if self.name == "gated_attention":
            return None
        if not shape.prompts:
            return "there are no prompts to match"
        shared = dataclasses.replace(shape, per_sample=False).name
        return f"matching is that of {shared}" if shape.per_sample else None


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("gated_attention", AttentionCase, PROVIDERS),
        Operation("match_prompts", functools.partial(MatchCase, False), MATCH_PROVIDERS),
        Operation("norm_match", functools.partial(MatchCase, True), NORM_PROVIDERS),
    )
}
