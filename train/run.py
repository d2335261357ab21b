"""One run, from a configuration to a finished folder; started again, it goes on where it was.

The folder holds `config.json` (everything that decides the result), `environment.json` (versions,
commit, device, checksums of data and weights; an entry per start), `metrics.jsonl` (see
`engine.journal`), `tensorboard/`, two checkpoints, and at the end `adapter/` (the trained values of
the chosen epoch, for `tcpa.from_pretrained`) and `result.json`.
"""

import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import tcpa

from ..cli import UsageError
from .config import RunConfig
from .engine.distributed import World, join
from .engine.files import cannot_write, read_json, write_json
from .engine.folder import ADAPTER, RESULT, claim
from .engine.inputs import Splits
from .engine.journal import Journal, read_metrics
from .engine.loop import CHOOSES_ON, Loop
from .engine.model import BuiltModel, build_model
from .engine.progress import Display
from .engine.record import ENVIRONMENT, describe_environment, versions
from .engine.settings import describe, resolve, run_folder
from .recipes import Recipe

PIPELINE_BATCHES = 10
"""Batches, at most, over which the rate of the input pipeline alone is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What `result.json` says of a finished run."""

    dataset: str
    label: str
    """Column of the paper's Table 1."""
    method: str
    seed: int
    protocol: str
    chosen_on: str | None
    """Split whose accuracy chose the epoch: "test" (official), "val", or null (last epoch)."""
    accuracy: float
    """Top-1 on the test images, percent, after the chosen epoch."""
    epoch: int
    """The chosen epoch, from 1."""
    epochs: int
    last_accuracy: float | None
    """Test accuracy after the last epoch, percent; null where the test images were read for the
    chosen epoch alone."""
    best_test_accuracy: float | None
    """Highest test accuracy of all epochs, percent; null where not every epoch was tested."""
    val_accuracy: float | None
    """Accuracy on the validation images after the chosen epoch, percent; null without any."""
    seconds_per_epoch: float
    """Median training time of an epoch, without evaluation."""
    seconds_per_evaluation: float
    """Median time of one evaluation of the split that was evaluated last."""
    images_per_second: float
    """Training, with the input pipeline; median over the epochs."""
    pipeline_images_per_second: float
    """The input pipeline alone."""
    trainable: int
    """Trained values, the head included."""
    train_images: int
    test_images: int
    backbone: str
    weights: str
    normalize: str
    precision: str
    eval_precision: str
    implementation: str
    """What computed the attention."""
    note: str
    """What the recipe assumed; "" for a published one."""
    versions: dict[str, str]


def run(config: RunConfig, splits: Splits | None = None) -> Result:
    """Train what a configuration says, or what is left of it, and return its result.

    Args:
        config: what to train.
        splits: images to use in place of those that `config.data` holds.

    Raises:
        UsageError: something that was asked for cannot be had; the message says what to change.
    """
    settings = resolve(config)
    folder = run_folder(config, settings)
    with join(config.device) as world:
        _make_repeatable(world)
        held = claim(folder, describe(config, settings)) if world.is_main else nullcontext()
        with held:
            finished: Any = world.share(read_json(folder / RESULT) if world.is_main else None)
            if finished is not None:
                if world.is_main:
                    print(f"{folder} is finished: {finished['accuracy']:.2f} %")
                return _read_result(folder, finished)
            if splits is None:
                from .engine.datasets import load_splits

                splits = load_splits(config, settings, world)
            return _train(config, settings, world, splits, folder)


def _read_result(folder: Path, values: dict[str, Any]) -> Result:
    try:
        return Result(**values)
    except TypeError as error:
        raise UsageError(
            f"{folder / RESULT}: not written by this version of tcpa ({error}); keep it elsewhere "
            "and delete the folder to train again"
        ) from None


def _make_repeatable(world: World) -> None:
    """Let equal runs be equal to the last bit on one machine."""
    if world.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


def _train(
    config: RunConfig, settings: Recipe, world: World, splits: Splits, folder: Path
) -> Result:
    built = build_model(config, settings, world, splits.num_classes)
    loop = Loop(config, settings, world, built, splits, folder)
    warnings = loop.resume()
    state = loop.state
    title = f"{config.dataset}, {config.method}, seed {settings.seed}"
    images = splits.train.num_images
    done = state.epoch * images + state.images
    journal = None
    display = Display(world, title, total_images=settings.epochs * images, done_images=done)
    for warning in warnings:
        display.say(f"warning: {warning}")
    if world.is_main:
        _record_start(folder, world, built, splits, state.step)
        journal = Journal(
            folder, keep=state.metrics_bytes, step=state.step, tensorboard=config.tensorboard
        )
    try:
        pipeline = _pipeline_rate(splits, world)
        _introduce(display, title, built, splits, settings, loop, pipeline)
        with display:
            loop.run(journal, display)
        result = _finish(config, settings, loop, journal, folder, pipeline)
    finally:
        if journal is not None:
            journal.close()
    display.say(
        f"{title}: {result.accuracy:.2f} % on the test images after epoch {result.epoch} "
        f"({_how(config)}); {folder}"
    )
    return result


def _record_start(folder: Path, world: World, built: BuiltModel, splits: Splits, step: int) -> None:
    """Append with what this start computes to the environment record."""
    path = folder / ENVIRONMENT
    starts = read_json(path) or []
    found = describe_environment(world) | {
        "from_step": step,
        "precision": built.numerics.name,
        "eval_precision": built.eval_numerics.name,
        "implementation": _implementation(built, world),
        "backbone": built.backbone.to_json(),
        "data": dict(splits.record),
    }
    write_json(path, [*starts, found])


def _implementation(built: BuiltModel, world: World) -> list[str]:
    with built.numerics.context(world.device):
        return list(built.model.implementation)


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


def _introduce(
    display: Display,
    title: str,
    built: BuiltModel,
    splits: Splits,
    settings: Recipe,
    loop: Loop,
    pipeline: float,
) -> None:
    """Say what is going to be trained, with what, and from where."""
    model, world = built.model, loop.world
    name, reason = _implementation(built, world)
    display.say(
        f"{title}: {splits.train.num_images:,} training images, {splits.num_classes} classes, "
        f"{model.num_trainable:,} trained values on {built.backbone.name}"
    )
    display.say(
        f"{built.numerics.name} on {world.device} x {world.size}; attention by {name} ({reason}); "
        f"input pipeline alone {pipeline:,.0f} images/s"
    )
    if settings.note:
        display.say(f"note: {settings.note}")
    if loop.state.step:
        display.say(f"goes on after step {loop.state.step} of {settings.epochs * loop.batches}")


def _how(config: RunConfig) -> str:
    return {
        "official": "the best test epoch: chosen on the test images, as the official code does",
        "val": "chosen on the validation images",
        "last": "the last epoch",
    }[config.protocol]


def _finish(
    config: RunConfig,
    settings: Recipe,
    loop: Loop,
    journal: Journal | None,
    folder: Path,
    pipeline: float,
) -> Result:
    """Test the chosen epoch where that is left to do, and write adapter and result."""
    state, built = loop.state, loop.built
    chosen_on, epoch = CHOOSES_ON[config.protocol], settings.epochs
    if chosen_on is not None:
        loop.use_best()
        epoch = state.best_epoch
    official = chosen_on == "test"
    accuracy = state.best_accuracy
    if not official:
        accuracy = loop.evaluate("test", journal, epoch=epoch).accuracy
    last = state.last_accuracy if official else accuracy if epoch == settings.epochs else None
    result = None
    if journal is not None:
        result = Result(
            dataset=config.dataset,
            label=settings.label,
            method=config.method,
            seed=settings.seed,
            protocol=config.protocol,
            chosen_on=chosen_on,
            accuracy=accuracy,
            epoch=epoch,
            epochs=settings.epochs,
            last_accuracy=last,
            best_test_accuracy=state.best_accuracy if official else None,
            val_accuracy=state.best_accuracy if chosen_on == "val" else None,
            **_rates(folder),
            pipeline_images_per_second=pipeline,
            trainable=built.model.num_trainable,
            train_images=loop.splits.train.num_images,
            test_images=loop.splits.evaluation["test"].num_images,
            backbone=built.backbone.name,
            weights=built.backbone.weights,
            normalize=config.normalize,
            precision=built.numerics.name,
            eval_precision=built.eval_numerics.name,
            implementation=_implementation(built, loop.world)[0],
            note=settings.note,
            versions=versions(),
        )
        _write(folder, built.model, result)
    shared: Any = loop.world.share(None if result is None else asdict(result))
    return Result(**shared)


def _rates(folder: Path) -> dict[str, float]:
    """Return medians over the epochs of a run, whenever they were trained."""
    lines = read_metrics(folder)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    split = evaluations[-1]["split"]
    return {
        "seconds_per_epoch": statistics.median(line["seconds"] for line in epochs),
        "images_per_second": statistics.median(line["images_per_second"] for line in epochs),
        "seconds_per_evaluation": statistics.median(
            line["seconds"] for line in evaluations if line["split"] == split
        ),
    }


def _write(folder: Path, model: tcpa.PromptedViT, result: Result) -> None:
    try:
        model.save_pretrained(folder / ADAPTER)
    except OSError as error:
        raise cannot_write(folder / ADAPTER, error) from None
    except ValueError as error:
        raise UsageError(f"{folder / ADAPTER}: {error}") from None
    # Last: a folder with a result is a finished run.
    write_json(folder / RESULT, asdict(result))
