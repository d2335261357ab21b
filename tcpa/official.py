"""The official code's conventions: parameter names and learning-rate schedule.

`load_official_state_dict` and `official_state_dict` translate between this library's parameters and
the names of the official repository (zhoujiahuan1991/ICML2025-TCPA, commit dce8b3a).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .model import PromptedViT

POOL_NAMES = {
    "pools.cls_keys": "Pool.Pool_cls.keys",
    "pools.cls_prompts": "Pool.Pool_cls.prompts",
    "pools.image_keys": "Pool.Pool_image.keys",
    "pools.image_prompts": "Pool.Pool_image.prompts",
    "tokens.prompts": "prompts",
    "value_affine.scale": "ADVP_w",
    "value_affine.shift": "ADVP_b",
}
IMAGE_PROMPT_NAMES = {
    "expand": "Prompter.Prompter.0",
    "activation": "Prompter.Prompter.1",
    "contract": "Prompter.Prompter.2",
}


def official_name(name: str) -> str:
    """Return the official name of one of our parameters, e.g. of `pools.cls_keys`."""
    if name.startswith("image_prompt."):
        # image_prompt.<position>.<layer>.<tensor>
        _, _, layer, tensor = name.split(".")
        return f"{IMAGE_PROMPT_NAMES[layer]}.{tensor}"
    return POOL_NAMES.get(name, name)


def official_state_dict(model: PromptedViT) -> dict[str, Tensor]:
    """Return all parameters of a model, backbone and head included, under their official names.

    Returns:
        Detached tensors that share memory with the model.

    Raises:
        TypeError: `model` is not one of ours.
    """
    if not isinstance(model, PromptedViT):
        got = type(model).__name__
        raise TypeError(f"model: got {got}, expected what tcpa.wrap returns; wrap it first")
    model.require_backbone()
    return {official_name(name): p.detach() for name, p in model.named_parameters()}


@torch.no_grad()
def load_official_state_dict(model: PromptedViT, state_dict: Mapping[str, Any]) -> None:
    """Copy parameters with official names into a model.

    Args:
        model: the model to fill; its dtypes and devices stay.
        state_dict: exactly the names of `official_state_dict(model)`, as tensors or numpy arrays.

    Raises:
        ValueError: names are missing or unknown, a shape differs or a value is not finite; nothing
            is copied then.
        TypeError: a value is no array of real floating-point numbers, or `model` is not ours.
    """
    if not isinstance(state_dict, Mapping):
        got = type(state_dict).__name__
        raise TypeError(f"state_dict: got {got}, expected a dict of tensors; load the file first")
    targets = official_state_dict(model)
    values = {name: _as_tensor(name, value) for name, value in state_dict.items()}
    missing, unknown = sorted(targets.keys() - values), sorted(values.keys() - targets)
    shapes = [
        f"{name}: got {list(values[name].shape)}, expected {list(target.shape)}"
        for name, target in targets.items()
        if name in values and values[name].shape != target.shape
    ]
    broken = [
        name
        for name, value in values.items()
        if name in targets and not bool(torch.isfinite(value).all())
    ]
    problems = [
        *([f"missing {_few(missing)}"] if missing else []),
        *([f"unknown {_few(unknown)}"] if unknown else []),
        *([f"wrong shapes: {_few(shapes)}"] if shapes else []),
        *([f"NaN or infinity in {_few(broken)}"] if broken else []),
    ]
    if problems:
        raise ValueError(
            f"state_dict does not fit this model: {'; '.join(problems)}; "
            "wrap the same backbone with the same configuration, or compare the names with "
            "official_state_dict(model)"
        )
    for name, target in targets.items():
        target.copy_(values[name])


def _as_tensor(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(value).__name__
        raise TypeError(f"state_dict[{name!r}]: got {got}, expected a tensor or array") from error
    if not tensor.is_floating_point():
        got, expected = tensor.dtype, "real floating-point numbers"
        raise TypeError(f"state_dict[{name!r}]: got {got}, expected {expected}; convert it")
    return tensor


def _few(items: list[str], limit: int = 5) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def official_learning_rate(
    step: int, *, base_lr: float, total_steps: int, warmup_fraction: float = 0.2
) -> float:
    """Return the learning rate of one optimiser step: linear warm-up, then cosine to zero.

    Args:
        step: number of the step, from 0.
        base_lr: highest learning rate.
        total_steps: steps of the whole training, T.
        warmup_fraction: share of the steps spent on warm-up; W = floor(T * warmup_fraction).

    Returns:
        base_lr * (step + 1) / W during the warm-up, then
        base_lr * (1 + cos(pi * (step - W) / (T - W))) / 2.

    Source:
        The official trainer; the paper says only "cosine".
    """
    warmup = int(total_steps * warmup_fraction)
    if step < warmup:
        return base_lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return 0.5 * base_lr * (1 + math.cos(math.pi * progress))
