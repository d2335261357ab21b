"""Keys and values of the prompts of all blocks, computed outside the blocks.

Axes: N blocks, B batch, P prompt rows of a block, H heads, D head dim, C width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import PromptKV, key_value_parameters, prompt_keys_values, split_heads
from .dispatch import autocast_dtype
from .methods.modules import PromptSource
from .vit import ModuleLike, frozen_layer_norm

T = TypeVar("T")


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
    def of(layers: Sequence[ModuleLike]) -> "StackedProjections | None":
        """Copy what the blocks hold; None unless all of it is frozen and alike.

        Under autocast the copy has the dtype in which products are computed.
        """
        if any(p.requires_grad for block in layers for p in block.attn.parameters()):
            return None
        found = [frozen_layer_norm(block) for block in layers]
        norms = [norm for norm in found if norm is not None and norm.bias is not None]
        parts = [key_value_parameters(block.attn) for block in layers]
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
        layers: Sequence[ModuleLike],
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
            keys, values = (split_heads(block.attn, one) for one in both.unbind(-2))
            values = values if value_affine is None else value_affine(values)
            found.append(PromptKV(block.attn.k_norm(keys), values))
        return found


class ParameterCache(Generic[T]):
    """Something computed from parameters, kept while they do not change."""

    def __init__(self) -> None:
        self._state: object = None
        self._kept: T | None = None

    def clear(self) -> None:
        """Drop what is kept."""
        self._state, self._kept = None, None

    def get(self, sources: Sequence[nn.Module | None], compute: Callable[[], T]) -> T:
        """Return what is kept, computing it if a parameter of `sources` changed.

        Changes are seen by torch's version counters, which edits through `.data` do not touch; the
        model clears the cache when it is moved, converted or switched to training or evaluation.
        """
        # By hand: torch's iterators over parameters take thousands of calls.
        modules, tensors = list(sources), []
        for module in modules:
            if module is not None:
                modules.extend(module._modules.values())
                tensors.extend(module._parameters.values())
                tensors.extend(module._buffers.values())
        found = [tensor for tensor in tensors if tensor is not None]
        state: list[object] = []
        for tensor in found:
            if tensor.is_inference():
                # Such tensors have no version counter: nothing can be kept.
                return compute()
            state.append((id(tensor), tensor.data_ptr(), tensor.dtype, tensor._version))
        # Tensors made in inference mode must not be used outside it.
        state += [torch.is_inference_mode_enabled(), autocast_dtype(found[0].device)]
        if state != self._state:
            self._state, self._kept = state, compute()
        return cast(T, self._kept)


class PromptProjector:
    """Computes keys and values of the prompts of all blocks, and keeps what will be used again."""

    def __init__(self) -> None:
        self._kv = ParameterCache[list[PromptKV]]()
        self._stack = ParameterCache[StackedProjections | None]()

    def clear(self) -> None:
        """Drop what is kept."""
        self._kv.clear()
        self._stack.clear()

    def project(
        self,
        layers: Sequence[ModuleLike],
        source: PromptSource,
        value_affine: nn.Module | None,
        batch_size: int,
        *,
        stacked: bool,
    ) -> list[PromptKV]:
        """Return keys and values block by block.

        Args:
            layers: the timm blocks.
            source: gives the prompts.
            value_affine: module applied to their values.
            batch_size: B.
            stacked: project with one product for all blocks where that is possible.
        """
        projections = [module for block in layers for module in (block.norm1, block.attn)]
        # A compiler has no use for what is kept from call to call.
        compiling = torch.compiler.is_compiling()
        repeated = source.training or torch.is_grad_enabled()

        def compute() -> list[PromptKV]:
            prompts, stack = source(batch_size), None
            if stacked and repeated and prompts.ndim == 3 and not compiling:
                stack = self._stack.get(projections, lambda: StackedProjections.of(layers))
            if stack is not None:
                found = stack.project(layers, prompts, value_affine)
            else:
                pairs = zip(layers, prompts, strict=True)
                found = [prompt_keys_values(one, rows, value_affine) for one, rows in pairs]
            extra = source.extra_keys()
            if extra is None:
                return found
            return [kv.with_keys(keys) for kv, keys in zip(found, extra, strict=True)]

        if repeated or compiling:
            return compute()
        return self._kv.get([source, value_affine, *projections], compute)
