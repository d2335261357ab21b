"""The demo: ways to adapt one small frozen ViT to handwritten digits, in one table.

    python -m tcpa.train demo
    python -m tcpa.train demo --methods all

Three methods, or rows of the paper's tables, whatever the table shows. All share images, their
order, optimizer, schedule, epochs and batch size. Learning rates and weight decays are those that
`tune-demo` found best, for each method on the same grid, on held-out folds of the training images.
Accuracies are those after the last epoch.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

import tcpa
from tcpa.inspect.style import to_png

from ...cli import choose_device, require
from ..engine.precision import fast_dtype
from ..options.demo import DemoConfig, given
from ..recipes.rows import METHODS
from ..report.tables import TextTable, formatted, to_csv, to_grid, to_markdown
from ..storage import write_whole
from .backbone import load_backbone, normalise, numerics
from .digits import DigitSplit, converged_probe, make_split
from .figures import draw_curves, draw_selection
from .methods import (
    ADAPTED,
    OPTIMIZER,
    POOLS,
    PROMPT_ROWS,
    DemoMethod,
    chosen_methods,
    describe,
    find_rows,
    probe_strength,
    tuned_settings,
)
from .session import DemoScore, provenance, train_all
from .training import DemoTask, predict

ADAPTER = "tcpa_adapter"
WRITTEN = f"metrics.jsonl, curves.png, selection.png and {ADAPTER}"

MARKDOWN, CSV = "methods.md", "methods.csv"
SUFFIX, PLAIN = "+tcpa", {"vpt": "vpt-deep"}
"""A row with TCPA goes with the row that its name begins with, or that this names."""

MEASURES = ["accuracy, %", "spread, %", "by seed, %", "trainable parameters", "s / epoch"]

QUICK = "--quick: the figures mean nothing."


def run_demo(config: DemoConfig) -> list[DemoScore]:
    """Train all methods for all seeds, print the table, write the output folder.

    Raises:
        UsageError: there is no such row, one that was asked for by name cannot be put on the
            digits or is not tuned, or the folder cannot be used.
    """
    if config.quick:
        config = replace(config, seeds=config.seeds[:1], epochs=2)
    device = choose_device(config.device)
    return (_run_methods if config.methods is None else _run_rows)(config, device)


def make_tasks(
    config: DemoConfig, device: torch.device, methods: list[DemoMethod]
) -> list[DemoTask]:
    """List the runs: every method with every seed."""
    part = "quick" if config.quick else "test"
    return [
        DemoTask(method=method, seed=seed, epochs=given(config.epochs), device=device, part=part)
        for method in methods
        for seed in config.seeds
    ]


# Three methods.


def _run_methods(config: DemoConfig, device: torch.device) -> list[DemoScore]:
    start = time.perf_counter()
    tasks = make_tasks(config, device, list(chosen_methods()))
    # The last run is one of TCPA.
    tasks[-1] = replace(tasks[-1], save_to=config.output / ADAPTER)
    split = make_split(tasks[0].part, device)
    output, scores, outcomes, console = train_all(config, tasks)
    curves = draw_curves([epoch for outcome in outcomes for epoch in outcome.epochs])
    write_whole(output.folder / "curves.png", to_png(curves))
    write_whole(output.folder / "selection.png", to_png(_selection(output.folder, split)))
    shown = _methods_table(scores)
    console.print(to_grid(shown, shown.title))
    fitted = converged_probe(tasks[0].part, probe_strength())
    output.add("converged probe", accuracy=fitted)
    precision = f"{fast_dtype(device)} on {device}".removeprefix("torch.")
    settings = ", ".join(
        f"{name} {method.learning_rate:g}, {method.weight_decay:g}"
        for name, method in {task.method.name: task.method for task in tasks}.items()
    )
    ours = scores[-1]
    notes = [
        f"{len(split.train_labels)} training and {len(split.test_labels):,} test images, seeds "
        f"{', '.join(map(str, config.seeds))}; accuracy on the test images after epoch "
        f"{config.epochs}.",
        f"{PROMPT_ROWS} prompt rows a block for VPT-deep and TCPA. {precision}.",
        "Learning rate and weight decay, each the best of one grid on folds of the training "
        f"images: {settings}.",
        f"Implementation: {ours.implementation} ({ours.reason}).",
        *verdict(scores),
        f"Logistic regression on the frozen features, fitted to convergence, reads {fitted:.1f} %: "
        f"{ours.mean - fitted:+.1f} points for TCPA.",
        *([QUICK] if config.quick else []),
    ]
    for note in notes:
        console.print(note)
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} s in total; {config.output} holds {WRITTEN}.")
    return scores


def _selection(folder: Path, split: DigitSplit) -> Figure:
    """Load the saved adapter and draw what it selects on five test images."""
    device = split.test_images.device
    model = tcpa.from_pretrained(folder / ADAPTER, backbone=load_backbone()).to(device)
    shown = torch.stack([(split.test_labels == digit).nonzero()[0, 0] for digit in range(0, 10, 2)])
    images, labels = split.test_images[shown], split.test_labels[shown]
    named = predict(model, images)
    with numerics(device).context(device):
        selection = model.selection(images)
    # Of the patches, on the rows of the image pool.
    prefix, rows = model.backbone.num_prefix_tokens, POOLS.cls_rows
    gates = [
        tcpa.unpack_gate(gate, PROMPT_ROWS)[:, prefix:, rows:].cpu().numpy() for gate in selection
    ]
    captions = [f"a {label},\nread as {digit}" for label, digit in zip(labels, named, strict=True)]
    pixels = (images[:, 0].cpu() - normalise(torch.zeros(()))) / 2
    return draw_selection(pixels.numpy(), captions, gates)


def _methods_table(scores: list[DemoScore]) -> TextTable:
    by_seed = MEASURES.index("by seed, %")
    rows = [[score.method, *_cells(score), score.implementation] for score in scores]
    header = ["method", *MEASURES, "implementation"]
    for row in (header, *rows):
        del row[1 + by_seed]
    title = "Handwritten digits on a frozen ViT pretrained on generated images"
    return TextTable(title=title, header=header, rows=rows)


def verdict(scores: list[DemoScore]) -> list[str]:
    """Say in words how the methods compare, also where the comparison is unwelcome.

    The last one is TCPA; differences are between runs of the same seed.
    """
    lines = []
    for other in scores[:-1]:
        gain, each = scores[-1].gain_over(other)
        beats = "beats" if gain > 0 else "does NOT beat"
        lines.append(f"TCPA {beats} {other.method} here: {gain:+.1f} points (by seed: {each})")
    return lines


def _cells(score: DemoScore) -> list[str]:
    return [
        f"{score.mean:.1f}",
        formatted(score.spread, ".1f"),
        ", ".join(f"{value:.1f}" for value in score.accuracies),
        f"{score.trainable:,}",
        f"{score.seconds_per_epoch:.2f}",
    ]


# Rows of the paper's tables.


def _run_rows(config: DemoConfig, device: torch.device) -> list[DemoScore]:
    rows, reasons = find_rows(config.methods or ())
    methods = with_settings(config, rows, reasons)
    tasks = make_tasks(config, device, methods)
    output, scores, _, console = train_all(config, tasks)
    shown = TextTable(
        title="Rows of the paper's tables on handwritten digits",
        header=["method", *MEASURES, "rate", "decay"],
        rows=[
            [
                METHODS[score.method].label,
                *_cells(score),
                f"{method.learning_rate:g}",
                f"{method.weight_decay:g}",
            ]
            for score, method in zip(scores, methods, strict=True)
        ],
    )
    notes = [*gains(scores), *_row_notes(config, tasks, reasons)]
    text = "\n".join([to_markdown(shown), *(f"- {note}" for note in notes)]) + "\n"
    write_whole(output.folder / CSV, _csv(scores, methods).encode())
    write_whole(output.folder / MARKDOWN, text.encode())
    console.print(to_grid(shown, shown.title))
    for note in notes:
        console.print(f"- {note}")
    console.print(f"{config.output} holds metrics.jsonl, {MARKDOWN} and {CSV}.")
    return scores


def with_settings(
    config: DemoConfig, rows: list[DemoMethod], reasons: dict[str, str]
) -> list[DemoMethod]:
    """Return the rows with their tuned settings; those without any go to `reasons`.

    Raises:
        UsageError: a row that was asked for by name has none, or none has any.
    """
    tuned, methods = tuned_settings(), []
    for row in rows:
        found = tuned.get(row.name, {})
        if "learning_rate" in found and found["choices"] == describe(row):
            methods.append(replace(row, **{name: found[name] for name in OPTIMIZER}))
            continue
        remedy = f"run: tcpa-train tune-demo --methods {row.name}"
        reason = "no learning rate is recorded for its present choices"
        asked = row.name in (config.methods or ())
        require(not asked, "--methods", repr(row.name), f"a tuned row ({reason})", remedy)
        reasons[row.name] = f"{reason}; {remedy}"
    none = f"no row that can run ({'; '.join(reasons.values())})"
    require(bool(methods), "--methods", none, "one or more", "choose others")
    return methods


def gains(scores: list[DemoScore]) -> list[str]:
    """Say how each row with TCPA compares with its row without, run by run of the same seed."""
    named = {score.method: score for score in scores}
    lines = []
    for name, score in named.items():
        base = name.removesuffix(SUFFIX)
        other = named.get(PLAIN.get(base, base))
        if base != name and other is not None:
            gain, each = score.gain_over(other)
            pair = f"{METHODS[name].label} - {METHODS[other.method].label}"
            lines.append(f"{pair}: {gain:+.1f} points (by seed: {each})")
    return lines


def _row_notes(config: DemoConfig, tasks: list[DemoTask], reasons: dict[str, str]) -> list[str]:
    split, device = make_split(tasks[0].part), tasks[0].device
    tuned = tuned_settings()[tasks[0].method.name]
    rates = sorted({rate for rate, *_ in tuned["measured"]})
    side = ", one thread a run, as many runs side by side as there are cores"
    threads = side if device.type == "cpu" else ""
    return [
        f"Accuracy on {len(split.test_labels):,} test images after epoch {given(config.epochs)} on "
        f"{len(split.train_labels):,} training images, mean, standard deviation (n - 1) and values "
        f"of seeds {', '.join(map(str, config.seeds))}. The test images chose nothing.",
        f"Learning rate and weight decay: `tcpa-train tune-demo --methods`, {tuned['epochs']} "
        f"epochs, on held-out images of {', '.join(tuned['folds'])} of the training images; every "
        f"rate of {', '.join(f'{rate:g}' for rate in rates)} with the smallest decay, then the "
        "other decays with the best rate. A small search: a point more or less means little.",
        f"At the size of the demo: {ADAPTED}.",
        f"Seconds per epoch: of the fastest one, training alone{threads}.",
        *(f"{name} is left out: {reason}." for name, reason in reasons.items()),
        provenance(device),
        *([QUICK] if config.quick else []),
    ]


def _csv(scores: list[DemoScore], methods: list[DemoMethod]) -> str:
    seeds = [f"accuracy_{index}" for index in range(len(scores[0].accuracies))]
    settings = ("trained_values", "seconds_per_epoch", "learning_rate", "weight_decay")
    rows = [
        [score.method, METHODS[score.method].label, f"{score.mean:.4f}"]
        + ["" if score.spread is None else f"{score.spread:.4f}"]
        + [f"{value:.4f}" for value in score.accuracies]
        + [score.trainable, f"{score.seconds_per_epoch:.4f}"]
        + [method.learning_rate, method.weight_decay]
        for score, method in zip(scores, methods, strict=True)
    ]
    return to_csv(["method", "label", "mean", "spread", *seeds, *settings], rows)
