"""Choose learning rate and weight decay on folds of the training images, by one rule for all.

    python -m tcpa.train tune-demo --output train/demo/tuned.json
    python -m tcpa.train tune-demo --methods all --output train/demo/tuned_rows.json

The demo's methods are trained with every pair of the grid, a row of the paper's tables with every
rate and the smallest decay, then with the other decays and the rate that was best. The best mean
over the folds wins, on a tie the smaller rate, then the smaller decay. The demo reads the record.
The 797 test images have no part in it. Measurements of rows are written down as they come, so that
the command resumes where it was stopped.
"""

import json
import statistics
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ...cli import choose_device, require_writable, write_results
from ..options.demo import TuneConfig, given
from ..storage import write_json
from .digits import FOLDS, best_strength
from .methods import PROMPTS, DemoMethod, describe, find_rows, tuned_settings
from .session import DemoProgress
from .training import DemoOutcome, DemoTask, run_tasks

Pair = tuple[float, float]
"""Learning rate and weight decay."""

ROWS_RULE = (
    "best mean accuracy over the folds, first among the rates with the smallest decay, then among "
    "the decays with that rate; on a tie the smaller one"
)


def tune(config: TuneConfig) -> Path:
    """Train what is asked for and write the record.

    Raises:
        UsageError: there is no such row, or the record cannot be read or written.
    """
    return (_tune_methods if config.methods is None else _tune_rows)(config)


def _tune_methods(config: TuneConfig) -> Path:
    device, output = choose_device(config.device), given(config.output)
    require_writable(output)
    pairs = sorted(product(given(config.learning_rates), config.weight_decays))
    methods = {
        (name, pair): DemoMethod(name=name, prompts=prompts).tuned(*pair)
        for name, prompts in PROMPTS.items()
        for pair in pairs
    }
    tasks = [task for method in methods.values() for task in _on_folds(config, method, device)]
    with DemoProgress(len(tasks), given(config.epochs), "held-out fold") as progress:
        outcomes = iter(run_tasks(tasks, progress.epoch))
    means: dict[str, dict[Pair, float]] = {name: {} for name in PROMPTS}
    for name, pair in methods:
        means[name][pair] = statistics.fmean(
            next(outcomes).accuracy for _ in range(given(config.folds))
        )
    chosen = {name: best_pair(by_pair) for name, by_pair in means.items()}
    record = {
        "rule": "best mean accuracy over the folds; on a tie the smaller rate, then decay",
        "chosen": {
            name: {"learning_rate": rate, "weight_decay": decay}
            for name, (rate, decay) in chosen.items()
        },
        "probe_strength": best_strength(),
        "accuracy_on_folds": {
            name: [[*pair, accuracy] for pair, accuracy in by_pair.items()]
            for name, by_pair in means.items()
        },
        **{key: value for key, value in asdict(config).items() if key not in ("output", "methods")},
        "device": str(device),
        "torch": torch.__version__,
    }
    write_results(output, json.dumps(record, indent=2) + "\n", "--output")
    for name, pair in chosen.items():
        told = f"{methods[name, pair].name} ({means[name][pair]:.1f} % on held-out folds)"
        progress.console.print(told)
    progress.console.print(f"wrote {output}")
    return output


class _RowsRecord:
    """The file of the rows: what was measured of each, and what was chosen."""

    def __init__(self, config: TuneConfig, rows: list[DemoMethod], device: torch.device) -> None:
        self._file, self._folds = given(config.output), measured_on(config)
        self.rows = tuned_settings(self._file)
        for row in rows:
            made_with = {
                "choices": describe(row),
                "epochs": given(config.epochs),
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

    def add(self, name: str, task: DemoTask, accuracy: float) -> None:
        pair = [task.method.learning_rate, task.method.weight_decay]
        self.rows[name]["measured"].append([*pair, task.part, accuracy])
        self.save()

    def best(self, name: str, pairs: list[Pair]) -> tuple[Pair, float]:
        """Return the best of some pairs and its mean accuracy."""
        found, folds = self.accuracies(name), self._folds
        means = {pair: statistics.fmean(found[*pair, fold] for fold in folds) for pair in pairs}
        pair = best_pair(means)
        return pair, means[pair]

    def choose(self, name: str, pair: Pair) -> None:
        rate, decay = pair
        chosen = {"learning_rate": rate, "weight_decay": decay, "folds": list(self._folds)}
        self.rows[name] |= chosen

    def save(self) -> None:
        content: dict[str, Any] = {"rule": ROWS_RULE, "rows": self.rows}
        write_json(self._file, content)


def _tune_rows(config: TuneConfig) -> Path:
    device, output = choose_device(config.device), given(config.output)
    rows, reasons = find_rows(config.methods or ())
    require_writable(output)
    record = _RowsRecord(config, rows, device)
    first, *others = sorted(config.weight_decays)
    by_rate = [(rate, first) for rate in sorted(given(config.learning_rates))]
    runs = len(rows) * (len(by_rate) + len(others)) * given(config.folds)
    with DemoProgress(runs, given(config.epochs), "held-out fold") as progress:

        def measure(pairs: dict[str, list[Pair]]) -> None:
            """Train what is not in the record."""
            row_of_task: dict[DemoTask, str] = {}
            for row in rows:
                known = record.accuracies(row.name)
                for pair in pairs[row.name]:
                    for task in _on_folds(config, row.tuned(*pair), device):
                        if (*pair, task.part) not in known:
                            row_of_task[task] = row.name

            def on_outcome(task: DemoTask, outcome: DemoOutcome) -> None:
                record.add(row_of_task[task], task, outcome.accuracy)

            if row_of_task:
                run_tasks(list(row_of_task), progress.epoch, on_outcome)

        measure({row.name: by_rate for row in rows})
        rates = {row.name: record.best(row.name, by_rate)[0][0] for row in rows}
        measure({name: [(rate, decay) for decay in others] for name, rate in rates.items()})
    for row in rows:
        pairs = [(rates[row.name], decay) for decay in (first, *others)]
        pair, accuracy = record.best(row.name, pairs)
        record.choose(row.name, pair)
        told = f"{row.tuned(*pair).name} ({accuracy:.1f} % on held-out images)"
        progress.console.print(told)
    record.save()
    for name, reason in reasons.items():
        progress.console.print(f"{name}: left out: {reason}", soft_wrap=True)
    progress.console.print(f"wrote {output}")
    return output


def _on_folds(config: TuneConfig, method: DemoMethod, device: torch.device) -> list[DemoTask]:
    """List the runs of a method, one for each fold, whose number is the seed."""
    return [
        DemoTask(method=method, seed=seed, epochs=given(config.epochs), device=device, part=part)
        for seed, part in enumerate(measured_on(config))
    ]


def measured_on(config: TuneConfig) -> tuple[str, ...]:
    """Return the folds to measure on: the last ones, which are nearest to the test images."""
    return FOLDS[-given(config.folds) :]


def best_pair(accuracy: dict[Pair, float]) -> Pair:
    """Return the pair with the highest accuracy; on a tie the smaller rate, then decay."""
    return max(sorted(accuracy), key=accuracy.__getitem__)
