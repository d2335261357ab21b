"""What a provider of the race is, and the check that it passes before it is timed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ... import kernels
from .case import Shape

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
FLOOR = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 16, torch.float64: 64}
"""Units in the last place that an error may have beyond twice that of the plain reference: fused
CPU kernels have a fast exponential, and in float64 the reference itself is the truth."""

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Mode = Literal["forward", "backward", "both"]


class WrongResultError(RuntimeError):
    """A provider computes something else; it gets no figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A provider's call on one case."""

    forward: Callable[[], Outputs]
    """Compute the outputs; those with a gradient come first."""
    leaves: tuple[Tensor, ...]
    """Where gradients are taken."""
    upstream: tuple[Tensor, ...]
    """Gradients of the first outputs."""
    read: Callable[[Outputs, Outputs], Tensors]
    """Name the outputs, and gradients of the leaves (or none) by the argument of the operation."""

    def gradients(self, outputs: Outputs, *, retain: bool = False) -> Outputs:
        """Return the gradients of the leaves; with `retain` the graph can be used again."""
        used = outputs[: len(self.upstream)]
        # Without prompts nothing depends on them: their gradients are empty, not absent.
        return torch.autograd.grad(
            used, self.leaves, self.upstream, retain_graph=retain, materialize_grads=True
        )

    def forward_and_backward(self) -> Outputs:
        """Compute outputs and gradients, as a training step does."""
        return self.gradients(self.forward())

    def results(self, training: bool) -> Tensors:
        """Return outputs and, in training, all gradients, by name."""
        if not training:
            with torch.no_grad():
                return self.read(self.forward(), ())
        outputs = self.forward()
        return self.read(outputs, self.gradients(outputs))


def _always(_: torch.device) -> None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Provider:
    """One way to compute an operation."""

    name: str
    prepare: Callable[[Any, bool], Prepared]
    """From a case, and whether gradients are wanted."""
    role: Literal["official", "composition", "ours", "floor"]
    back_end: str = ""
    """Of providers with the same name the fastest back end is reported."""
    same_function: bool = True
    """False for a floor: less work than the operation's."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = tuple(DTYPES)
    needs_prompts: bool = False
    no_gradients: Mapping[str, str] = field(default_factory=dict)
    """Device types on which it has no gradients, and why."""
    reason: Callable[[torch.device], str | None] = _always
    """Why it cannot run on a device, beyond the above."""

    @property
    def label(self) -> str:
        """Name and back end."""
        return f"{self.name} [{self.back_end}]" if self.back_end else self.name

    def unavailable(self, shape: Shape, dtype: str, device: torch.device, mode: str) -> str | None:
        """Say why it cannot be measured; None when it can."""
        if device.type not in self.devices:
            return f"runs on {' or '.join(self.devices)}, the device is {device.type}"
        if dtype not in self.dtypes:
            return f"computes in {' or '.join(self.dtypes)}, not in {dtype}"
        if self.needs_prompts and not shape.prompts:
            return "without prompts this is plain attention"
        if mode != "forward" and device.type in self.no_gradients:
            return self.no_gradients[device.type]
        return self.reason(device)


def compare(found: Tensors, exact: Tensors, plain: Tensors) -> None:
    """Hold results against the float64 reference.

    Both the largest and the root-mean-square error of every result, relative to the truth's, are at
    most twice that of the plain reference at the same precision, plus `FLOOR`.

    Raises:
        WrongResultError: a result is missing or wrong; the message names it.
    """
    for name, truth in exact.items():
        if name not in found or found[name].shape != truth.shape:
            got = list(found[name].shape) if name in found else "nothing"
            raise WrongResultError(f"{name}: got {got}, expected {list(truth.shape)}")
        floor = FLOOR[plain[name].dtype] * torch.finfo(plain[name].dtype).eps
        errors, allowed = _errors(found[name], truth), _errors(plain[name], truth)
        for kind, error in errors.items():
            limit = 2 * allowed[kind] + floor
            # NaN is not at most anything.
            if not error <= limit:
                raise WrongResultError(f"{name}: {kind} error {error:.1e}, allowed {limit:.1e}")


def _errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    if not truth.numel():
        return {}
    difference = found.detach().double() - truth
    errors = {
        "largest": difference.abs().max() / truth.abs().max().clamp_min(1e-30),
        "mean": difference.norm() / truth.norm().clamp_min(1e-30),
    }
    return {kind: error.item() for kind, error in errors.items()}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for the one shape of a case."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def no_kernels(device: torch.device) -> str | None:
    """Say why the Triton kernels cannot be measured on a device."""
    interpreted = (
        "the Triton kernels run on the CPU only in an interpreter, whose time says nothing"
    )
    reason = kernels.unavailable_reason(device)
    return interpreted if reason is None and device.type == "cpu" else reason
