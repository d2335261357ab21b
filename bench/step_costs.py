"""FLOPs of the step of a provider, and how fast the cost model thinks it is.

Model FLOPs are those of the method in its cheapest form, whoever computes it: what a provider adds
to them is no use to anyone. Hardware FLOPs are those that the provider's own form computes, with
what its backward pass repeats.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import timm
import torch

from tcpa import Savings, TCPAConfig

from .costs.estimate import seconds
from .costs.model import step
from .costs.workload import MLP_RATIO, Method, Workload, total
from .hardware import Ceilings
from .harness.case import Backbone
from .harness.model import NUM_CLASSES
from .providers.step import StepCase, StepProvider

DTYPES = {"float32": "fp32", "float64": "fp64", "autocast": "bf16", "bfloat16": "bf16"}
"""Precision of a provider -> dtype of its products."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """What one step of a provider costs."""

    model_flops: float
    """Of the method in its cheapest form."""
    hardware_flops: float
    """Of the provider's own form, repeated work included."""
    workload: Workload
    train: bool

    def seconds(self, ceilings: Ceilings) -> float:
        """Return the sum of the lower bounds of all operations."""
        return seconds(step(self.workload, train=self.train), ceilings)


def step_cost(case: StepCase, provider: StepProvider) -> StepCost | None:
    """Return the cost of a provider's step; None if its backbone is none that the model knows."""
    sizes = backbone_sizes(case.model)
    if sizes is None:
        return None
    backbone, patches = sizes
    official, method = TCPAConfig.official(case.dataset), method_of(provider)
    work = Workload(
        method=method,
        vit=backbone,
        patches=patches,
        prompts=0 if method == "linear" else official.num_prompts,
        entries=official.cls_pool_size + official.image_pool_size,
        batch=case.batch,
        dtype=DTYPES[provider.precision],
        classes=NUM_CLASSES,
        input_prompt=provider.input_prompt,
        savings=provider.savings,
    )
    train = case.mode == "train"
    saved = replace(Savings(), skip_input_gradient=provider.method != "linear-backward")
    cheapest = step(replace(work, savings=saved), train=train)
    own = step(work, train=train)
    repeated = sum(operation.repeated for operation in cheapest)
    return StepCost(total(cheapest).flops - repeated, total(own).flops, work, train)


def method_of(provider: StepProvider) -> Method:
    """Return what the cost model takes a provider's prompts for; it counts no Fourier transform."""
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


def predicted_speed(
    case: StepCase, first: StepProvider, provider: StepProvider, ceilings: Mapping[str, Ceilings]
) -> float | None:
    """Return how many times as fast as the first the cost model thinks a provider is.

    Args:
        case: what both compute.
        first: the yardstick.
        provider: the one in question; its own expected gain comes on top.
        ceilings: what the device attains, by precision.
    """
    base, own = step_cost(case, first), step_cost(case, provider)
    if base is None or own is None:
        return None
    speed = base.seconds(ceilings[first.precision]) / own.seconds(ceilings[provider.precision])
    return speed * provider.expected_gain(case)
