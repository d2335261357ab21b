"""The demo on rows of the paper's tables: one table of all of them, whatever it shows.

python -m tcpa.train demo --methods all
"""

import csv
import io
import os
import statistics
from dataclasses import asdict, replace

import torch
from rich.table import Table

from ...cli import choose_device, require
from ..engine.distributed import World
from ..engine.record import describe_environment
from ..files import write_whole
from ..precision import fast_dtype
from .config import DemoConfig
from .engine import Method
from .output import append_line
from .report import Row
from .rows import ADAPTED, Choices, describe, find_rows, tuned_settings
from .run import summarise, train_tasks
from .tasks import Task, split_on

MARKDOWN, CSV = "methods.md", "methods.csv"
SUFFIX, BASES = "+tcpa", {"vpt": "vpt-deep"}
"""A row with TCPA goes with the row that its name begins with, or that this names."""

HEADINGS = ("method", "accuracy, %", "spread, %", "by seed, %", "trained values", "s / epoch")
HEADINGS += ("rate", "decay")


def run_rows(config: DemoConfig) -> list[Row]:
    """Train all rows for all seeds, print the table, write the output folder.

    Raises:
        UsageError: there is no such row, one that was asked for by name cannot be put on the
            digits or is not tuned, or the folder cannot be used.
    """
    if config.quick:
        config = replace(config, seeds=config.seeds[:1], epochs=2)
    device = choose_device(config.device)
    rows, reasons = find_rows(config.methods or ())
    methods = _with_settings(config, rows, reasons)
    tasks = [
        Task(
            method=method,
            seed=seed,
            epochs=config.num_epochs,
            device=device,
            part="quick" if config.quick else "test",
        )
        for method in methods
        for seed in config.seeds
    ]
    metrics, records, outcomes, reporter = train_tasks(config, device, tasks)
    found = [
        replace(
            summarise(method.name, tasks, outcomes, records),
            seconds_per_epoch=min(r.seconds for r in records if r.method == method.name),
        )
        for method in methods
    ]
    for row in found:
        append_line(metrics, {"kind": "summary", **asdict(row), "mean": row.mean})
    labels = {row.name: row.label for row in rows}
    lines = [_cells(row, labels, method) for row, method in zip(found, methods, strict=True)]
    notes = [*gains(found, labels), *_notes(config, device, tasks, reasons)]
    write_whole(config.output / CSV, _csv(found, labels, methods).encode())
    write_whole(config.output / MARKDOWN, _markdown(lines, notes).encode())
    grid = Table(title="Rows of the paper's tables on handwritten digits")
    for index, heading in enumerate(HEADINGS):
        grid.add_column(heading, justify="left" if index == 0 else "right")
    for line in lines:
        grid.add_row(*line)
    reporter.console.print(grid)
    for note in notes:
        reporter.console.print(f"- {note}")
    reporter.console.print(f"{config.output} holds {metrics.name}, {MARKDOWN} and {CSV}.")
    return found


def _with_settings(
    config: DemoConfig, rows: list[Choices], reasons: dict[str, str]
) -> list[Method]:
    """Return the rows with their tuned settings; those without any go to `reasons`."""
    tuned, methods = tuned_settings(), []
    for row in rows:
        found = tuned.get(row.name, {})
        if "learning_rate" in found and found["choices"] == describe(row):
            methods.append(row.method(found["learning_rate"], found["weight_decay"]))
            continue
        remedy = f"run: tcpa-train tune-demo --methods {row.name}"
        reason = "no learning rate is recorded for its present choices"
        asked = row.name in (config.methods or ())
        require(not asked, "--methods", repr(row.name), f"a tuned row ({reason})", remedy)
        reasons[row.name] = f"{reason}; {remedy}"
    none = f"no row that can run ({'; '.join(reasons.values())})"
    require(bool(methods), "--methods", none, "one or more", "choose others")
    return methods


def _cells(row: Row, labels: dict[str, str], method: Method) -> list[str]:
    return [
        labels[row.method],
        f"{row.mean:.1f}",
        "-" if row.spread is None else f"{row.spread:.1f}",
        ", ".join(f"{value:.1f}" for value in row.accuracies),
        f"{row.trainable:,}",
        f"{row.seconds_per_epoch:.2f}",
        f"{method.learning_rate:g}",
        f"{method.weight_decay:g}",
    ]


def gains(rows: list[Row], labels: dict[str, str]) -> list[str]:
    """Say how each row with TCPA compares with its row without, run by run of the same seed."""
    named = {row.method: row for row in rows}
    lines = []
    for name, row in named.items():
        base = name.removesuffix(SUFFIX)
        other = named.get(BASES.get(base, base))
        if not name.endswith(SUFFIX) or other is None:
            continue
        each = [a - b for a, b in zip(row.accuracies, other.accuracies, strict=True)]
        shown = ", ".join(f"{value:+.1f}" for value in each)
        lines.append(
            f"{labels[name]} - {labels[other.method]}: {statistics.fmean(each):+.1f} points (by "
            f"seed: {shown})"
        )
    return lines


def _notes(
    config: DemoConfig, device: torch.device, tasks: list[Task], reasons: dict[str, str]
) -> list[str]:
    split = split_on(device, tasks[0].part)
    seeds = ", ".join(map(str, config.seeds))
    tuned = tuned_settings()[tasks[0].method.name]
    rates = sorted({rate for rate, *_ in tuned["measured"]})
    cpu = device.type == "cpu"
    return [
        f"Accuracy on {len(split.test_labels):,} test images after epoch {config.num_epochs} on "
        f"{len(split.train_labels):,} training images, mean, standard deviation (n - 1) and values "
        f"of seeds {seeds}. The test images chose nothing.",
        f"Learning rate and weight decay: `tcpa-train tune-demo --methods`, {tuned['epochs']} "
        f"epochs, on held-out images of {', '.join(tuned['folds'])} of the training images; every "
        f"rate of {', '.join(f'{rate:g}' for rate in rates)} with the smallest decay, then the "
        "other decays with the best rate. A small search: a point more or less means little.",
        f"At the size of the demo: {ADAPTED}.",
        # Other work on the machine slows epochs down, and makes none faster.
        "Seconds per epoch: of the fastest one, training alone"
        + (", one thread a run, as many runs side by side as there are cores." if cpu else "."),
        *(f"{name} is left out: {reason}." for name, reason in reasons.items()),
        provenance(device),
        *(["--quick: the figures mean nothing."] if config.quick else []),
    ]


def provenance(device: torch.device) -> str:
    """Return date, machine, versions and commit of this process, in one sentence."""
    found = describe_environment(World(device))
    machine = f"{os.cpu_count()} CPU cores" if device.type == "cpu" else found["device"]
    precision = str(fast_dtype(device)).removeprefix("torch.")
    commit = found["commit"][:7] or "unknown"
    changed = " with changes" if found["changed"] else ""
    return (
        f"{found['date'][:10]}, {machine}, {precision}, torch {found['versions']['torch']}, commit "
        f"{commit}{changed}."
    )


def _markdown(lines: list[list[str]], notes: list[str]) -> str:
    table = [HEADINGS, ["---", *["---:"] * (len(HEADINGS) - 1)], *lines]
    rows = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([*rows, "", *(f"- {note}" for note in notes)]) + "\n"


def _csv(rows: list[Row], labels: dict[str, str], methods: list[Method]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = [f"accuracy_{index}" for index in range(len(rows[0].accuracies))]
    settings = ("trained_values", "seconds_per_epoch", "learning_rate", "weight_decay")
    writer.writerow(["method", "label", "mean", "spread", *seeds, *settings])
    for row, method in zip(rows, methods, strict=True):
        spread = "" if row.spread is None else f"{row.spread:.4f}"
        writer.writerow(
            [row.method, labels[row.method], f"{row.mean:.4f}", spread]
            + [f"{value:.4f}" for value in row.accuracies]
            + [row.trainable, f"{row.seconds_per_epoch:.4f}"]
            + [method.learning_rate, method.weight_decay]
        )
    return text.getvalue()
