"""One run, from a configuration to a finished folder; started again, it resumes where it was.

The folder holds `config.json` (everything that decides the result), `environment.json` (versions,
commit, device, checksums of data and weights; an entry per start), `metrics.jsonl` (see
`engine.checkpoint`), `tensorboard/`, two checkpoints, and at the end `adapter/` (of the chosen
epoch, for `tcpa.from_pretrained`) and `result.json`.
"""

import os
import time
from contextlib import nullcontext
from typing import Any

import torch

from ..engine.checkpoint import Journal
from ..engine.data import Splits, load_splits
from ..engine.distributed import World, join
from ..engine.interruption import defer_signals
from ..engine.loop import Loop
from ..engine.model import build_model
from ..engine.progress import Display
from ..engine.result import Result, finish, read_result
from ..engine.rundir import (
    CONFIG,
    ENVIRONMENT,
    RESULT,
    claim,
    describe_environment,
    read_starts,
    require_same_inputs,
)
from ..options.run import RunConfig
from ..recipes.runspec import RunSpec, resolve
from ..report.runs import finished_result
from ..storage import read_json, write_json

PIPELINE_BATCHES = 10
"""Batches, at most, over which the rate of the input pipeline alone is measured."""

HOW = {
    "official": "the best test epoch: chosen on the test images, as the official code does",
    "val": "chosen on the validation images",
    "last": "the last epoch",
    "tune": "the last epoch; the test images were not read",
}
"""Protocol -> how its epoch was chosen."""

WORDS = {"val": "validation", "test": "test"}
"""Split -> how messages name it."""


def run(config: RunConfig, splits: Splits | None = None) -> Result:
    """Train what a configuration says, or what is left of it, and return its result.

    Args:
        config: what to train.
        splits: images to use in place of those that `config.data` holds.

    Raises:
        UsageError: something that was asked for cannot be had; the message says what to change.
        Interrupted: SIGINT, SIGTERM or SIGHUP asked it to end; the last step is saved.
    """
    return run_spec(resolve(config), splits)


def run_spec(spec: RunSpec, splits: Splits | None = None) -> Result:
    """Do what `run` does, for a run that is resolved."""
    folder = spec.folder
    with join(spec.device) as world:
        _make_repeatable(world)
        held = claim(folder, spec.describe()) if world.is_main else nullcontext()
        with held:
            finished: Any = world.share(read_json(folder / RESULT) if world.is_main else None)
            if finished is not None:
                result = read_result(folder, finished)
                if world.is_main:
                    finished_result(folder)
                    print(f"{folder} is finished: {result.accuracy:.2f} %")
                return result
            images = load_splits(spec, world) if splits is None else splits
            return _train(spec, world, images)


def _make_repeatable(world: World) -> None:
    """Let equal runs be equal to the last bit on one machine."""
    if world.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


def _train(spec: RunSpec, world: World, splits: Splits) -> Result:
    built = build_model(spec, world, splits.num_classes)
    loop = Loop(spec, world, built, splits)
    warnings = loop.resume()
    state, images = loop.state, splits.train.num_images
    done = state.epoch * images + min(state.batch * spec.batch_size, images)
    display = Display(world, spec.title, total_images=spec.epochs * images, done_images=done)
    for warning in warnings:
        display.say(f"warning: {warning}")
    if world.is_main:
        _record_start(loop)
        loop.journal = Journal(
            spec.folder, keep=state.metrics_bytes, step=state.step, tensorboard=spec.tensorboard
        )
    try:
        with defer_signals() as requests:
            pipeline = _pipeline_rate(splits, world)
            _introduce(display, loop, pipeline)
            with display:
                loop.run(display, requests)
            result = finish(loop, pipeline)
        loop.close()
    finally:
        if loop.journal is not None:
            loop.journal.close()
    display.say(
        f"{spec.title}: {result.accuracy:.2f} % on {result.measured_on} images after epoch "
        f"{result.epoch} ({HOW[spec.protocol]}); {spec.folder}"
    )
    return result


def _record_start(loop: Loop) -> None:
    """Write down what this start computes, and of the first start the configuration.

    Raises:
        UsageError: weights or images are not those with which the run began, or the record of
            earlier starts is damaged.
    """
    folder, built = loop.spec.folder, loop.built
    starts = read_starts(folder)
    found = describe_environment(loop.world) | {
        "from_step": loop.state.step,
        "precision": built.numerics.name,
        "eval_precision": built.eval_numerics.name,
        "implementation": list(built.implementation(loop.world)),
        "backbone": built.backbone.to_json(),
        "data": dict(loop.splits.record),
    }
    if starts:
        require_same_inputs(starts[0], found, folder)
    else:
        write_json(folder / CONFIG, loop.spec.describe())
    # From here on the run has begun, and belongs to its configuration.
    write_json(folder / ENVIRONMENT, [*starts, found])


def _pipeline_rate(splits: Splits, world: World) -> float:
    """Return images/s of the training images without a model; draws nothing that a step draws."""
    source, images, start = splits.train, 0, time.perf_counter()
    for number, batch in enumerate(source.epoch(0)):
        images += batch.size
        if number + 1 == PIPELINE_BATCHES:
            break
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return images / (time.perf_counter() - start)


def _introduce(display: Display, loop: Loop, pipeline: float) -> None:
    """Say what is going to be trained, with what, and from where."""
    spec, world, built, splits = loop.spec, loop.world, loop.built, loop.splits
    name, reason = built.implementation(world)
    sizes = {"training": splits.train} | {WORDS[n]: s for n, s in splits.evaluation.items()}
    images = [f"{source.num_images:,} {name}" for name, source in sizes.items()]
    display.say(
        f"{spec.title}: {', '.join(images)} images, {splits.num_classes} classes, "
        f"{built.model.num_trainable:,} trainable parameters on {built.backbone.name}"
    )
    if rule := splits.record.get("train", {}).get("rule"):
        display.say(f"to train on: {rule}")
    for name, classes in splits.absent.items():
        more = ", ..." if len(classes) > 5 else ""
        display.say(
            f"note: no {WORDS[name]} images of {len(classes)} of {splits.num_classes} classes: "
            f"{', '.join(classes[:5])}{more}"
        )
    display.say(
        f"{built.numerics.name} on {world.device} x {world.size}; attention by {name} ({reason}); "
        f"input pipeline alone {pipeline:,.0f} images/s"
    )
    if spec.note:
        display.say(f"note: {spec.note}")
    if loop.state.step:
        display.say(f"resumes after step {loop.state.step} of {spec.epochs * loop.batches}")
