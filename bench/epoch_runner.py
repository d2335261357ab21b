"""A method with its optimiser, as `tcpa-bench epoch` trains and tests it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cli import UsageError
from .harness.check import Answer, LeftOut, Truths, answer_of
from .harness.model import build_model, capture, loss_of, make_batch, run_model
from .harness.provider import WrongResultError
from .providers.step import StepCase, StepProvider


class Runner:
    """A method with its optimiser."""

    def __init__(self, case: StepCase, provider: StepProvider) -> None:
        self._precision = provider.precision
        self._model = build_model(case, provider)
        self._run: Any = torch.compile(self._model) if provider.compiled else self._model
        parameters = self._model.trainable_parameters()
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-4, capturable=provider.graph)
        self._graph = GraphStep(self._step) if provider.graph else None
        self._train = True

    def use(self, mode: str) -> None:
        """Switch to "train" or "eval"."""
        self._train = mode == "train"
        self._model.train(self._train)
        self._model.set_epoch(0)

    def run(self, images: Tensor, labels: Tensor) -> None:
        """Train or test on a batch."""
        if not self._train:
            with torch.inference_mode():
                run_model(self._run, images, self._precision)
        elif self._graph is not None:
            self._graph.run(images, labels)
        else:
            self._step(images, labels)

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = self._backward(images, labels)
        self._optimizer.step()
        return loss.detach()

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self._run, images, labels, self._precision)
        loss.backward()
        return loss

    def warm_up(self, case: StepCase) -> None:
        """Train and test on a batch: compilation and recording are done with after it."""
        images, labels = make_batch(case, self._model)
        for mode in ("train", "eval"):
            self.use(mode)
            self.run(images, labels)

    def answer(self, case: StepCase) -> Answer:
        """Compute what a case asks for and change nothing."""
        self.use(case.mode)
        images, labels = make_batch(case, self._model)
        if case.mode == "train":
            found = answer_of(case, self._model, self._backward(images, labels))
            self._optimizer.zero_grad(set_to_none=True)
            return found
        with torch.inference_mode():
            return answer_of(case, self._model, run_model(self._run, images, self._precision))


class GraphStep:
    """A training step that is recorded with its first batch and replayed with those of its size."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._step = step
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], Tensor] | None = None

    def run(self, images: Tensor, labels: Tensor) -> None:
        """Train on a batch; the smaller one at the end of an epoch is not replayed."""
        if self._replay is None:
            self._inputs = [images.clone(), labels.clone()]
            self._replay = capture(lambda: self._step(*self._inputs))
        if images.shape != self._inputs[0].shape:
            self._step(images, labels)
            return
        for kept, new in zip(self._inputs, (images, labels), strict=True):
            kept.copy_(new)
        self._replay()


def checked_runners(
    case: StepCase, chosen: Sequence[StepProvider], left_out: LeftOut
) -> dict[str, Runner]:
    """Build all methods, compare what they compute with their plain forms and warm them up.

    Two images say what a batch would, but what is compiled or recorded is so for one size.

    Args:
        case: model, batch and device; the mode is not looked at.
        chosen: the methods.
        left_out: takes those that fail, except for the first.

    Raises:
        WrongResultError: the first one computes something else.
        UsageError: it cannot be computed here.
    """
    fixed = any(provider.compiled for provider in chosen)
    cases = [
        replace(case, mode=mode, batch=case.batch if fixed else min(case.batch, 2))
        for mode in ("train", "eval")
    ]
    truths = [Truths(one) for one in cases]
    runners: dict[str, Runner] = {}
    for provider in chosen:
        try:
            runner = Runner(case, provider)
            for one, truth in zip(cases, truths, strict=True):
                truth.prepare(provider)
                truth.check(provider, runner.answer(one))
            runner.warm_up(case)
        except Exception as error:
            # Whatever keeps it from being computed is what the user has to know.
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            if not isinstance(error, WrongResultError):
                where = f"{provider.name}, --model {case.model} --batch {case.batch}"
                error = UsageError(f"{where}: {reason}")
            if provider is chosen[0]:
                raise error from None
            left_out.add(error)
        else:
            runners[provider.name] = runner
    return runners
