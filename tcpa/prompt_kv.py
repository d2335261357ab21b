"""Keys and values of the prompts of all blocks, computed outside the blocks.

Axes: N blocks, B batch, P prompt rows of a block, H heads, D head dim, C width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import blocks
from .dispatch import autocast_dtype

T = TypeVar("T")


class PromptKV(NamedTuple):
    """Keys and values of one block's prompts, each `[P, H, D]` or `[B, P, H, D]`."""

    keys: Tensor
    values: Tensor

    def with_keys(self, extra: Tensor) -> "PromptKV":
        """Add prompts `[P', H, D]` that are their own keys and values."""
        extra = extra.to(self.keys.dtype)
        extra = extra if self.keys.ndim == 3 else extra.expand(len(self.keys), -1, -1, -1)
        keys, values = (torch.cat((given, extra), dim=-3) for given in self)
        return PromptKV(keys, values)


def prompt_keys_values(
    block: blocks.ModuleLike, prompts: Tensor, value_affine: nn.Module | None
) -> PromptKV:
    """Project raw prompts `[P, C]` or `[B, P, C]` to the keys and values of a block."""
    normed = block.norm1(prompts.to(block.norm1.weight.dtype))
    keys, values = blocks.project_keys_values(block.attn, normed)
    return PromptKV(keys, values if value_affine is None else value_affine(values))


@dataclass(frozen=True, slots=True)
class StackedProjections:
    """Norms and projections of all blocks in one tensor each, copied from frozen parameters.

    The prompts of a block are a few rows; one product for all blocks takes less than a quarter of
    the time of one a block (12 of 36 x 768 x 1536 with their gradient on 2 CPU cores: float32 88 ms
    against 330, bfloat16 84 against 716; medians of 15, interleaved, on a busy machine).
    """

    norm_weight: Tensor
    """`[N, 1, C]`."""
    norm_bias: Tensor
    """`[N, 1, C]`."""
    eps: float
    weight: Tensor
    """`[N, C, 2 H D]`: keys, then values."""
    bias: Tensor
    """`[N, 1, 2 H D]`."""

    @torch.no_grad()
    @staticmethod
    def of(layers: Sequence[blocks.ModuleLike]) -> "StackedProjections | None":
        """Copy what the blocks hold; None unless all of it is frozen and alike.

        Under autocast the copy has the dtype in which products are computed.
        """
        if any(p.requires_grad for block in layers for p in block.attn.parameters()):
            return None
        found = [blocks.frozen_layer_norm(block) for block in layers]
        norms = [norm for norm in found if norm is not None and norm.bias is not None]
        parts = [blocks.key_value_parameters(block.attn) for block in layers]
        alike = len({weight.shape for weight, _ in parts} | {norm.eps for norm in norms}) == 2
        if len(norms) < len(found) or not alike:
            return None
        dtype = parts[0][0].dtype
        if dtype != torch.float64:
            dtype = autocast_dtype(parts[0][0].device) or dtype
        return StackedProjections(
            torch.stack([norm.weight for norm in norms])[:, None],
            torch.stack([norm.bias for norm in norms])[:, None],
            norms[0].eps,
            torch.stack([weight.to(dtype) for weight, _ in parts]).mT,
            torch.stack([bias.to(dtype) for _, bias in parts])[:, None],
        )

    def project(
        self,
        layers: Sequence[blocks.ModuleLike],
        prompts: Tensor,
        value_affine: nn.Module | None,
    ) -> list[PromptKV]:
        """Project the raw prompts of all blocks, `[N, P, C]`."""
        exact = prompts.to(torch.promote_types(prompts.dtype, torch.float32))
        normed = F.layer_norm(exact, exact.shape[-1:], None, None, self.eps)
        normed = normed * self.norm_weight + self.norm_bias
        flat = torch.baddbmm(self.bias, normed.to(self.weight.dtype), self.weight)
        found = []
        for block, both in zip(layers, flat.unflatten(-1, (2, -1)), strict=True):
            keys, values = (blocks.split_heads(block.attn, one) for one in both.unbind(-2))
            values = values if value_affine is None else value_affine(values)
            found.append(PromptKV(block.attn.k_norm(keys), values))
        return found


class ParameterCache(Generic[T]):
    """Something computed from parameters, kept while they do not change."""

    def __init__(self) -> None:
        self._state: object = None
        self._kept: T | None = None

    def clear(self) -> None:
        """Forget everything."""
        self._state, self._kept = None, None

    def get(self, sources: Sequence[nn.Module | None], compute: Callable[[], T]) -> T:
        """Return what is kept, computing it if a parameter of `sources` changed.

        Changes are seen by torch's version counters, which edits through `.data` do not touch; the
        model clears the cache when it is moved, converted or switched to training or evaluation.
        """
        modules = [module for module in sources if module is not None]
        state = self._identify([t for m in modules for t in (*m.parameters(), *m.buffers())])
        if state is None:
            return compute()
        if state != self._state:
            self._state, self._kept = state, compute()
        return cast(T, self._kept)

    @staticmethod
    def _identify(parameters: list[Tensor]) -> object:
        # Parameters made under inference_mode have no version counter: nothing can be kept.
        if any(p.is_inference() for p in parameters):
            return None
        precision = autocast_dtype(parameters[0].device)
        # Tensors made in inference mode must not be used outside it.
        mode = torch.is_inference_mode_enabled()
        return (mode, precision, [(id(p), p.data_ptr(), p.dtype, p._version) for p in parameters])
