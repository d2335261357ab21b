"""What a method trains and computes: counted on the model itself, on torch's meta device.

A multiply-add counts as two FLOPs, and only matrix products and convolutions count, as in
`tcpa.bench.costs`; the plain attention of the reference has the products of the fused one.
"""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tcpa
from tcpa.vit import classifier_layers

from ...cli import UsageError
from ..backbones import ALIASES
from ..recipes.recipe import Recipe

BATCH = 128
"""Images of the counted pass: what a batch shares is divided among them."""

PARTS = {
    "pools": "pools",
    "tokens": "prompts",
    "value_affine": "value map",
    "image_prompt": "image prompt",
    "input_prompt": "image prompt",
    "feature_prompt": "feature prompt",
    "adapters": "adapters",
    "side": "side network",
    "mapping": "mapping",
    "backbone": "backbone",
}
"""Module of the model -> what its trainable parameters are called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodCost:
    """What one method trains and computes."""

    trained: dict[str, int]
    """Trainable parameters by part, the head last."""

    evaluation: float
    """FLOPs of an image, prompts' keys and values known from the batch before."""

    training: float
    """FLOPs of an image, forward and backward, random selections past."""

    @property
    def total(self) -> int:
        """Trainable parameters, the head included."""
        return sum(self.trained.values())


def method_cost(recipe: Recipe, backbone: str, classes: int, image_size: int | None) -> MethodCost:
    """Count trainable parameters and FLOPs of the model of a recipe.

    Args:
        recipe: says what is trained; its optimiser does not matter.
        backbone: timm model name, without weights.
        classes: of the head.
        image_size: side of the images, pixels; None for the backbone's.

    Raises:
        UsageError: there is no such backbone, or the method does not fit it.
    """
    try:
        vit = copy.deepcopy(_backbone(backbone, image_size))
        with torch.device("meta"):
            model = tcpa.wrap(
                vit,
                recipe.prompts,
                input_prompt=recipe.input_prompt,
                tuning=recipe.tuning,
                num_classes=classes,
                impl="reference",
                load_weights=False,
            )
            images = torch.zeros(BATCH, *_image_shape(vit))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"--backbone {backbone}, {recipe.method}: {error}") from None
    for part in model.fitted_parts().values():
        # Prototypes without values are as good as any here.
        part.fitted = True
    model.set_epoch(recipe.epochs)
    return MethodCost(
        trained=_trained(model),
        evaluation=_evaluation(model, images) / BATCH,
        training=_training(model, images) / BATCH,
    )


@cache
def _backbone(name: str, image_size: int | None) -> nn.Module:
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    with torch.device("meta"):
        return timm.create_model(ALIASES.get(name, name), num_classes=0, **options)


def _image_shape(vit: Any) -> tuple[int, ...]:
    height, width = vit.patch_embed.img_size
    return 3, height, width


def _trained(model: tcpa.PromptedViT) -> dict[str, int]:
    found: dict[str, int] = {}
    heads = {id(p) for layer in classifier_layers(model.backbone) for p in layer.parameters()}
    for name, parameter in model.trainable_named_parameters().items():
        part = "head" if id(parameter) in heads else PARTS[name.partition(".")[0]]
        found[part] = found.get(part, 0) + parameter.numel()
    return {part: found[part] for part in sorted(found, key=lambda part: part == "head")}


def _evaluation(model: tcpa.PromptedViT, images: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        model(images)
        with FlopCounterMode(display=False) as counter:
            model(images)
    return counter.get_total_flops()


def _training(model: tcpa.PromptedViT, images: torch.Tensor) -> float:
    model.train()
    with FlopCounterMode(display=False) as counter:
        logits, distance = model(images, return_distance=True)
        (logits.sum() + distance).backward()
    return counter.get_total_flops()
