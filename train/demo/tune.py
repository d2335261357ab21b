"""Choose the learning rates of the demo by one rule for all methods.

    python -m tcpa.train tune-demo --output train/demo/learning_rates.json

Every method is trained with every rate of the grid on 800 of the 1,000 training images and measured
on the other 200; the best mean over the seeds wins, the smaller rate on a tie. The demo reads the
record. The 797 test images have no part in it.
"""

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .config import TuneConfig
from .engine import Epoch
from .output import require_writable
from .report import Reporter
from .run import choose_device
from .tasks import PROMPTS, Task, chosen_methods, run_tasks


def tune(config: TuneConfig) -> Path:
    """Train the whole grid and write the record."""
    device = choose_device(config.device)
    require_writable(config.output)
    tasks = make_grid(config, device)
    final: dict[str, list[float]] = {}
    with Reporter(len(tasks) * config.epochs, config.epochs, "validation") as reporter:

        def on_epoch(record: Epoch) -> None:
            reporter.epoch(record)
            if record.epoch == config.epochs and record.test_accuracy is not None:
                final.setdefault(record.method, []).append(record.test_accuracy)

        run_tasks(tasks, on_epoch)
    means = {
        name: {rate: statistics.fmean(final[run_name(name, rate)]) for rate in sorted(config.grid)}
        for name in PROMPTS
    }
    record = {
        "rule": "best mean validation accuracy over the seeds; the smaller rate on a tie",
        "chosen": {name: best_rate(by_rate) for name, by_rate in means.items()},
        "validation_accuracy": means,
        **{key: value for key, value in asdict(config).items() if key != "output"},
        "device": str(device),
        "torch": torch.__version__,
    }
    config.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, rate in record["chosen"].items():
        reporter.console.print(f"{name}: {rate} ({means[name][rate]:.1f} % on validation)")
    reporter.console.print(f"wrote {config.output}")
    return config.output


def make_grid(config: TuneConfig, device: torch.device) -> list[Task]:
    """List the runs: every method with every learning rate and every seed."""
    return [
        Task(
            method=replace(method, name=run_name(method.name, rate), learning_rate=rate),
            seed=seed,
            epochs=config.epochs,
            device=device,
            part="validation",
        )
        for method in chosen_methods()
        for rate in config.grid
        for seed in config.seeds
    ]


def run_name(method: str, rate: float) -> str:
    """Name a method with a learning rate."""
    return f"{method} {rate}"


def best_rate(accuracy_by_rate: dict[float, float]) -> float:
    """Return the rate with the highest accuracy, the smaller one on a tie."""
    return max(sorted(accuracy_by_rate), key=accuracy_by_rate.__getitem__)
