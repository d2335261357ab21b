"""The model of a run: backbone, prompts and head from the spec; its accuracy on a split."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import tcpa
from tcpa.vit import classifier_layers

from ...cli import UsageError
from ..backbones import BackboneRecord, load_backbone
from ..recipes.runspec import RunSpec
from .data import Source
from .distributed import World
from .precision import NUMERICS, Numerics, choose_numerics, require_graph


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltModel:
    """A model with the precisions in which it is trained and evaluated."""

    model: tcpa.PromptedViT
    numerics: Numerics
    """Of the training."""
    eval_numerics: Numerics
    twin: tcpa.PromptedViT | None
    """Of the model, where evaluations need other frozen weights than the training."""
    backbone: BackboneRecord

    def implementation(self, world: World) -> tuple[str, str]:
        """Return what computes the attention, and why."""
        with self.numerics.context(world.device):
            return self.model.implementation

    def for_evaluation(self) -> tcpa.PromptedViT:
        """Return the model to evaluate, with the parameters as they are now."""
        if self.twin is None:
            return self.model
        self.twin.load_trained(self.model.trained_tensors())
        return self.twin


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
    mapped = spec.input_prompt is not None and spec.input_prompt.maps_logits
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
    twin = None if spare is None else wrap(spare, exact.weights)
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
    model.clear_cache()
    return model


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an evaluation found, over all processes."""

    accuracy: float
    """Top-1, percent."""
    loss: float
    """Mean cross-entropy."""
    images: int
    seconds: float


@torch.no_grad()
def evaluate(
    model: tcpa.PromptedViT,
    source: Source,
    world: World,
    numerics: Numerics,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Classify a split; waits for the device once, at the end. Leaves the model as it was.

    Args:
        model: its weights have the dtype of `numerics`.
        source: every image once, over all processes.
        world: the processes.
        numerics: precision.
        check: called before every batch; may raise to end it.
    """
    start, was_training = time.perf_counter(), model.training
    model.eval()
    counts, seen = torch.zeros(3, dtype=torch.float64, device=world.device), 0
    for batch in source.epoch(0):
        check()
        # A process may have no row of a tiny last batch.
        if len(batch.images) == 0:
            continue
        with numerics.context(world.device):
            logits = model(batch.images.to(numerics.weights)).float()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        hits = (logits.argmax(1) == batch.labels).sum()
        counts[:2] += torch.stack((hits.double(), loss.double()))
        seen += len(batch.labels)
    model.train(was_training)
    counts[2] = seen
    hits, loss, images = world.sum(counts).tolist()
    return Evaluation(
        accuracy=100 * hits / images,
        loss=loss / images,
        images=int(images),
        seconds=time.perf_counter() - start,
    )
