"""FLOPs of one step of a prompted ViT, from formulas.

A multiply-add counts as two FLOPs, and only matrix products count: what LayerNorm, softmax, GELU
and the Fourier transform of the prompts add is below 1 %.

Model FLOPs are those of the method in its cheapest form, whoever computes it; hardware FLOPs are
those that a provider's own form computes, with what its backward pass computes again.

Axes: B batch, L tokens, Q queries, P prompt rows, R pool entries, C width, S keys.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import timm
import torch

from tcpa import Savings, TCPAConfig

from ..harness.case import BACKBONES, Backbone, StepCase
from ..harness.model import NUM_CLASSES
from ..harness.provider import StepProvider

Method = Literal["tcpa", "vpt-deep", "vfpt", "linear"]

MLP_RATIO, CHANNELS = 4, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Sizes of a step and the form in which it is computed."""

    method: Method = "tcpa"
    vit: Backbone = BACKBONES["b16"]
    patches: int = 196
    """Patches of an image; with the prefix tokens they are the L tokens."""
    prompts: int = 36
    """P, prompt rows of a block, both pools together; 0 for a linear probe."""
    entries: int = 36
    """R, keys that TCPA matches a token with."""
    batch: int = 128
    classes: int = 200
    input_prompt: bool = False
    """Whether something on the image is trained."""
    plain_passes: int = 0
    """Forward passes of the plain backbone that come before."""
    savings: Savings = field(default_factory=Savings)

    @property
    def tokens(self) -> int:
        """L, tokens of an image."""
        return self.vit.prefix + self.patches

    @property
    def image_gradient(self) -> bool:
        """Whether the tokens of the first block have a gradient."""
        saved = self.savings
        return self.input_prompt or not (saved.frozen_backbone and saved.skip_input_gradient)


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of one step."""

    total: float
    repeated: float
    """Those of the total that make results of the forward pass again."""


def step_flops(work: Workload, *, train: bool) -> StepFlops:
    """Return the FLOPs of one training step or one evaluation step.

    An evaluation step keeps the prompts' keys and values of the step before, as the model does.
    """
    blocks = [_Block(work, index, train=train) for index in range(work.vit.depth)]
    patches = 2.0 * work.batch * work.patches * CHANNELS * work.vit.patch**2 * work.vit.width
    head = 2.0 * work.batch * work.vit.width * work.classes
    total = patches + sum(block.forward() for block in blocks) + head
    if work.plain_passes:
        plain = replace(work, method="linear", prompts=0, plain_passes=0, input_prompt=False)
        total += work.plain_passes * (step_flops(plain, train=False).total - head)
    if not train:
        return StepFlops(total, 0.0)
    backward = [block.backward() for block in blocks]
    total += sum(one.total for one in backward) + head * (1 + blocks[-1].has_gradient)
    total += patches * (work.input_prompt + (not work.savings.frozen_backbone))
    return StepFlops(total, sum(one.repeated for one in backward))


class _Block:
    """One block of a workload: which rows it computes, see `tcpa.forward`."""

    def __init__(self, work: Workload, index: int, *, train: bool) -> None:
        saved, has_prompts = work.savings, work.prompts > 0
        self.work = work
        # Prompts that are more than keys and values: TCPA's join the projection, VPT's the block.
        plain = has_prompts and not saved.prompt_keys_only
        self.joined = plain and work.method == "tcpa"
        self.in_block = plain and not self.joined
        self.tokens = work.tokens + work.prompts * self.in_block
        cut = saved.last_block_head_rows and index == work.vit.depth - 1 and not self.in_block
        self.rows = 1 if cut else self.tokens
        self.keys = self.tokens + work.prompts * (not self.in_block)
        # An evaluation keeps what was computed outside the blocks from batch to batch.
        once = saved.prompt_kv_once and saved.prompt_keys_only
        projected = has_prompts and not plain and (train or not once)
        self.prompt_rows = (1 if once else work.batch) * work.prompts * projected
        matched = work.method == "tcpa" and has_prompts
        self.match = self._product(work.tokens, work.entries * matched)
        self.dense = matched and not saved.gate_bits
        tokens_differ = index > 0 and has_prompts
        self.token_gradient = work.image_gradient or tokens_differ or self.in_block
        self.has_gradient = self.token_gradient or has_prompts

    def forward(self) -> float:
        """FLOPs of matching, projections, attention and MLP."""
        tokens, prompts = self._projections()
        scores = self._product(self.rows, self.keys)
        # The dense form computes the prompts' rows, too, and throws them away.
        extra = self._product(self.work.prompts, self.keys) * (self.joined and self.dense)
        return self.match + tokens + prompts + 2 * scores + extra + self._frozen_layers()

    def backward(self) -> StepFlops:
        """FLOPs of the backward pass; none where nothing is trained."""
        if not self.has_gradient:
            return StepFlops(0.0, 0.0)
        weights = 1 + (not self.work.savings.frozen_backbone)
        tokens, prompts = self._projections()
        through = tokens * (self.token_gradient or self.joined) + prompts
        total = weights * (self._frozen_layers() + through)
        total += self.match * (1 + self.token_gradient)
        attention = self._attention_backward()
        return StepFlops(total + attention.total, attention.repeated)

    def _attention_backward(self) -> StepFlops:
        """The fused form makes its scores again; for the prompts alone only their columns."""
        scores = self._product(self.rows, self.keys)
        queries_differ = self.token_gradient or self.joined
        if self.dense:
            extra = self._product(self.work.prompts, self.keys) * self.joined
            return StepFlops(2 * scores + (1 + queries_differ) * (scores + extra), 0.0)
        if queries_differ:
            return StepFlops(5 * scores, scores)
        own = self._product(self.rows, self.work.prompts)
        return StepFlops(4 * own, own)

    def _projections(self) -> tuple[float, float]:
        """Queries, keys and values of the tokens, and keys and values of prompts beside them."""
        work, width = self.work, self.work.vit.width
        if self.rows == self.tokens or self.joined:
            rows = 3 * (self.tokens + work.prompts * self.joined)
        else:
            rows = self.rows + 2 * self.tokens
        return self._product(rows, width), 2.0 * self.prompt_rows * width * 2 * width

    def _frozen_layers(self) -> float:
        """The projection of the attention, fc1 and fc2."""
        return self._product(self.rows, (1 + 2 * MLP_RATIO) * self.work.vit.width)

    def _product(self, rows: int, columns: int) -> float:
        """`[B, rows, C] @ [C, columns]`; of attention `[B, H, rows, D] @ [B, H, D, columns]`."""
        return 2.0 * self.work.batch * rows * self.work.vit.width * columns


def flops_of(case: StepCase, provider: StepProvider) -> tuple[float, float] | None:
    """Return model and hardware FLOPs of a step; None for blocks that the formulas do not know."""
    sizes = backbone_sizes(case.model)
    if sizes is None:
        return None
    official, method = TCPAConfig.official(case.dataset), method_of(provider)
    prompt = provider.input_prompt
    work = Workload(
        method=method,
        vit=sizes[0],
        patches=sizes[1],
        prompts=0 if method == "linear" else official.num_prompts,
        entries=official.cls_pool_size + official.image_pool_size,
        batch=case.batch,
        classes=NUM_CLASSES,
        input_prompt=prompt is not None,
        plain_passes=0 if prompt is None else prompt.forward_passes - 1,
        savings=provider.savings,
    )
    saved = replace(Savings(), skip_input_gradient=provider.method != "linear-backward")
    cheapest = step_flops(replace(work, savings=saved), train=case.mode == "train")
    own = step_flops(work, train=case.mode == "train")
    return cheapest.total - cheapest.repeated, own.total


def method_of(provider: StepProvider) -> Method:
    """Return what the formulas take a provider's prompts for."""
    known: dict[str, Method] = {"vpt-deep": "vpt-deep", "vfpt": "vfpt"}
    return "tcpa" if provider.method.endswith("tcpa") else known.get(provider.method, "linear")


@functools.cache
def backbone_sizes(name: str) -> tuple[Backbone, int] | None:
    """Return the sizes of a timm ViT and its number of patches; None where blocks differ."""
    with torch.device("meta"):
        vit = cast(Any, timm.create_model(name))
    try:
        attention, hidden = vit.blocks[0].attn, vit.blocks[0].mlp.fc1.out_features
        rows, columns = vit.patch_embed.patch_size
        backbone = Backbone(
            heads=attention.num_heads,
            head_dim=attention.head_dim,
            depth=len(vit.blocks),
            patch=rows,
            prefix=vit.num_prefix_tokens,
        )
        patches = vit.patch_embed.num_patches
    except AttributeError:
        return None
    square = rows == columns and backbone.width == vit.embed_dim
    return (backbone, patches) if square and hidden == MLP_RATIO * vit.embed_dim else None
