"""What `tcpa-bench tune` measures: operations, shapes and candidate launches of every kernel.

A problem holds the tensors of one shape. It runs the public operation forward and backward, to
check a launch, and hands out the host function that launches the kernel of one operation, to time.

Axes: B batch, L tokens, P prompt rows, H heads, D head dim, R pool entries, C width.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tcpa.reference import (
    cosine_similarity,
    gated_attention_reference,
    match_prompts_reference,
    random_gate,
)

from ..kernels import gated_attention, match_prompts, norm_match
from ..kernels.attention.backward import launch_dq
from ..kernels.attention.forward import launch_forward as launch_attention
from ..kernels.attention.inputs import AttentionInputs
from ..kernels.attention.keys import launch_dkv, launch_prompt_sum
from ..kernels.launch import DEFAULT, DTYPE_CLASSES, DTYPE_NAMES, LAUNCHES, Launch
from ..kernels.matching.backward import launch_dx
from ..kernels.matching.forward import launch_forward
from ..kernels.matching.inputs import Norm, make_matching
from ..kernels.matching.keys import launch_keys_backward
from ..kernels.matching.tiles import held

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
OPERATIONS = tuple(dict.fromkeys(operation for operation, *_ in LAUNCHES))
BUCKETS = tuple(dict.fromkeys(bucket for _, _, _, bucket, _ in LAUNCHES))
PROMPT_SUM = "gated_attention_prompt_sum"
"""It adds float32 numbers whatever the dtype of the operation."""
EPS = 1e-6
# Rows whose selection hangs on less than this would fail a launch that adds in another order.
CLEAR_MARGIN = 1e-4
Results = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchRow:
    """One row to measure."""

    operation: str
    dtype: str
    """Of the row: "bf16", "fp16" or "fp32"."""
    bucket: str
    inputs: str
    """Dtype of the operation's inputs."""


def targets(
    operations: Sequence[str], dtypes: Sequence[str], buckets: Sequence[str]
) -> Iterator[LaunchRow]:
    """Yield every row of the table with these names, once."""
    rows = {(name, kind, bucket) for name, where, kind, bucket, _ in LAUNCHES if where == DEFAULT}
    for operation in operations:
        for inputs in dtypes[:1] if operation == PROMPT_SUM else dtypes:
            dtype = "fp32" if operation == PROMPT_SUM else inputs
            for bucket in buckets:
                if (operation, DTYPE_CLASSES[DTYPES[dtype]], bucket) in rows:
                    yield LaunchRow(operation=operation, dtype=dtype, bucket=bucket, inputs=inputs)


# Block sizes, warps and limits on registers. Keys go in whole gate words, 32 at least; eight warps
# never share 64 rows, whose products they would compute twice. A limit lets one more program onto a
# multiprocessor of 65536 registers (four warps: 168 or 128, eight: 128). What spills on sm_90 in
# bfloat16 with two stages, by offline compilation, is left out.
_Shape = tuple[int, ...]
_FREE = (None,)
_ATTENTION: dict[tuple[str, str], dict[_Shape, tuple[int | None, ...]]] = {
    ("gated_attention_fwd", "d64"): {
        (128, 64, 8): (None, 128),
        (64, 64, 4): (None, 168, 128),
        (128, 128, 8): _FREE,
        (64, 128, 4): _FREE,
        (128, 32, 8): (None, 128),
    },
    ("gated_attention_fwd", "d128"): {
        (64, 64, 4): (None, 168),
        (128, 64, 8): _FREE,
        (64, 32, 4): _FREE,
        (128, 32, 8): _FREE,
    },
    ("gated_attention_dq", "d64"): {
        (64, 64, 4): (None, 168),
        (128, 64, 8): _FREE,
        (128, 128, 8): _FREE,
        (64, 128, 4): _FREE,
        (128, 32, 8): (None, 128),
    },
    ("gated_attention_dq", "d128"): {
        (64, 64, 4): _FREE,
        (128, 64, 8): _FREE,
        (128, 32, 8): _FREE,
        (32, 32, 4): _FREE,
    },
    ("gated_attention_dkv", "d64"): {
        (32, 64, 4): (None, 168),
        (64, 64, 4): _FREE,
        (32, 128, 8): _FREE,
        (64, 128, 8): _FREE,
    },
    ("gated_attention_dkv", "d128"): {
        (32, 64, 4): _FREE,
        (32, 128, 8): _FREE,
        (16, 64, 4): _FREE,
    },
}
# float32 products run on the ordinary units: small blocks.
_FLOAT = dict.fromkeys(((32, 32, 4), (64, 32, 4), (32, 64, 4), (64, 64, 8)), _FREE)
# Sum over the batch: samples and columns of a block, warps.
_SUMS = dict.fromkeys(
    (
        (16, 128, 4), (8, 128, 4), (32, 128, 4), (16, 64, 4), (32, 64, 4), (8, 256, 8),
        (16, 256, 8),
    ),
    _FREE,
)  # fmt: skip
# Gradient of the keys: rows, columns and steps of a slab, warps.
_SLABS = dict.fromkeys(
    (
        (32, 256, 8, 8), (32, 256, 4, 8), (32, 256, 16, 8), (64, 256, 4, 8), (32, 128, 8, 8),
        (64, 128, 8, 8), (32, 64, 8, 4),
    ),
    _FREE,
)  # fmt: skip
# Matching: halves and slices of a tile, one warp per slice, or per 16 rows of a tile of one slice.
# The widest bucket is measured at 1024 columns but holds rows of 4096, which need many slices if
# they stay in registers. Only half rows may leave them: see `kernels.matching.forward`.
_TALL = ((8, 1), (16, 1))
_TILES: dict[tuple[str, str], tuple[_Shape, ...]] = {
    ("fwd", "c192"): ((2, 1), (2, 2), (2, 4), (4, 2), (4, 4)),
    ("fwd", "c384"): ((2, 2), (2, 4), (2, 8), (4, 4), (4, 8)),
    ("fwd", "c768"): ((2, 4), (2, 8), (4, 8)),
    ("fwd", "c4096"): ((2, 8), (2, 16)),
    ("dx", "c192"): ((2, 2), (2, 4), (4, 4)),
    ("dx", "c384"): ((2, 2), (2, 4), (2, 8), (4, 8)),
    ("dx", "c768"): ((2, 4), (2, 8)),
    ("dx", "c4096"): ((2, 8), (2, 16)),
}


def candidates(target: LaunchRow, current: Launch) -> list[Launch]:
    """Return the launches to measure, the current one first."""
    found = [current]
    for *blocks, warps, stages, registers in _settings(target):
        launch = Launch(
            blocks=MappingProxyType(dict(zip(current.blocks, blocks, strict=True))),
            num_warps=warps, num_stages=stages, max_registers=registers,
        )  # fmt: skip
        if launch not in found:
            found.append(launch)
    return found


def _settings(target: LaunchRow) -> Iterator[tuple[Any, ...]]:
    """Yield block sizes in the order of the table, warps, stages and the limit on registers."""
    operation, bucket = target.operation, target.bucket
    half = DTYPE_CLASSES[DTYPES[target.dtype]] == "half"
    if operation.endswith(("match_fwd", "match_dx", "prompts_fwd", "prompts_dx")):
        tall = _TALL if half else ()
        for halves, slices in (*_TILES[operation.rpartition("_")[2], bucket], *tall):
            # The loops load ahead by unrolling; there is nothing for stages to pipeline.
            yield halves, slices, slices if held(halves) else halves // 2, 1, None
        return
    if operation == PROMPT_SUM:
        shapes = _SUMS
    elif operation == "match_keys_bwd":
        shapes = _SLABS
    else:
        shapes = _ATTENTION[operation, bucket] if half else _FLOAT
    for shape, limits in shapes.items():
        for stages in (2, 3):
            for registers in limits:
                yield *shape, stages, registers


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """Sizes of one gated attention."""

    batch: int = 128
    tokens: int = 197
    heads: int = 12
    head_dim: int = 64
    pool: tuple[int, int] = (18, 18)
    top_k: int = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchShape:
    """Sizes of one matching."""

    batch: int = 128
    tokens: int = 197
    width: int = 768
    pool: tuple[int, int] = (18, 18)
    top_k: int = 5


SHAPES: dict[str, AttentionShape | MatchShape] = {
    "d64": AttentionShape(),
    "d128": AttentionShape(batch=64, tokens=257, heads=16, head_dim=80),
    "all": AttentionShape(),
    "c192": MatchShape(width=192),
    "c384": MatchShape(width=384),
    "c768": MatchShape(width=768),
    "c4096": MatchShape(width=1024),
}
"""What stands for a bucket: ViT-B/16 and ViT-H/14 at 224 pixels, ViT-T, S, B and L."""


class AttentionProblem:
    """Gated attention of one shape, with the packed projection that a ViT makes."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        heads, prompts = (shape.heads, shape.head_dim), sum(shape.pool)

        def draw(*sizes: int) -> Tensor:
            drawn = torch.randn(*sizes, *heads, generator=generator, device=device)
            return drawn.to(dtype)

        projected = draw(shape.batch, shape.tokens, 3).unbind(2)
        self.tensors = (*projected, draw(prompts), draw(prompts))
        self.do = draw(shape.batch, shape.tokens)
        self.gate = random_gate(
            shape.batch, shape.tokens, num_pool=shape.pool, top_k=(shape.top_k, shape.top_k),
            device=device, generator=generator,
        )  # fmt: skip

    def results(self) -> Results:
        """Run the kernels, forward and backward."""
        return self._run(gated_attention, torch.Tensor.detach)

    def truth(self) -> Results:
        """Run the reference in float64."""
        return self._run(gated_attention_reference, torch.Tensor.double)

    def _run(self, function: Callable[..., Tensor], prepare: Callable[[Tensor], Tensor]) -> Results:
        leaves = [prepare(tensor).requires_grad_() for tensor in self.tensors]
        o = function(*leaves, self.gate)
        grads = torch.autograd.grad(o, leaves, prepare(self.do))
        names = ("dq", "dk", "dv", "dk_prompt", "dv_prompt")
        return {"o": o.detach(), **dict(zip(names, grads, strict=True))}

    def launcher(self, operation: str) -> Callable[[], object]:
        """Return the function that launches the kernel of an operation."""
        q, k, v, k_prompt, v_prompt = self.tensors
        scale = q.shape[-1] ** -0.5
        inputs = AttentionInputs.of(q, k, v, k_prompt, v_prompt, self.gate, scale, False)
        if operation == "gated_attention_fwd":
            return functools.partial(launch_attention, inputs)
        o, lse = launch_attention(inputs)
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in self.tensors]
        delta = torch.empty_like(lse)
        launch_dq(inputs, self.do, o, lse, delta, grads[0])
        if operation == "gated_attention_dq":
            return functools.partial(launch_dq, inputs, self.do, o, lse, delta, grads[0])
        if operation == "gated_attention_dkv":
            needs = [True] * 5
            return functools.partial(launch_dkv, inputs, self.do, o, lse, delta, grads, needs)
        batch, _, heads, head_dim = o.shape
        sizes = 2, batch, heads, inputs.num_prompts, head_dim
        partial = torch.randn(sizes, device=o.device)
        return functools.partial(launch_prompt_sum, partial, grads[3], grads[4], (True, True))


class MatchProblem:
    """Prompt matching of one shape, alone or with LayerNorm."""

    def __init__(
        self, shape: MatchShape, dtype: torch.dtype, device: torch.device, *, norm: bool
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, shape.width, generator=generator, device=device)

        self.shape, rows = shape, (shape.batch, shape.tokens)
        self.x = (draw(*rows) + 0.5).to(dtype)
        self.keys = draw(shape.pool[0]), draw(shape.pool[1])
        for role, keys in zip((self.x[:, :1], self.x[:, 1:]), self.keys, strict=True):
            _make_clear(role, keys, shape.top_k)
        self.affine = (1 + 0.3 * draw(), draw()) if norm else None
        self.dnormed = draw(*rows).to(dtype) if norm else None
        # Then a patch gets gradients of about 1 from the distance, as it does from its normed row.
        slope = shape.width * shape.batch * (shape.tokens - 1) * shape.top_k
        self.ddistance = torch.tensor(float(slope), device=device)

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        return {"cls_top_k": self.shape.top_k, "image_top_k": self.shape.top_k}

    def results(self) -> Results:
        """Run the kernels, forward and backward."""
        x, *keys = (t.detach().requires_grad_() for t in (self.x, *self.keys))
        if self.affine is None:
            return self._finish(x, keys, None, *match_prompts(x, *keys, **self.settings))
        return self._finish(x, keys, *norm_match(x, *self.affine, EPS, *keys, **self.settings))

    def truth(self) -> Results:
        """Run the reference in float64."""
        x, *keys = (t.double().requires_grad_() for t in (self.x, *self.keys))
        normed = None
        if self.affine is not None:
            weight, bias = (t.double() for t in self.affine)
            normed = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
        matched = match_prompts_reference(x, *keys, **self.settings)
        return self._finish(x, keys, normed, *matched)

    def _finish(
        self, x: Tensor, keys: list[Tensor], normed: Tensor | None, gate: Tensor, distance: Tensor
    ) -> Results:
        """Collect outputs and gradients; those of prefix rows apart, they are larger."""
        outputs, upstream = [distance], [self.ddistance.to(distance.dtype)]
        results = {"gate": gate, "distance": distance.detach()}
        if normed is not None and self.dnormed is not None:
            outputs.append(normed)
            upstream.append(self.dnormed.to(normed.dtype))
            results["normed"] = normed.detach()
        dx, dcls, dimage = torch.autograd.grad(outputs, (x, *keys), upstream)
        named = {"dx of CLS": dx[:, :1], "dx of patches": dx[:, 1:]}
        return {**results, **named, "dcls_keys": dcls, "dimage_keys": dimage}

    def launcher(self, operation: str) -> Callable[[], object]:
        """Return the function that launches the kernel of an operation."""
        matching = make_matching(*self.keys, **self.settings)
        norm = None if self.affine is None else Norm(*self.affine, EPS)
        forward = functools.partial(launch_forward, self.x, *self.keys, None, matching, norm)
        if operation.endswith("_fwd"):
            return forward
        _, _, gate, stats, key_parts, key_inverse = forward()
        if operation.endswith("_dx"):
            weight = None if norm is None else norm.weight
            return functools.partial(
                launch_dx, self.dnormed, self.ddistance, self.x, weight, gate, stats, key_parts,
                matching, torch.empty_like(self.x),
            )  # fmt: skip
        dkeys = key_parts.new_empty((sum(self.shape.pool), self.shape.width), dtype=torch.float32)
        return functools.partial(
            launch_keys_backward, self.ddistance, self.x, gate, stats, key_parts, key_inverse,
            matching, dkeys,
        )  # fmt: skip


def _make_clear(rows: Tensor, keys: Tensor, top_k: int) -> None:
    """Replace the rows whose selection rounding may change by the one that is clearest."""
    cosine = cosine_similarity(rows.double(), keys.double())
    ordered = cosine.sort(-1, descending=True).values
    margin = ordered[..., top_k - 1] - ordered[..., top_k]
    rows[margin < CLEAR_MARGIN] = rows.flatten(0, 1)[margin.argmax()].clone()


Problem = AttentionProblem | MatchProblem


def make_problem(
    target: LaunchRow, device: torch.device, shape: AttentionShape | MatchShape | None = None
) -> Problem:
    """Draw the tensors for a row of the table; its representative shape unless one is given."""
    shape, dtype = shape or SHAPES[target.bucket], DTYPES[target.inputs]
    if isinstance(shape, AttentionShape):
        return AttentionProblem(shape, dtype, device)
    return MatchProblem(shape, dtype, device, norm=target.operation.startswith("norm_match"))


__all__ = [
    "BUCKETS",
    "DTYPES",
    "OPERATIONS",
    "SHAPES",
    "AttentionShape",
    "LaunchRow",
    "MatchShape",
    "Problem",
    "Results",
    "candidates",
    "make_problem",
    "targets",
]
