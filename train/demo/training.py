"""Train methods on the digits: one loop for all, and runs side by side on the machine's cores."""

import os
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tcpa

from ..engine.step import Step
from .backbone import numerics
from .digits import DigitSplit, make_split
from .methods import DemoMethod, wrap_backbone

BATCH_SIZE = 32
WARMUP_SHARE = 0.1
"""Share of the steps over which the learning rate rises; a cosine to zero follows."""


@dataclass(frozen=True, slots=True)
class DemoEpoch:
    """What one epoch of training gave; `test_accuracy` is None where it was not measured."""

    method: str
    seed: int
    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float | None
    seconds: float


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak learning rate for step 0..steps - 1: warm-up, then a cosine."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = torch.tensor((step - warmup) / max(1, steps - warmup))
    return float((1 + torch.cos(torch.pi * progress)) / 2)


@torch.no_grad()
def predict(model: tcpa.PromptedViT, images: Tensor) -> Tensor:
    """Return the digits that the model reads in images `[N, 1, 32, 32]`: int64 `[N]`."""
    model.eval()
    with numerics(images.device).context(images.device):
        return torch.cat([model(x).argmax(1) for x in images.split(256)])


def measure(model: tcpa.PromptedViT, split: DigitSplit) -> float:
    """Return the share of test images that the model reads rightly, in percent."""
    right = predict(model, split.test_images) == split.test_labels
    return 100 * int(right.sum()) / len(right)


def build_model(method: DemoMethod, split: DigitSplit, *, seed: int) -> tcpa.PromptedViT:
    """Put a method on a fresh copy of the shipped backbone, with the initial values of a seed.

    Raises:
        ValueError: that cannot be done; the message says why.
    """
    device = split.train_images.device
    torch.manual_seed(seed)
    model = wrap_backbone(method).to(device)
    if method.input_prompt is not None and method.input_prompt.fits_before(0) == "clusters":
        with numerics(device).context(device):
            model.fit_clusters(split.train_images)
    return model


def train_epochs(
    model: tcpa.PromptedViT, method: DemoMethod, split: DigitSplit, *, seed: int, epochs: int
) -> Iterator[DemoEpoch]:
    """Train what `build_model` returned, and yield after every epoch.

    The seed decides the order of the images; dropout goes on with torch's generator. The test
    images are only looked at, every fifth epoch and after the last; nothing is chosen by them.
    """
    device, count = split.train_images.device, len(split.train_labels)
    optimizer = torch.optim.AdamW(
        model.trainable_parameters(), method.learning_rate, weight_decay=method.weight_decay
    )
    order = torch.Generator().manual_seed(seed)
    steps = epochs * -(-count // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    step = Step(model, optimizer, numerics=numerics(device))
    for epoch in range(epochs):
        start = time.perf_counter()
        model.train()
        model.set_epoch(epoch)
        total, hits = torch.zeros((), device=device), torch.zeros((), device=device)
        for index in torch.randperm(count, generator=order).to(device).split(BATCH_SIZE):
            labels = split.train_labels[index]
            found = step(split.train_images[index], labels)
            schedule.step()
            total += found.losses[0] * len(labels)
            hits += (found.logits.argmax(1) == labels).sum()
        # Reading the sums waits for the device, so that the epoch's seconds are whole.
        loss, accuracy = float(total) / count, 100 * float(hits) / count
        seconds = time.perf_counter() - start
        measured = (epoch + 1) % 5 == 0 or epoch + 1 == epochs
        test = measure(model, split) if measured else None
        yield DemoEpoch(method.name, seed, epoch + 1, loss, accuracy, test, seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoTask:
    """One run: a method with a seed."""

    method: DemoMethod
    seed: int
    epochs: int
    device: torch.device
    part: str = "test"
    """Which images, see `make_split`."""
    save_to: Path | None = None
    """Folder for the adapter."""
    then_test: bool = False
    """Measure the model once on the test images after the training, whatever its part is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOutcome:
    """What a run leaves behind."""

    epochs: tuple[DemoEpoch, ...]
    trainable: int
    """Trainable parameters, the head included."""
    implementation: tuple[str, str]
    then_tested: float | None = None
    """Percent, where `DemoTask.then_test` asks for it."""

    @property
    def accuracy(self) -> float:
        """Accuracy on the images to measure on after the last epoch, percent."""
        last = self.epochs[-1].test_accuracy
        assert last is not None
        return last

    @property
    def fastest_epoch(self) -> float:
        """Seconds. Other work on the machine slows epochs down, and makes none faster."""
        return min(epoch.seconds for epoch in self.epochs)


EpochHook = Callable[[DemoEpoch], None]
OutcomeHook = Callable[[DemoTask, DemoOutcome], None]


def run_task(task: DemoTask, on_epoch: EpochHook) -> DemoOutcome:
    """Carry out one run."""
    split = make_split(task.part, task.device)
    model = build_model(task.method, split, seed=task.seed)
    epochs = []
    for epoch in train_epochs(model, task.method, split, seed=task.seed, epochs=task.epochs):
        epochs.append(epoch)
        on_epoch(epoch)
    if task.save_to is not None:
        model.save_pretrained(task.save_to)
    tested = measure(model, make_split("test", task.device)) if task.then_test else None
    with numerics(task.device).context(task.device):
        implementation = model.implementation
    return DemoOutcome(
        epochs=tuple(epochs),
        trainable=model.num_trainable,
        implementation=implementation,
        then_tested=tested,
    )


def run_tasks(
    tasks: list[DemoTask], on_epoch: EpochHook, on_outcome: OutcomeHook = lambda *_: None
) -> list[DemoOutcome]:
    """Carry out all runs and report their epochs, and their outcomes, as they come.

    On a CPU every core takes one run at a time, on one thread each: the matrices are small, and
    threads that wait for each other would cost more than they bring. Elsewhere, one run after the
    other. The results are the same.
    """
    workers = min(len(tasks), os.cpu_count() or 1)
    outcomes: dict[DemoTask, DemoOutcome] = {}

    def take(task: DemoTask, outcome: DemoOutcome) -> None:
        outcomes[task] = outcome
        on_outcome(task, outcome)

    if workers == 1 or tasks[0].part == "quick" or tasks[0].device.type != "cpu":
        for task in tasks:
            take(task, run_task(task, on_epoch))
        return [outcomes[task] for task in tasks]
    context = get_context("spawn")
    reports = context.Queue()
    with ProcessPoolExecutor(workers, context, _start_worker, (reports,)) as pool:
        # The longest runs first, so that no core idles at the end.
        futures = [pool.submit(_run_in_worker, task) for task in reversed(tasks)]
        try:
            while len(outcomes) < len(set(tasks)):
                report = _next_report(reports, futures)
                if isinstance(report, DemoEpoch):
                    on_epoch(report)
                else:
                    take(*report)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [outcomes[task] for task in tasks]


_reports: Any = None


def _start_worker(reports: Any) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(1)


def _run_in_worker(task: DemoTask) -> None:
    _reports.put((task, run_task(task, _reports.put)))


def _next_report(reports: Any, futures: list[Any]) -> DemoEpoch | tuple[DemoTask, DemoOutcome]:
    """Wait for an epoch or an outcome; raise what a failed worker raised."""
    while True:
        try:
            return reports.get(timeout=1.0)
        except queue.Empty:
            for future in futures:
                if future.done():
                    future.result()
