"""Choose learning rate and weight decay of the demo's methods, by one rule for all of them.

    python -m tcpa.train tune-demo --output train/demo/tuned.json

Every method is trained with every pair of the grid on four folds of the 1,000 training images; the
best mean over the folds wins, on a tie the smaller rate, then the smaller decay. The demo reads the
record. The 797 test images have no part in it.
"""

import json
import statistics
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from ...cli import choose_device, require_writable, write_results
from .config import TuneConfig
from .data import FOLDS
from .engine import Epoch, Method
from .probe import best_strength
from .report import Reporter
from .tasks import PROMPTS, Task, run_tasks

Pair = tuple[float, float]
"""Learning rate and weight decay."""


def tune(config: TuneConfig) -> Path:
    """Train the whole grid and write the record."""
    if config.methods is not None:
        from .tune_rows import tune_rows

        return tune_rows(config)
    device = choose_device(config.device)
    require_writable(config.file)
    tasks = make_grid(config, device)
    final: dict[str, list[float]] = {}
    with Reporter(len(tasks) * config.num_epochs, config.num_epochs, "held-out fold") as reporter:

        def on_epoch(record: Epoch) -> None:
            reporter.epoch(record)
            if record.epoch == config.num_epochs and record.test_accuracy is not None:
                final.setdefault(record.method, []).append(record.test_accuracy)

        run_tasks(tasks, on_epoch)
    pairs = sorted(product(config.rates, config.weight_decays))
    means = {
        name: {pair: statistics.fmean(final[run_name(name, pair)]) for pair in pairs}
        for name in PROMPTS
    }
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
    write_results(config.file, json.dumps(record, indent=2) + "\n", "--output")
    for name, pair in chosen.items():
        accuracy = means[name][pair]
        reporter.console.print(f"{run_name(name, pair)} ({accuracy:.1f} % on held-out folds)")
    reporter.console.print(f"wrote {config.file}")
    return config.file


def make_grid(config: TuneConfig, device: torch.device) -> list[Task]:
    """List the runs: every method with every pair on every fold; the fold's number is the seed."""
    methods = [
        Method(
            name=run_name(name, (rate, decay)),
            prompts=prompts,
            learning_rate=rate,
            weight_decay=decay,
        )
        for name, prompts in PROMPTS.items()
        for rate, decay in product(config.rates, config.weight_decays)
    ]
    return [
        Task(method=method, seed=seed, epochs=config.num_epochs, device=device, part=part)
        for method in methods
        for seed, part in enumerate(measured_on(config))
    ]


def measured_on(config: TuneConfig) -> tuple[str, ...]:
    """Return the folds to measure on: the last ones, which are nearest to the test images."""
    return FOLDS[-config.num_folds :]


def run_name(method: str, pair: Pair) -> str:
    """Name a method with its optimiser settings."""
    return f"{method}, rate {pair[0]:g}, decay {pair[1]:g}"


def best_pair(accuracy: dict[Pair, float]) -> Pair:
    """Return the pair with the highest accuracy; on a tie the smaller rate, then decay."""
    return max(sorted(accuracy), key=accuracy.__getitem__)
