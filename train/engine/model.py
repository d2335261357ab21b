"""The model of a run: backbone, prompts and head from the spec."""

import copy
from dataclasses import dataclass

import torch

import tcpa
from tcpa.vit import classifier_layers

from ...cli import UsageError
from ..backbones import BackboneRecord, load_backbone
from ..recipes.runspec import RunSpec
from .distributed import World
from .evaluate import Twin
from .precision import NUMERICS, Numerics, choose_numerics, require_graph


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltModel:
    """A model with the precisions in which it is trained and evaluated."""

    model: tcpa.PromptedViT
    numerics: Numerics
    """Of the training."""
    eval_numerics: Numerics
    twin: Twin | None
    """Where evaluations need other frozen weights than the training."""
    backbone: BackboneRecord

    def implementation(self, world: World) -> tuple[str, str]:
        """Return what computes the attention, and why."""
        with self.numerics.context(world.device):
            return self.model.implementation

    def for_evaluation(self) -> tcpa.PromptedViT:
        """Return the model to evaluate, with the trained values as they are now."""
        return self.model if self.twin is None else self.twin.of(self.model)


def build_model(spec: RunSpec, world: World, num_classes: int) -> BuiltModel:
    """Create the model on its device, the same on all processes.

    Raises:
        UsageError: the backbone cannot be had, is not covered, or an option does not fit.
    """
    tuning = spec.tuning
    trains_weights = tuning.trains_backbone
    numerics = choose_numerics(spec.precision, world.device, trains_weights=trains_weights)
    if spec.weights == "none":
        tuning = tuning.without_download()
    for choice in (spec.prompts, spec.input_prompt, tuning):
        reason = choice.why_not_compiled() if spec.compile and choice is not None else None
        if reason is not None:
            raise UsageError(
                f"--compile: got it with --method {spec.method}, expected a method without "
                f"{reason}; leave --compile out"
            )
    if spec.cuda_graph:
        require_graph(numerics, world)
    # Random weights and the initial values of what is trained come from the seed.
    torch.manual_seed(spec.seed)
    mapped = getattr(spec.input_prompt, "maps_logits", False)
    size = spec.crop
    backbone, record = load_backbone(spec.backbone, spec.weights, image_size=size, head=mapped)
    exact = NUMERICS["fp32"] if spec.eval_precision == "fp32" else numerics
    separate = exact.weights != numerics.weights
    spare = copy.deepcopy(backbone) if separate else None

    def wrap(vit: torch.nn.Module, weights: torch.dtype) -> tcpa.PromptedViT:
        try:
            model = tcpa.wrap(
                vit,
                spec.prompts,
                input_prompt=spec.input_prompt,
                tuning=tuning,
                num_classes=num_classes,
                normalization=spec.normalization,
            )
        except (TypeError, ValueError) as error:
            raise UsageError(f"--backbone {spec.backbone}: {error}") from None
        except RuntimeError as error:
            raise UsageError(f"--method {spec.method}: {error}") from None
        return _store(model, weights).to(world.device)

    model = wrap(backbone, numerics.weights)
    twin = None if spare is None else Twin(wrap(spare, exact.weights))
    if spec.compile:
        # One graph per batch size: there are four at most, and sizes that are known run faster.
        model.compile(dynamic=False)
    return BuiltModel(
        model=model, numerics=numerics, eval_numerics=exact, twin=twin, backbone=record
    )


def _store(model: tcpa.PromptedViT, weights: torch.dtype) -> tcpa.PromptedViT:
    """Convert the frozen weights; what is trained starts from the same values in all precisions."""
    named = model.trainable_named_parameters()
    values = {name: parameter.detach().clone() for name, parameter in named.items()}
    counted = [
        (module, name, value)
        for head in classifier_layers(model.backbone)
        for module in head.modules()
        for name, value in module.named_buffers(recurse=False)
    ]
    model.backbone.to(weights)
    for name, parameter in named.items():
        parameter.data = values[name]
    for module, name, value in counted:
        setattr(module, name, value)
    model.forget()
    return model
