"""The check that every provider passes before it gets a figure."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tcpa import Savings

from .case import StepCase
from .provider import StepProvider, Tensors

FLOOR = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 16, torch.float64: 64}
"""Units in the last place that an error may have beyond twice that of the plain reference: fused
CPU kernels have a fast exponential, and in float64 the reference itself is the truth."""
STEP_FLOOR = {"float64": 1e-9, "float32": 1e-3, "autocast": 1e-3, "bfloat16": 1e-3}
"""Relative error that a step in a precision may always have."""


class WrongResultError(RuntimeError):
    """A provider computes something else; it gets no figure."""


class Skipped:
    """Providers that are skipped, and why: one that fails is no reason to lose the others."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.status = 0
        """Exit status: 1 if one computes something else, 2 if one cannot compute this."""

    def add(self, reason: Exception) -> None:
        """Keep a reason."""
        self.reasons.append(str(reason))
        self.status = 1 if isinstance(reason, WrongResultError) or self.status == 1 else 2

    def report(self, program: str) -> int:
        """Print the reasons and return the exit status."""
        for reason in self.reasons:
            print(f"{program}: left out: {reason}", file=sys.stderr)
        return self.status


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


@dataclass(frozen=True, slots=True)
class Answer:
    """What a step computed: the loss and all gradients (train), or the logits (eval)."""

    values: dict[str, np.ndarray]
    """float32 or float64, by name."""


class ReferenceCache:
    """What the plain form of every method computes, and how far off plain low precision is."""

    def __init__(self, case: StepCase, compute: Callable[[StepCase, StepProvider], Answer]) -> None:
        """Compute nothing yet; `compute` runs a plain form."""
        self._case, self._compute = case, compute
        self._answers: dict[tuple[str, str], Answer] = {}

    def prepare(self, provider: StepProvider) -> None:
        """Compute what a provider will be checked against."""
        for precision in _reference_precisions(provider):
            key = provider.method, precision
            if key not in self._answers:
                plain = StepProvider(
                    name=f"plain {provider.method}",
                    method=provider.method,
                    precision=precision,
                    savings=Savings.none(),
                    impl="reference",
                )
                self._answers[key] = self._compute(self._case, plain)

    def check(self, provider: StepProvider, answer: Answer) -> float:
        """Return a provider's error.

        In low precision twice the error of the plain form under autocast is allowed.

        Raises:
            WrongResultError: it is too large.
        """
        precisions = _reference_precisions(provider)
        exact, *low = (self._answers[provider.method, precision] for precision in precisions)
        error = largest_error(answer, exact)
        low_error = 2 * largest_error(low[0], exact) if low else 0.0
        allowed = STEP_FLOOR[provider.precision] + low_error
        if not error <= allowed:
            raise WrongResultError(
                f"provider {provider.name!r} differs from the plain form of its method by "
                f"{error:.1e} (allowed {allowed:.0e}); no figures of a wrong result"
            )
        return error


def _reference_precisions(provider: StepProvider) -> tuple[str, ...]:
    exact = provider.precision in ("float32", "float64")
    return (provider.precision,) if exact else ("float32", "autocast")


def largest_error(answer: Answer, exact: Answer) -> float:
    """Return the largest relative error over loss, logits and gradients, in the Euclidean norm.

    Infinity if something is missing, NaN if something is NaN.
    """
    if answer.values.keys() != exact.values.keys():
        return math.inf
    errors = [
        float(np.linalg.norm(answer.values[name] - value) / max(np.linalg.norm(value), 1e-30))
        for name, value in exact.values.items()
    ]
    # NaN compares as neither larger nor smaller: it has to be looked for.
    return math.nan if any(map(math.isnan, errors)) else max(errors)
