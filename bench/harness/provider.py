"""What a provider is: one way to compute an operation, or the step of a method."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tcpa import AutoVPConfig, DAMVPConfig, InputConfig, Savings, VPConfig
from tcpa.dispatch import Impl

from ... import kernels
from ...cli import UsageError
from .case import DTYPES, Shape

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Mode = Literal["forward", "backward", "both"]


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


CLUSTERS = 16
"""Clusters of DAM-VP."""

INPUT_PROMPTS: dict[str, InputConfig] = {
    "vp": VPConfig(),
    "dam-vp": DAMVPConfig(num_clusters=CLUSTERS),
    "autovp": AutoVPConfig(),
}
"""Method -> what it does to the image; with "+tcpa" behind its name, TCPA's prompts come on top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProvider:
    """One way to compute the step of one method."""

    name: str
    method: str = "tcpa"
    """"tcpa" (on Fourier prompts), "vpt+tcpa", "vpt-deep", "vfpt": all with as many prompt rows.
    Those of `INPUT_PROMPTS`, with "+tcpa" or without. The frozen backbone without prompts: "linear"
    or, with the gradients of all tokens as if there were prompts, "linear-backward"."""
    precision: str = "float32"
    """float32 and float64: everything. autocast: bfloat16 over float32 weights. bfloat16: frozen
    weights and residual stream are stored in it, prompts and head in float32."""
    savings: Savings = field(default_factory=Savings)
    impl: Impl = "auto"
    compiled: bool = False
    """Under torch.compile."""
    folded: bool = False
    """Scale and shift of every frozen LayerNorm moved into the frozen layer behind it."""
    graph: bool = False
    """The whole step, optimiser included, replayed as one CUDA graph."""

    @property
    def input_prompt(self) -> InputConfig | None:
        """What is done to the image."""
        return INPUT_PROMPTS.get(self.method.removesuffix("+tcpa"))

    @property
    def base_method(self) -> str | None:
        """The same method without TCPA; None where there is none of it."""
        own = {"tcpa": "vfpt", "vpt+tcpa": "vpt-deep"}
        base = own.get(self.method, self.method.removesuffix("+tcpa"))
        return None if base == self.method else base


def choose(texts: Sequence[str], names: Iterable[str]) -> set[str]:
    """Return the providers that are named, in full or else in part.

    Raises:
        UsageError: a text fits none.
    """
    known = list(dict.fromkeys(names))
    chosen: set[str] = set()
    for text in texts:
        exact = {name for name in known if name.lower() == text.lower()}
        found = exact or {name for name in known if text.lower() in name.lower()}
        if not found:
            raise UsageError(
                f"--provider: got {text!r}, expected a part of one of "
                f"{', '.join(map(repr, known))}; correct it"
            )
        chosen |= found
    return chosen
