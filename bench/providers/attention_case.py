"""Inputs of gated attention for the race, the truth about them, and what its providers share.

Axes: B batch, H heads, L tokens, P prompt rows, S = L + P keys, D head dim.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...reference import gated_attention_reference, random_gate, unpack_gate
from ..harness.case import DTYPES, Shape
from ..harness.check import compare
from ..harness.provider import Outputs, Prepared, Provider, Tensors


class AttentionCase:
    """Inputs of gated attention and the truth about them."""

    names = ("q", "k", "v", "k_prompt", "v_prompt")

    def __init__(
        self, shape: Shape, dtype: str, device: torch.device, *, gate: Tensor | None = None
    ) -> None:
        """Draw inputs, the same ones every time; `gate` replaces the random one."""
        vit, batch, tokens, prompts = shape.vit, shape.batch, shape.tokens, shape.prompts
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            drawn = torch.randn(size, device=device, generator=generator)
            return drawn.to(DTYPES[dtype])

        self.shape, self.dtype = shape, DTYPES[dtype]
        self._truth: dict[bool, tuple[Tensors, Tensors]] = {}
        self.scale = vit.head_dim**-0.5
        q, k, v = draw(batch, tokens, 3, vit.heads, vit.head_dim).unbind(2)
        own = (batch,) if shape.per_sample else ()
        k_prompt, v_prompt = draw(2, *own, prompts, vit.heads, vit.head_dim)
        self.tensors = (q, k, v, k_prompt, v_prompt)
        self.upstream = draw(batch, tokens, vit.width)
        self.gate = gate
        if gate is None:
            self.gate = random_gate(
                batch,
                tokens,
                num_pool=shape.pools,
                top_k=shape.top_k,
                num_prefix_tokens=vit.prefix,
                device=device,
                generator=generator,
            )

    @functools.cached_property
    def visible(self) -> Tensor:
        """Bool `[B, 1, L, P]`: which prompts a token sees."""
        assert self.gate is not None
        return unpack_gate(self.gate, self.shape.prompts)[:, None]

    def leaves(self, training: bool) -> Outputs:
        """Return q, k, v and the prompts, with gradients if wanted."""
        return tuple(t.detach().requires_grad_(training) for t in self.tensors)

    def sequence(self, training: bool) -> Outputs:
        """Return q, k and v `[B, S, H, D]` of tokens and prompts, views of one tensor.

        The queries of prompts, of which the operation knows nothing, are their keys.
        """
        q, k, v, k_prompt, v_prompt = self.tensors
        prompts = torch.stack((k_prompt, k_prompt, v_prompt), dim=-3)
        prompts = prompts.expand(len(q), *prompts.shape[-4:])
        packed = torch.cat((torch.stack((q, k, v), dim=2), prompts), dim=1)
        return tuple(t.detach().requires_grad_(training) for t in packed.unbind(2))

    def read_sequence(self, outputs: Outputs, grads: Outputs) -> Tensors:
        """Name the results of a call on `sequence`; queries of prompts may be there or not."""
        found = {"out": outputs[0]}
        if grads:
            tokens = self.shape.tokens
            found |= {name: g[:, :tokens] for name, g in zip("qkv", grads, strict=True)}
            for name, grad in (("k_prompt", grads[1]), ("v_prompt", grads[2])):
                own = grad[:, tokens:]
                found[name] = own if self.shape.per_sample else own.double().sum(0)
        return found

    def read(self, outputs: Outputs, grads: Outputs) -> Tensors:
        """Name the results of a call on `leaves`."""
        return {"out": outputs[0]} | (dict(zip(self.names, grads, strict=True)) if grads else {})

    def truth(self, gated: bool) -> tuple[Tensors, Tensors]:
        """Return the reference's results in float64 and in the dtype of the case."""
        if gated not in self._truth:
            dtypes = (torch.float64, self.dtype)
            exact, plain = (self._reference(dtype, gated) for dtype in dtypes)
            self._truth[gated] = exact, plain
        return self._truth[gated]

    def _reference(self, dtype: torch.dtype, gated: bool) -> Tensors:
        leaves = tuple(t.detach().to(dtype).requires_grad_() for t in self.tensors)
        gate = self.gate if gated else None
        out = gated_attention_reference(*leaves, gate=gate).flatten(2)
        grads = torch.autograd.grad(out, leaves, self.upstream.to(dtype))
        return self.read((out.detach(),), grads)

    def check(self, provider: Provider, found: Tensors, training: bool) -> None:
        """Raise WrongResultError unless these are the results of the provider's function."""
        exact, plain = self.truth(provider.same_function)
        names = exact if training else ("out",)
        compare(found, {name: exact[name] for name in names}, plain)

    def clear_cache(self) -> None:
        """Free what only `check` needs."""
        self._truth.clear()


def rows(out: Tensor) -> Tensor:
    """Turn `[B, H, L, D]` into what the projection takes, `[B, L, H * D]`."""
    return out.transpose(1, 2).flatten(2)


def heads(*tensors: Tensor) -> Outputs:
    """Turn `[..., L, H, D]` into `[..., H, L, D]`."""
    return tuple(t.transpose(-3, -2) for t in tensors)


def prepared(case: AttentionCase, training: bool, attend: Callable[..., Tensor]) -> Prepared:
    """Prepare `attend(q, k, v, k_prompt, v_prompt) -> [B, L, H * D]`."""
    leaves = case.leaves(training)
    return Prepared(
        forward=lambda: (attend(*leaves),),
        leaves=leaves,
        upstream=(case.upstream,),
        read=case.read,
    )
