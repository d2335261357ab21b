"""The one optimizer step: forward, loss, backward, update; nothing in it waits for the device.

`Trainer` calls it with a schedule, mixed images and several processes; the demo and the
benchmarks call it as it is.

Axes: n images, K classes.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn

import tcpa

from .precision import NUMERICS, Numerics

WARM_UPS = 3
"""Steps before a graph is captured; they leave no trace."""

_soft_cross_entropy = SoftTargetCrossEntropy()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step computed, on the device; a captured step overwrites it at its next call."""

    losses: Tensor
    """Loss, cross-entropy and match distance, float32 or better, `[3]`."""
    logits: Tensor
    """`[n, K]`, before the update."""


class Step:
    """One optimizer step of a model.

    The loss is cross-entropy(logits, targets) + match_weight * distance, in float32 or better.

    Attributes:
        model: its parameters are updated.
        optimizer: on its trainable parameters; learning rates are the caller's to set.
        numerics: how the model is called.
        scaler: scales the loss under float16 autocast, and is inactive otherwise.
    """

    def __init__(
        self,
        model: tcpa.PromptedViT,
        optimizer: torch.optim.Optimizer,
        *,
        numerics: Numerics = NUMERICS["fp32"],
        module: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        graph: bool = False,
    ) -> None:
        """Prepare steps.

        Args:
            model: in training mode when the step is called.
            optimizer: capturable, with learning rates on the device, if `graph`.
            numerics: precision.
            module: what is called in place of the model (compiled, distributed).
            scaler: of the loss; None for none.
            graph: replay the step as a CUDA graph, captured at the first call and again when the
                model begins or ends to select prompts at random. Batches of another size than the
                first run without it. Not with an active scaler.
        """
        self.model, self.optimizer, self.numerics = model, optimizer, numerics
        self.scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
        # Not by truth: what torch.compile returns has a length that raises.
        self._module: Any = model if module is None else module
        on_image = model.input_config
        self._critical = 1.0 if on_image is None else on_image.critical_share
        self._graph = _StepGraph(self) if graph else None

    def __call__(self, images: Tensor, targets: Tensor, scale: float = 1.0) -> StepOutput:
        """Train on a batch.

        Args:
            images: float `[n, channels, height, width]`, any precision.
            targets: labels, int64 `[n]`, or soft targets, float32 `[n, K]`, rows sum to 1.
            scale: factor of the loss in the backward pass; the one of the first call if captured.
        """
        images = images.to(self.numerics.weights)
        call = self.update if self._graph is None else self._graph
        return call(images, targets, scale)

    def update(self, images: Tensor, targets: Tensor, scale: float = 1.0) -> StepOutput:
        """Do a step without a graph."""
        found = self.backward(images, targets, scale)
        if self._critical < 1:
            parts = (self.model.input_prompt, self.model.feature_prompt)
            prompts = [p for part in parts if part is not None for p in part.parameters()]
            keep_critical(prompts, self._critical)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return found

    def backward(self, images: Tensor, targets: Tensor, scale: float = 1.0) -> StepOutput:
        """Leave fresh gradients in the parameters and update nothing."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.numerics.context(images.device):
            inputs = images.to(self.numerics.weights)
            logits, distance = self._module(inputs, return_distance=True)
        found = losses(logits, distance, targets, self.model.match_weight)
        self.scaler.scale(found[0] * scale).backward()
        return StepOutput(found.detach(), logits.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Return all that training decides of the model and the optimizer's state, by name."""
        found: dict[str, Tensor] = {}
        for name, value in self.model.trained_tensors().items():
            found[f"model/{name}"] = value.detach()
            if isinstance(value, nn.Parameter):
                for key, state in self.optimizer.state[value].items():
                    if isinstance(state, Tensor):
                        found[f"optimizer/{key}/{name}"] = state
        return found


def losses(logits: Tensor, distance: Tensor, targets: Tensor, weight: float) -> Tensor:
    """Return loss, cross-entropy and match distance of a batch, float32 or better `[3]`.

    Args:
        logits: `[n, K]`, any precision.
        distance: scalar.
        targets: labels, int64 `[n]`, or soft targets, float32 `[n, K]`, rows sum to 1.
        weight: of the distance.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    soft = targets.is_floating_point()
    cross_entropy = (_soft_cross_entropy if soft else F.cross_entropy)(logits, targets)
    distance = distance.to(logits.dtype)
    return torch.stack((cross_entropy + weight * distance, cross_entropy, distance))


@torch.no_grad()
def keep_critical(parameters: Iterable[nn.Parameter], share: float) -> None:
    """Zero the gradients of all but the most critical values of each parameter (LION).

    A value is critical where |value * gradient| is large. The others are left to weight decay,
    which drives them to 0.

    Args:
        parameters: those without gradients are skipped.
        share: of the values of each parameter that are kept, at least one.

    Source:
        LION (AAAI 2024), as its abstract describes it; unverified.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        score = (parameter * parameter.grad).abs().flatten()
        kept = max(round(share * score.numel()), 1)
        threshold = score.kthvalue(score.numel() - kept + 1).values
        parameter.grad.mul_((score >= threshold).view_as(parameter.grad))


class _StepGraph:
    """A step as one CUDA graph."""

    def __init__(self, step: Step) -> None:
        # No cycle: a step that is replaced takes its graph and memory with it at once.
        self._step: Any = weakref.proxy(step)
        self._graph: Any = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._found: StepOutput | None = None
        self._selects_randomly: bool | None = None

    def __call__(self, images: Tensor, targets: Tensor, scale: float) -> StepOutput:
        """Replay a step; the numbers it draws come from the generator as it is seeded now."""
        model = self._step.model
        random = model.config is not None and model.epoch < model.config.random_epochs
        if self._inputs is None or self._selects_randomly != random:
            self._capture(images, targets, scale)
            self._selects_randomly = random
        inputs = cast(tuple[Tensor, Tensor], self._inputs)
        if images.shape != inputs[0].shape:
            return self._step.update(images, targets, scale)
        for static, value in zip(inputs, (images, targets), strict=True):
            static.copy_(value)
        self._graph.replay()
        return cast(StepOutput, self._found)

    def _capture(self, images: Tensor, targets: Tensor, scale: float) -> None:
        self._graph = self._found = None
        inputs = self._inputs = (images.clone(), targets.clone())
        state = torch.cuda.get_rng_state(images.device)
        before = {name: value.clone() for name, value in self._step.tensors().items()}
        stream = torch.cuda.Stream()
        _wait_for(stream)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step.update(*inputs, scale)
        _wait_for(stream)
        self._restore(before)
        torch.cuda.set_rng_state(state, images.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._found = self._step.update(*inputs, scale)

    @torch.no_grad()
    def _restore(self, before: dict[str, Tensor]) -> None:
        """Put values back in place; an optimizer that had no state yet starts from zeros."""
        for name, value in self._step.tensors().items():
            if name in before:
                value.copy_(before[name])
            else:
                value.zero_()


def _wait_for(stream: Any) -> None:
    """Order a side stream and the current one: what either was given comes before what follows."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    current.wait_stream(stream)
