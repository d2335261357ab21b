"""Choose learning rate and weight decay of the tables' rows on the digits.

    python -m tcpa.train tune-demo --methods all --output train/demo/tuned_rows.json

First every rate with the smallest decay, then the other decays with the rate that was best: a part
of the grid, measured on folds of the training images. On a tie the smaller rate, then the smaller
decay wins. The test images have no part in it. Every measurement is written down as it comes, so
that the command goes on where it was stopped.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...cli import choose_device, require_writable
from ..files import write_json
from .config import TuneConfig
from .engine import Epoch
from .report import Reporter
from .rows import Choices, describe, find_rows, tuned_settings
from .tasks import Outcome, Task, run_tasks
from .tune import Pair, best_pair, measured_on, run_name

RULE = (
    "best mean accuracy over the folds, first among the rates with the smallest decay, then among "
    "the decays with that rate; on a tie the smaller one"
)


@dataclass(frozen=True, slots=True)
class _Trial:
    row: Choices
    pair: Pair
    fold: str


class _Record:
    """The file: what was measured of every row, and what was chosen."""

    def __init__(self, config: TuneConfig, rows: list[Choices], device: torch.device) -> None:
        self._config = config
        self.rows = tuned_settings(config.file)
        for row in rows:
            made_with = {
                "choices": describe(row),
                "epochs": config.num_epochs,
                "device": str(device),
                "torch": torch.__version__,
            }
            found = self.rows.get(row.name, {})
            same = all(found.get(name) == value for name, value in made_with.items())
            measured = found.get("measured", []) if same else []
            self.rows[row.name] = made_with | {"measured": measured}

    def accuracies(self, name: str) -> dict[tuple[float, float, str], float]:
        """Return what was measured of a row: rate, decay and fold -> percent."""
        return {tuple(where): accuracy for *where, accuracy in self.rows[name]["measured"]}

    def add(self, trial: _Trial, accuracy: float) -> None:
        self.rows[trial.row.name]["measured"].append([*trial.pair, trial.fold, accuracy])
        self.save()

    def mean(self, name: str, pair: Pair) -> float:
        found = self.accuracies(name)
        return statistics.fmean(found[*pair, fold] for fold in measured_on(self._config))

    def choose(self, name: str, pair: Pair) -> None:
        self.rows[name] |= {"learning_rate": pair[0], "weight_decay": pair[1]}
        self.rows[name] |= {"folds": list(measured_on(self._config))}

    def save(self) -> None:
        ordered: dict[str, Any] = {"rule": RULE, "rows": self.rows}
        write_json(self._config.file, ordered)


def tune_rows(config: TuneConfig) -> Path:
    """Measure what is missing and write the record.

    Raises:
        UsageError: there is no such row, or the record cannot be read or written.
    """
    device = choose_device(config.device)
    rows, reasons = find_rows(config.methods or ())
    require_writable(config.file)
    record = _Record(config, rows, device)
    first, *others = sorted(config.weight_decays)
    rates = sorted(config.rates)
    total = len(rows) * (len(rates) + len(others)) * config.num_folds * config.num_epochs
    best: dict[str, Pair] = {}
    with Reporter(total, config.num_epochs, "held-out fold") as reporter:

        def measure(pairs: dict[str, list[Pair]]) -> None:
            _measure(config, device, record, reporter, rows, pairs)

        measure({row.name: [(rate, first) for rate in rates] for row in rows})
        for row in rows:
            best[row.name] = best_pair(
                {(rate, first): record.mean(row.name, (rate, first)) for rate in rates}
            )
        measure({name: [(pair[0], decay) for decay in others] for name, pair in best.items()})
    for row in rows:
        rate, _ = best[row.name]
        pairs = [(rate, decay) for decay in (first, *others)]
        pair = best_pair({pair: record.mean(row.name, pair) for pair in pairs})
        record.choose(row.name, pair)
        accuracy = record.mean(row.name, pair)
        reporter.console.print(f"{run_name(row.name, pair)} ({accuracy:.1f} % on held-out images)")
    record.save()
    for name, reason in reasons.items():
        reporter.console.print(f"{name}: left out: {reason}", soft_wrap=True)
    reporter.console.print(f"wrote {config.file}")
    return config.file


def _measure(
    config: TuneConfig,
    device: torch.device,
    record: _Record,
    reporter: Reporter,
    rows: list[Choices],
    pairs: dict[str, list[Pair]],
) -> None:
    """Train what is not in the record."""
    trials: dict[Task, _Trial] = {}
    for row in rows:
        known = record.accuracies(row.name)
        for pair in pairs[row.name]:
            for seed, fold in enumerate(measured_on(config)):
                if (*pair, fold) in known:
                    continue
                method = row.method(*pair, name=run_name(row.name, pair))
                epochs = config.num_epochs
                task = Task(method=method, seed=seed, epochs=epochs, device=device, part=fold)
                trials[task] = _Trial(row, pair, fold)
    final: dict[tuple[str, int], float] = {}

    def on_epoch(epoch: Epoch) -> None:
        reporter.epoch(epoch)
        if epoch.epoch == config.num_epochs and epoch.test_accuracy is not None:
            final[epoch.method, epoch.seed] = epoch.test_accuracy

    def on_outcome(task: Task, _: Outcome) -> None:
        record.add(trials[task], final[task.method.name, task.seed])

    if trials:
        run_tasks(list(trials), on_epoch, on_outcome)
