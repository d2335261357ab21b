"""Whether a provider of a step computes what its method does: loss, logits and gradients."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tcpa import Savings

from ..providers.step import StepCase, StepProvider
from .model import build_model, loss_of, make_batch, run_model
from .provider import WrongResultError

FLOOR = {"float64": 1e-9, "float32": 1e-3, "autocast": 1e-3, "bfloat16": 1e-3}
"""Relative error that a precision may always have."""

JUDGE_CHUNK = 8
"""Images that the judge computes at once, so that its memory does not grow with the batch."""


class LeftOut:
    """Providers that are not measured, and why: one that fails is no reason to lose the others."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.status = 0
        """Exit status: 1 if one computes something else, 2 if one cannot compute this."""

    def add(self, reason: Exception) -> None:
        """Keep a reason."""
        self.reasons.append(str(reason))
        self.status = 1 if isinstance(reason, WrongResultError) or self.status == 1 else 2

    def tell(self, program: str) -> int:
        """Print the reasons and return the exit status."""
        for reason in self.reasons:
            print(f"{program}: left out: {reason}", file=sys.stderr)
        return self.status


@dataclass(frozen=True, slots=True)
class Answer:
    """What a step computed: the loss and all gradients (train), or the logits (eval)."""

    values: dict[str, np.ndarray]
    """float32 or float64, by name."""
    trained: int
    """Trained values of the model."""


def answer_of(case: StepCase, model: Any, result: torch.Tensor) -> Answer:
    """Collect what a step computed.

    Args:
        case: what it was to compute.
        model: with the gradients in its parameters.
        result: the loss or the logits.
    """
    if case.mode == "eval":
        return Answer({"logits": _array(result)}, model.num_trainable)
    gradients = {
        name: _array(p.grad)
        for name, p in model.trainable_named_parameters().items()
        if p.grad is not None
    }
    return Answer({"loss": _array(result), **gradients}, model.num_trainable)


def plain_answer(case: StepCase, provider: StepProvider) -> Answer:
    """Compute a step without an optimiser, a few images at a time.

    Loss and match distance are means over the images, so means over equal parts are the same.
    """
    model = build_model(case, provider)
    images, labels = make_batch(case, model)
    chunks = list(zip(images.split(JUDGE_CHUNK), labels.split(JUDGE_CHUNK), strict=True))
    if case.mode == "eval":
        model.eval()
        with torch.no_grad():
            logits = [run_model(model, part, provider.precision) for part, _ in chunks]
        return answer_of(case, model, torch.cat(logits))
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    for part, truth in chunks:
        share = loss_of(model, part, truth, provider.precision) * (len(part) / len(images))
        share.backward()
        loss += share.detach()
    return answer_of(case, model, loss)


class Truths:
    """What the plain form of every method computes, and how far off plain low precision is."""

    def __init__(
        self, case: StepCase, compute: Callable[[StepCase, StepProvider], Answer] = plain_answer
    ) -> None:
        """Compute nothing yet.

        Args:
            case: what is computed.
            compute: how the plain forms are.
        """
        self._case, self._compute = case, compute
        self._answers: dict[tuple[str, str], Answer] = {}

    def prepare(self, provider: StepProvider) -> None:
        """Compute what a provider will be checked against."""
        for precision in self._precisions(provider):
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

    @staticmethod
    def _precisions(provider: StepProvider) -> tuple[str, ...]:
        if provider.precision in ("float32", "float64"):
            return (provider.precision,)
        return "float32", "autocast"

    def check(self, provider: StepProvider, answer: Answer) -> float:
        """Return a provider's error.

        In low precision twice the error of the plain form under autocast is allowed.

        Raises:
            WrongResultError: it is too large.
        """
        exact, *low = (self._answers[provider.method, p] for p in self._precisions(provider))
        error = largest_error(answer, exact)
        allowed = FLOOR[provider.precision] + (2 * largest_error(low[0], exact) if low else 0.0)
        if not error <= allowed:
            raise WrongResultError(
                f"provider {provider.name!r} differs from the plain form of its method by "
                f"{error:.1e} (allowed {allowed:.0e}); no figures of a wrong result"
            )
        return error


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


def _array(tensor: torch.Tensor | None) -> np.ndarray:
    assert tensor is not None
    exact = tensor.detach().cpu()
    return (exact if exact.dtype == torch.float64 else exact.float()).numpy().copy()
