"""The exact savings: which work a model leaves out."""

from dataclasses import dataclass
from typing import Self

from .checks import require_bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Savings:
    """Work that the model leaves out without changing what it computes; each can be switched off.

    Every saving equals the plain form to 1e-12 in float64. With all of them off the model does what
    the official code does, at its cost.
    """

    frozen_backbone: bool = True
    """Compute no weight gradients of the backbone."""

    prompt_keys_only: bool = True
    """Prompts have keys and values, but no query, attention row or MLP (their outputs are
    unused)."""

    prompt_kv_once: bool = True
    """Project the prompts of all blocks outside the blocks: once a batch when the batch shares
    them, once a model when nothing is trained, instead of once a sample in every block."""

    prompt_kv_stacked: bool = True
    """Where they are projected once, and alike, do it with one product for all blocks."""

    last_block_head_rows: bool = True
    """The last block computes only the tokens that the head reads."""

    skip_input_gradient: bool = True
    """Compute no token gradients in the first block, unless the image is prompted."""

    gate_bits: bool = True
    """Keep the selection as one bit per prompt, never as a dense `[B, H, L, S]` mask."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            require_bool(name, getattr(self, name))

    @classmethod
    def none(cls) -> Self:
        """Return the plain computation."""
        return cls(**dict.fromkeys(cls.__slots__, False))
