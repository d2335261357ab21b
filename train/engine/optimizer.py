"""The optimiser of a recipe and the course of its learning rate."""

import math
import re
from typing import Any

import torch

import tcpa
from tcpa.official import official_learning_rate

from ..recipes.recipe import Recipe


def make_optimizer(
    model: tcpa.PromptedViT, recipe: Recipe, device: torch.device, *, graph: bool = False
) -> torch.optim.Optimizer:
    """Return the optimiser of a recipe on all that a model trains.

    Every group of values holds its highest learning rate as `peak`.

    Args:
        model: on `device`.
        recipe: says how.
        device: where the rates are kept under a CUDA graph.
        graph: steps are going to be replayed as a graph, which reads the rates from the device.
    """
    # The fused forms read their step counters on the device; the others would wait for them.
    options: dict[str, Any] = {"fused": True, "weight_decay": recipe.weight_decay}
    groups = [
        {
            "params": parameters,
            "lr": torch.zeros((), device=device) if graph else 0.0,
            "peak": peak,
            "weight_decay": decay,
        }
        for peak, decay, parameters in _groups(model, recipe)
    ]
    if recipe.optimizer == "SGD":
        return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, **options)
    kinds = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
    options |= {"eps": recipe.epsilon, "capturable": graph}
    return kinds[recipe.optimizer](groups, lr=0.0, **options)


def _groups(
    model: tcpa.PromptedViT, recipe: Recipe
) -> list[tuple[float, float, list[torch.nn.Parameter]]]:
    """Return highest rate, weight decay and values of each group that has any."""
    found: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.trainable_named_parameters().items():
        peak, decay = recipe.peak_rate, recipe.weight_decay
        own = next((g for g in recipe.groups if re.search(g.pattern, name)), None)
        if own is not None:
            peak = peak if own.learning_rate is None else own.learning_rate
            decay = decay if own.weight_decay is None else own.weight_decay
        found.setdefault((peak, decay), []).append(parameter)
    return [(peak, decay, parameters) for (peak, decay), parameters in found.items()]


def rate_factor(recipe: Recipe, step: int, total_steps: int) -> float:
    """Return the learning rate of a step as a part of the highest.

    Args:
        recipe: says how.
        step: number of the step, from 0.
        total_steps: steps of the whole training.
    """
    total_steps //= recipe.rounds
    step %= total_steps
    if recipe.schedule == "epoch-cosine":
        epochs = recipe.epochs // recipe.rounds
        warmup = round(recipe.warmup_fraction * epochs)
        epoch = step * epochs // total_steps
        if epoch < warmup:
            return epoch / warmup
        progress = (epoch - warmup) / max(epochs - warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * progress))
    if recipe.schedule == "steps":
        passed = [share for share in recipe.milestones if step >= share * total_steps]
        return 0.1 ** len(passed)
    return official_learning_rate(
        step, base_lr=1.0, total_steps=total_steps, warmup_fraction=recipe.warmup_fraction
    )
