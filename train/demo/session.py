"""What the demo's commands show while they train, and the output folder of `demo`."""

import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import tcpa
from tcpa.provenance import commit, device_name, has_changes, now, version

from ...cli import UsageError, output_folder
from ..engine.precision import fast_dtype
from ..options.demo import DemoConfig, given
from .training import BATCH_SIZE, DemoEpoch, DemoOutcome, DemoTask, run_tasks

METRICS = "metrics.jsonl"
PROGRAM = "tcpa demo"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoScore:
    """A method over all seeds."""

    method: str
    accuracies: tuple[float, ...]
    """Test accuracy after the last epoch, percent, one per seed."""
    trainable: int
    """Trainable parameters, the head included."""
    seconds_per_epoch: float
    """Training time of an epoch, without testing."""
    implementation: str
    reason: str

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds, percent."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1), percent; None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def gain_over(self, other: "DemoScore") -> tuple[float, str]:
        """Return the mean gain in points, and the gains seed by seed as text."""
        gains = [a - b for a, b in zip(self.accuracies, other.accuracies, strict=True)]
        return statistics.fmean(gains), ", ".join(f"{gain:+.1f}" for gain in gains)


class DemoProgress:
    """Shows every epoch: a bar in a terminal, one plain line a run otherwise."""

    def __init__(self, runs: int, epochs: int, measured_on: str = "test") -> None:
        self.console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
        self._epochs, self._measured_on = epochs, measured_on
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=runs * epochs)

    def __enter__(self) -> "DemoProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def epoch(self, record: DemoEpoch) -> None:
        """Take note of one finished epoch."""
        name = f"{record.method}, seed {record.seed}"
        self._progress.update(self._task, advance=1, description=f"{name:<24}")
        if record.epoch == self._epochs:
            self.console.print(
                f"{name:<24} loss {record.loss:.3f}  train {record.train_accuracy:5.1f} %  "
                f"{self._measured_on} {record.test_accuracy:5.1f} %  {record.seconds:.2f} s/epoch"
            )


class DemoOutput:
    """The output folder: metrics as JSON lines, and what a command puts beside them."""

    def __init__(self, folder: Path, header: dict) -> None:
        """Create the folder, or accept one that an earlier demo filled; restart its metrics.

        Raises:
            UsageError: the folder holds other files, or cannot be written.
        """
        self.folder, self._metrics = folder, folder / METRICS
        with output_folder(folder):
            if any(folder.iterdir()) and not self._is_of_a_demo():
                raise UsageError(
                    f"--output: got {folder}, which holds other files, expected a new or empty "
                    "folder or one that an earlier demo made; choose another folder"
                )
            self._metrics.write_text("", encoding="utf-8")
        self.add("config", program=PROGRAM, **header)

    def add(self, kind: str, **record: object) -> None:
        """Append one JSON object to the metrics."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **record}) + "\n")

    def _is_of_a_demo(self) -> bool:
        if not self._metrics.is_file():
            return False
        text = self._metrics.read_text(encoding="utf-8", errors="replace")
        return f'"program": "{PROGRAM}"' in text.partition("\n")[0]


def train_all(
    config: DemoConfig, tasks: list[DemoTask]
) -> tuple[DemoOutput, list[DemoScore], list[DemoOutcome], Console]:
    """Train all tasks, showing and writing down every epoch, and the score of every method.

    Returns:
        The output folder, the scores in the order of the methods, the outcomes of the tasks, and
        where the rest is to be printed.
    """
    output = DemoOutput(config.output, _header(config, tasks))
    with DemoProgress(len(tasks), given(config.epochs)) as progress:

        def on_epoch(record: DemoEpoch) -> None:
            output.add("epoch", **asdict(record))
            progress.epoch(record)

        outcomes = run_tasks(tasks, on_epoch)
    by_method: dict[str, list[DemoOutcome]] = {}
    for task, outcome in zip(tasks, outcomes, strict=True):
        by_method.setdefault(task.method.name, []).append(outcome)
    # Rows that train for few epochs, much at a time, state the fastest one.
    seconds = min if config.methods else statistics.median
    scores = [
        DemoScore(
            method=name,
            accuracies=tuple(outcome.accuracy for outcome in own),
            trainable=own[0].trainable,
            seconds_per_epoch=seconds(epoch.seconds for outcome in own for epoch in outcome.epochs),
            implementation=own[0].implementation[0],
            reason=own[0].implementation[1],
        )
        for name, own in by_method.items()
    ]
    for score in scores:
        output.add("summary", **asdict(score), mean=score.mean)
    return output, scores, outcomes, progress.console


def _header(config: DemoConfig, tasks: list[DemoTask]) -> dict:
    """Describe the run for the first line of the metrics."""
    device = tasks[0].device
    return {
        "seeds": config.seeds,
        "epochs": config.epochs,
        "quick": config.quick,
        "batch_size": BATCH_SIZE,
        "methods": list({task.method.name: asdict(task.method) for task in tasks}.values()),
        "device": str(device),
        "precision": str(fast_dtype(device)),
        "versions": {"tcpa": tcpa.__version__, "torch": torch.__version__},
    }


def provenance(device: torch.device) -> str:
    """Return date, machine, versions and commit of this process, in one sentence."""
    machine = f"{os.cpu_count()} CPU cores" if device.type == "cpu" else device_name(device)
    precision = str(fast_dtype(device)).removeprefix("torch.")
    changed = " with changes" if has_changes() else ""
    return (
        f"{now()[:10]}, {machine}, {precision}, torch {version('torch')}, commit "
        f"{commit(7) or 'unknown'}{changed}."
    )
