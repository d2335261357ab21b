"""Who computes prompt matching in the race: this library and the official algorithm.

Every provider of `match_prompts` returns a selection and its distance, and the gradients of the
tokens and of both pools' keys; those of `norm_match` also the normed tokens. A selection may be a
gate of bits or the official mask; it is held against the float64 similarities, distance and
gradients against the reference for that selection, so that two prompts equally near are no error.

Axes: B batch, H heads, L tokens, C width, P pool entries = prompt rows.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import match_prompts, norm_match
from ...reference import (
    build_gate,
    cosine_similarity,
    match_prompts_reference,
    pack_gate,
    split_gate,
)
from ..harness.case import DTYPES, Shape
from ..harness.check import WrongResultError, compare
from ..harness.provider import (
    Outputs,
    Prepared,
    Provider,
    Tensors,
    compiled,
    no_kernels,
)

EPS = 1e-6
"""Of the LayerNorm, as in timm's ViT."""


class MatchCase:
    """Inputs of prompt matching, or of LayerNorm and matching, and the truth about them."""

    names = ("x", "cls_keys", "image_keys")

    def __init__(self, norm: bool, shape: Shape, dtype: str, device: torch.device) -> None:
        """Draw inputs, the same ones every time; `norm` is for `norm_match`."""
        vit, size = shape.vit, (shape.batch, shape.tokens, shape.vit.width)
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, device=device, generator=generator)

        self.norm, self.shape, self.dtype = norm, shape, DTYPES[dtype]
        exact = torch.promote_types(self.dtype, torch.float32)
        # A mean, so that LayerNorm has something to do.
        x = (draw(*size) + 0.5).to(self.dtype)
        self.tensors = (x, *(draw(pool, vit.width).to(exact) for pool in shape.pools))
        # Frozen, like the rest of the backbone.
        self.weight, self.bias = (draw(vit.width).to(self.dtype) for _ in range(2))
        self.upstream_norm = draw(*size).to(self.dtype)
        # The mean over all tokens makes small gradients; this brings them to those of the norm.
        self.upstream_distance = torch.tensor(
            0.5 * shape.batch * shape.tokens, dtype=exact, device=device
        )
        self.settings: dict[str, Any] = {
            "cls_top_k": shape.top_k[0],
            "image_top_k": shape.top_k[1],
            "num_prefix_tokens": vit.prefix,
        }

    @property
    def upstream(self) -> Outputs:
        """Gradients of the normed tokens (`norm_match`) and of the distance."""
        norm = (self.upstream_norm,) if self.norm else ()
        return (*norm, self.upstream_distance)

    def leaves(self, training: bool) -> Outputs:
        """Return tokens and keys, with gradients if wanted."""
        return tuple(t.detach().requires_grad_(training) for t in self.tensors)

    def layer_norm(self, x: Tensor) -> Outputs:
        """Return the normed tokens, in `norm_match`."""
        if not self.norm:
            return ()
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return (F.layer_norm(x, x.shape[-1:], weight, bias, EPS),)

    def read(self, outputs: Outputs, grads: Outputs) -> Tensors:
        """Name (normed), distance, gate and gradients."""
        found: Tensors = dict(zip(("distance", "gate"), outputs[-2:], strict=True))
        if self.norm:
            found["normed"] = outputs[0]
        return found | (dict(zip(self.names, grads, strict=True)) if grads else {})

    def check(self, provider: Provider, found: Tensors, training: bool) -> None:
        """Raise WrongResultError unless these are the results of the provider's function."""
        gate = None
        if provider.same_function:
            gate = found["gate"]
            self.check_selection(gate)
        exact = self._reference(torch.float64, gate)
        plain = self._reference(self.dtype, gate)
        if not training:
            exact = {name: exact[name] for name in exact if name not in self.names}
        compare(found, exact, plain)

    def check_selection(self, gate: Tensor) -> None:
        """Raise WrongResultError unless every token sees its nearest prompts and nothing else."""
        shape = self.shape
        if gate.dtype != torch.int32 or gate.shape[:2] != self.tensors[0].shape[:2]:
            raise WrongResultError(f"gate: got {gate.dtype} {list(gate.shape)}, expected int32")
        selections = split_gate(gate, shape.pools, (1, 1), shape.vit.prefix)
        if not torch.equal(build_gate(*selections, (1, 1)), gate):
            raise WrongResultError("gate: a token sees prompts of the other pool")
        x, *keys = (t.double() for t in self.tensors)
        rows = x[:, : shape.vit.prefix], x[:, shape.vit.prefix :]
        # Four times the bound on the error of a similarity in float32 with sums in any order.
        margin = 4 * (shape.vit.width / 8 + 40) * 2.0**-24
        for selected, tokens, pool, top_k in zip(selections, rows, keys, shape.top_k, strict=True):
            if not bool((selected.sum(-1) == top_k).all()):
                raise WrongResultError(f"gate: a token does not see {top_k} prompts of its pool")
            if 0 < top_k < len(pool):
                similarity = cosine_similarity(tokens, pool)
                last = similarity.topk(top_k, dim=-1).values[..., -1:]
                farther = selected & (similarity < last - margin)
                if bool(farther.any()):
                    raise WrongResultError(
                        "gate: a token sees a prompt that is not among its nearest"
                    )

    def _reference(self, dtype: torch.dtype, gate: Tensor | None) -> Tensors:
        """Return the results for a given selection; without one those of the norm alone."""
        x, *keys = self.leaves(True)
        x = x.detach().to(dtype).requires_grad_()
        if dtype == torch.float64:
            keys = [key.detach().double().requires_grad_() for key in keys]
        outputs, leaves = self.layer_norm(x), (x, *keys)
        upstream = self.upstream
        if gate is None:
            grads = torch.autograd.grad(outputs, x, upstream[0].to(dtype))
            return {"normed": outputs[0].detach(), "x": grads[0]}
        _, distance = match_prompts_reference(x, *keys, gate=gate, **self.settings)
        outputs = (*outputs, distance)
        wanted = tuple(g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True))
        grads = torch.autograd.grad(outputs, leaves, wanted)
        found = self.read((*(o.detach() for o in outputs), gate), grads)
        del found["gate"]
        return found

    def clear_cache(self) -> None:
        """Nothing is kept beyond `check`."""


def _prepared(
    case: MatchCase, training: bool, function: Callable[..., Outputs], read: Any = None
) -> Prepared:
    """Prepare `function(x, cls_keys, image_keys) -> (normed,) distance, selection`."""
    leaves = case.leaves(training)
    return Prepared(
        forward=lambda: function(*leaves),
        leaves=leaves,
        upstream=case.upstream,
        read=read or case.read,
    )


# The official algorithm ---------------------------------------------------------------------------


def _official(
    x: Tensor, cls_keys: Tensor, image_keys: Tensor, prefix: int, top_k: tuple[int, int], heads: int
) -> Outputs:
    """Return the distance, and the mask `[B, H, L, L + P]` that attention multiplies by.

    Similarities are float32, as the reference's: in half precision, as under its autocast, it would
    select other prompts.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    unit = F.normalize(x.to(dtype), dim=-1)
    distances, masks = [], []
    pools = ((unit[:, :prefix], cls_keys), (unit[:, prefix:], image_keys))
    for (tokens, keys), k in zip(pools, top_k, strict=True):
        similarity = tokens @ F.normalize(keys, dim=-1).mT
        nearest = similarity.topk(k, dim=-1).indices
        chosen = 1 - similarity.gather(-1, nearest)
        distances.append(chosen.sum() / max(chosen.numel(), 1))
        masks.append(torch.zeros_like(similarity).scatter(-1, nearest, 1.0))
    # Of the other pool a token sees nothing.
    cls_mask = F.pad(masks[0], (0, len(image_keys)))
    prompts = torch.cat((cls_mask, F.pad(masks[1], (len(cls_keys), 0))), dim=1)
    batch, tokens = x.shape[:2]
    all_tokens = torch.ones(1, 1, tokens, tokens, dtype=dtype, device=x.device)
    mask = torch.cat(
        (all_tokens.repeat(batch, heads, 1, 1), prompts[:, None].repeat(1, heads, 1, 1)), dim=-1
    )
    return distances[0] + distances[1], mask.detach()


def _prepare_official(
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]], case: MatchCase, training: bool
) -> Prepared:
    vit, top_k = case.shape.vit, case.shape.top_k

    def function(x: Tensor, cls_keys: Tensor, image_keys: Tensor) -> Outputs:
        found = _official(x, cls_keys, image_keys, vit.prefix, top_k, vit.heads)
        return *case.layer_norm(x), *found

    def read(outputs: Outputs, grads: Outputs) -> Tensors:
        *others, mask = outputs
        gate = pack_gate(mask[:, 0, :, case.shape.tokens :] > 0)
        return case.read((*others, gate), grads)

    return _prepared(case, training, wrap(function), read)


# Floor and ours -----------------------------------------------------------------------------------


def _prepare_layer_norm(case: MatchCase, training: bool) -> Prepared:
    leaves = case.leaves(training)[:1]
    return Prepared(
        forward=lambda: case.layer_norm(leaves[0]),
        leaves=leaves,
        upstream=case.upstream[:1],
        read=lambda outputs, grads: {"normed": outputs[0]} | ({"x": grads[0]} if grads else {}),
    )


def _prepare_ours(
    impl: Literal["reference", "triton"], case: MatchCase, training: bool
) -> Prepared:
    def function(x: Tensor, *keys: Tensor) -> Outputs:
        if not case.norm:
            gate, distance = match_prompts(x, *keys, impl=impl, **case.settings)
            return distance, gate
        affine = (case.weight, case.bias, EPS)
        normed, gate, distance = norm_match(x, *affine, *keys, impl=impl, **case.settings)
        return normed, distance, gate

    return _prepared(case, training, function)


MATCH_PROVIDERS: tuple[Provider, ...] = (
    Provider(
        name="official",
        role="official",
        prepare=functools.partial(_prepare_official, lambda function: function),
    ),
    Provider(
        name="official, compiled",
        role="official",
        prepare=functools.partial(_prepare_official, compiled),
    ),
    Provider(
        name="tcpa reference", role="ours", prepare=functools.partial(_prepare_ours, "reference")
    ),
    Provider(
        name="tcpa triton",
        role="ours",
        prepare=functools.partial(_prepare_ours, "triton"),
        dtypes=("bf16", "fp16", "fp32"),
        reason=no_kernels,
    ),
)
"""Of `match_prompts`."""

NORM_PROVIDERS: tuple[Provider, ...] = (
    *MATCH_PROVIDERS,
    Provider(
        name="layer norm, other function",
        role="floor",
        same_function=False,
        prepare=_prepare_layer_norm,
    ),
)
"""Of `norm_match`."""
