"""The demo: three ways to adapt one small frozen ViT to handwritten digits.

    python -m tcpa.train demo

All methods share images, their order, optimiser, schedule, epochs and batch size; VPT-deep and TCPA
have the same number of prompt rows. Learning rates and weight decays are those that `tune-demo`
found best, for each method on the same grid, on held-out folds of the training images. Accuracies
are those after the last epoch.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import tcpa

from ...cli import choose_device
from ..precision import fast_dtype
from .backbone import autocast, load_backbone, normalise
from .config import DemoConfig
from .engine import BATCH_SIZE, Epoch, Split, predict, seconds_per_epoch
from .figures import draw_curves, draw_selection
from .output import append_line, prepare_output
from .probe import converged_probe
from .report import Reporter, Row, table, verdict
from .tasks import PROMPT_ROWS, Outcome, Task, chosen_methods, probe_strength, run_tasks, split_on

ADAPTER = "tcpa_adapter"
WRITTEN = f"metrics.jsonl, curves.png, selection.png and {ADAPTER}"


def run_demo(config: DemoConfig) -> list[Row]:
    """Train all methods for all seeds, print the table, write the output folder."""
    if config.methods is not None:
        from .compare import run_rows

        return run_rows(config)
    if config.quick:
        config = replace(config, seeds=config.seeds[:1], epochs=2)
    start = time.perf_counter()
    device = choose_device(config.device)
    tasks = make_tasks(config, device)
    metrics, records, outcomes, reporter = train_tasks(config, device, tasks)
    split = split_on(device, tasks[0].part)
    # Runs end in any order; pictures and table go by method and seed.
    names = _names(tasks)
    records.sort(key=lambda r: (names.index(r.method), config.seeds.index(r.seed), r.epoch))
    draw_curves(records, config.output / "curves.png")
    _draw_selection(config.output, split, device)
    rows = [summarise(name, tasks, outcomes, records) for name in names]
    for row in rows:
        append_line(metrics, {"kind": "summary", **asdict(row), "mean": row.mean})
    reporter.console.print(table(rows))
    precision = f"{fast_dtype(device)} on {device}".removeprefix("torch.")
    fitted = converged_probe(tasks[0].part, probe_strength())
    append_line(metrics, {"kind": "converged probe", "accuracy": fitted})
    for line in _notes(config, tasks, rows, split, precision, fitted):
        reporter.console.print(line)
    seconds = time.perf_counter() - start
    reporter.console.print(f"{seconds:.0f} s in total; {config.output} holds {WRITTEN}.")
    return rows


def train_tasks(
    config: DemoConfig, device: torch.device, tasks: list[Task]
) -> tuple[Path, list[Epoch], list[Outcome], Reporter]:
    """Train all tasks, showing and writing down every epoch.

    Returns:
        The file of metrics, all epochs in the order in which they ended, the outcomes, and the
        reporter, for what is still to be printed.
    """
    metrics = prepare_output(config.output, header(config, device, tasks))
    records: list[Epoch] = []
    with Reporter(len(tasks) * config.num_epochs, config.num_epochs) as reporter:

        def on_epoch(record: Epoch) -> None:
            records.append(record)
            append_line(metrics, {"kind": "epoch", **asdict(record)})
            reporter.epoch(record)

        outcomes = run_tasks(tasks, on_epoch)
    return metrics, records, outcomes, reporter


def make_tasks(config: DemoConfig, device: torch.device) -> list[Task]:
    """List the runs: every seed with every method; the last TCPA run keeps its adapter."""
    methods, part = chosen_methods(), "quick" if config.quick else "test"
    last = (methods[-1], config.seeds[-1])
    return [
        Task(
            method=method,
            seed=seed,
            epochs=config.num_epochs,
            device=device,
            part=part,
            save_to=config.output / ADAPTER if (method, seed) == last else None,
        )
        for method in methods
        for seed in config.seeds
    ]


def _names(tasks: list[Task]) -> list[str]:
    return list(dict.fromkeys(task.method.name for task in tasks))


def _draw_selection(folder: Path, split: Split, device: torch.device) -> None:
    """Load the saved adapter and draw what it selects on five test images."""
    model = tcpa.from_pretrained(folder / ADAPTER, backbone=load_backbone()).to(device)
    shown = torch.stack([(split.test_labels == digit).nonzero()[0, 0] for digit in range(0, 10, 2)])
    images, labels = split.test_images[shown], split.test_labels[shown]
    named = predict(model, images)
    assert isinstance(model.config, tcpa.TCPAConfig)
    prefix, rows = model.backbone.num_prefix_tokens, model.config.cls_rows
    with autocast(device):
        selection = model.selection(images)
    gates = [
        tcpa.unpack_gate(gate, model.config.num_prompts)[:, prefix:, rows:].cpu().numpy()
        for gate in selection
    ]
    captions = [f"a {label},\nread as {digit}" for label, digit in zip(labels, named, strict=True)]
    pixels = (images[:, 0].cpu() - normalise(torch.zeros(()))) / 2
    draw_selection(pixels.numpy(), captions, gates, folder / "selection.png")


def summarise(name: str, tasks: list[Task], outcomes: list[Outcome], records: list[Epoch]) -> Row:
    """Gather the table's row of a method; accuracies in the order of the seeds."""
    own = [record for record in records if record.method == name]
    last = max(record.epoch for record in own)
    final = {
        record.seed: record.test_accuracy
        for record in own
        if record.epoch == last and record.test_accuracy is not None
    }
    seeds = [task.seed for task in tasks if task.method.name == name]
    outcome = next(o for o, task in zip(outcomes, tasks, strict=True) if task.method.name == name)
    implementation, reason = outcome.implementation
    return Row(
        method=name,
        accuracies=tuple(final[seed] for seed in seeds),
        trainable=outcome.trainable,
        seconds_per_epoch=seconds_per_epoch(own),
        implementation=implementation,
        reason=reason,
    )


def _notes(
    config: DemoConfig,
    tasks: list[Task],
    rows: list[Row],
    split: Split,
    precision: str,
    fitted: float,
) -> list[str]:
    """Say under the table what was compared, what computed it and how TCPA fared."""
    seeds = ", ".join(map(str, config.seeds))
    methods = {task.method.name: task.method for task in tasks}
    settings = ", ".join(
        f"{name} {method.learning_rate:g}, {method.weight_decay:g}"
        for name, method in methods.items()
    )
    return [
        f"{len(split.train_labels)} training and {len(split.test_labels):,} test images, seeds "
        f"{seeds}; accuracy on the test images after epoch {config.epochs}.",
        f"{PROMPT_ROWS} prompt rows a block for VPT-deep and TCPA. {precision}.",
        "Learning rate and weight decay, each the best of one grid on folds of the training "
        f"images: {settings}.",
        f"Implementation: {rows[-1].implementation} ({rows[-1].reason}).",
        *verdict(rows),
        f"Logistic regression on the frozen features, fitted to convergence, reads {fitted:.1f} %: "
        f"{rows[-1].mean - fitted:+.1f} points for TCPA.",
        *(["--quick: the figures mean nothing."] if config.quick else []),
    ]


def header(config: DemoConfig, device: torch.device, tasks: list[Task]) -> dict:
    """Describe the run for the first line of the metrics."""
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
