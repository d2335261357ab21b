"""The demo's runs, one method with one seed each, and how they share the machine's cores."""

import json
import os
import queue
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import tcpa

from .backbone import autocast
from .data import make_split
from .engine import Epoch, Method, Split, measure, train_method

PROMPT_ROWS = 20
TUNED = Path(__file__).with_name("tuned.json")

PROMPTS: dict[str, tcpa.PromptConfig | None] = {
    "linear probe": None,
    "VPT-deep": tcpa.VPTConfig(length=PROMPT_ROWS),
    "TCPA": tcpa.TCPAConfig(
        cls_pool_size=PROMPT_ROWS // 2,
        image_pool_size=PROMPT_ROWS // 2,
        cls_top_k=5,
        image_top_k=5,
        prompt_transform="identity",
        prompt_dropout=0.0,
        random_selection_epochs=1,
    ),
}
"""What is compared. VPT-deep and TCPA have as many prompt rows in every block, prompts that are
trained directly and no dropout, so that the coordination is all that tells them apart."""


def chosen_methods() -> tuple[Method, ...]:
    """Return the methods, each with the optimiser settings that `tune-demo` recorded for it."""
    record = json.loads(TUNED.read_text(encoding="utf-8"))
    return tuple(
        Method(name=name, prompts=prompts, **record["chosen"][name])
        for name, prompts in PROMPTS.items()
    )


def probe_strength() -> float:
    """Return the inverse penalty that `tune-demo` recorded for logistic regression."""
    return json.loads(TUNED.read_text(encoding="utf-8"))["probe_strength"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One run."""

    method: Method
    seed: int
    epochs: int
    device: torch.device
    part: str = "test"
    """Which images, see `make_split`."""
    save_to: Path | None = None
    """Folder for the trained adapter."""
    then_test: bool = False
    """Measure the trained model once on the test images, whatever its part is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run leaves behind besides its epochs."""

    trainable: int
    implementation: tuple[str, str]
    test_accuracy: float | None = None
    """Percent, where `Task.then_test` asks for it."""


EpochHook = Callable[[Epoch], None]
OutcomeHook = Callable[[Task, Outcome], None]


def ignore(*_: object) -> None:
    """Take note of nothing."""


def split_on(device: torch.device, part: str = "test") -> Split:
    """Return the images of `make_split` on a device."""
    return Split(*(tensor.to(device) for tensor in make_split(part)))


def run_task(task: Task, on_epoch: EpochHook) -> Outcome:
    """Carry out one run."""
    split = split_on(task.device, task.part)
    model = train_method(task.method, split, seed=task.seed, epochs=task.epochs, on_epoch=on_epoch)
    if task.save_to is not None:
        model.save_pretrained(task.save_to)
    tested = measure(model, split_on(task.device)) if task.then_test else None
    with autocast(task.device):
        implementation = model.implementation
    return Outcome(
        trainable=model.num_trainable, implementation=implementation, test_accuracy=tested
    )


def run_tasks(
    tasks: list[Task], on_epoch: EpochHook, on_outcome: OutcomeHook = ignore
) -> list[Outcome]:
    """Carry out all runs and report their epochs, and their outcomes, as they come.

    On a CPU every core takes one run at a time, on one thread each: the matrices are small, and
    threads that wait for each other would cost more than they bring. Elsewhere, one run after the
    other. The results are the same.
    """
    workers = min(len(tasks), os.cpu_count() or 1)
    outcomes: dict[Task, Outcome] = {}

    def take(task: Task, outcome: Outcome) -> None:
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
                if isinstance(report, Epoch):
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


def _run_in_worker(task: Task) -> None:
    _reports.put((task, run_task(task, _reports.put)))


def _next_report(reports: Any, futures: list[Any]) -> Epoch | tuple[Task, Outcome]:
    """Wait for an epoch or an outcome; raise what a failed worker raised."""
    while True:
        try:
            return reports.get(timeout=1.0)
        except queue.Empty:
            for future in futures:
                if future.done():
                    future.result()
