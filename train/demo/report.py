"""What the demo says: progress while it trains, one table with its note at the end."""

import statistics
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .engine import Epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table: a method over all seeds."""

    method: str
    accuracies: tuple[float, ...]
    """Test accuracy after the last epoch, percent, one per seed."""
    trainable: int
    """Trained values, the head included."""
    seconds_per_epoch: float
    """Median training time of an epoch, without testing."""
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


class Reporter:
    """Shows every epoch: a bar in a terminal, one plain line a run otherwise."""

    def __init__(self, total_epochs: int, epochs: int, measured_on: str = "test") -> None:
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
        self._task = self._progress.add_task("starting", total=total_epochs)

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def epoch(self, record: Epoch) -> None:
        """Take note of one finished epoch."""
        name = f"{record.method}, seed {record.seed}"
        self._progress.update(self._task, advance=1, description=f"{name:<24}")
        if record.epoch == self._epochs:
            self.console.print(
                f"{name:<24} loss {record.loss:.3f}  train {record.train_accuracy:5.1f} %  "
                f"{self._measured_on} {record.test_accuracy:5.1f} %  {record.seconds:.2f} s/epoch"
            )


def table(rows: list[Row]) -> Table:
    """Lay out the comparison."""
    grid = Table(title="Handwritten digits on a frozen ViT pretrained on generated images")
    grid.add_column("method")
    for heading in ("accuracy, %", "spread, %", "trained values", "s / epoch"):
        grid.add_column(heading, justify="right")
    grid.add_column("implementation")
    for row in rows:
        spread = "-" if row.spread is None else f"{row.spread:.1f}"
        grid.add_row(
            row.method,
            f"{row.mean:.1f}",
            spread,
            f"{row.trainable:,}",
            f"{row.seconds_per_epoch:.2f}",
            row.implementation,
        )
    return grid


def verdict(rows: list[Row]) -> list[str]:
    """Say in words how the methods compare, also where the comparison is unwelcome.

    The last row is TCPA; differences are between runs of the same seed.
    """
    *others, tcpa = rows
    lines = []
    for other in others:
        gains = [a - b for a, b in zip(tcpa.accuracies, other.accuracies, strict=True)]
        gain = statistics.fmean(gains)
        each = ", ".join(f"{value:+.1f}" for value in gains)
        beats = "beats" if gain > 0 else "does NOT beat"
        lines.append(f"TCPA {beats} {other.method} here: {gain:+.1f} points (by seed: {each})")
    return lines
