"""The result of a run: which epoch was chosen, how good it is, how long it took."""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tcpa

from ...cli import UsageError
from ..storage import cannot_write, write_json
from .checkpoint import read_metrics
from .loop import CHOOSES_ON, MEASURED_ON, Loop
from .rundir import ADAPTER, RESULT, versions


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
    """Top-1 on the test images, percent, after the chosen epoch; see `measured_on`."""
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
    """Trainable parameters, the head included."""
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
    measured_on: str = "test"
    """Split of `accuracy`: "val" for protocol tune, which never reads the test images."""
    source: str = ""
    """What the images of VTAB-1k are: "original", "jpeg" (lossy copies) or "unclear"."""


def read_result(folder: Path, values: dict[str, Any]) -> Result:
    try:
        return Result(**values)
    except TypeError:
        raise UsageError(
            f"{folder / RESULT}: not what this version of tcpa writes; keep it elsewhere and "
            "delete the folder to train again"
        ) from None


def finish(loop: Loop, pipeline: float) -> Result:
    """Test the chosen epoch where that is left to do, and write adapter and result.

    Args:
        loop: has trained all epochs.
        pipeline: images/s of the input pipeline alone.
    """
    spec, state, built = loop.spec, loop.state, loop.built
    chosen_on, epoch = CHOOSES_ON[spec.protocol], spec.epochs
    if chosen_on is not None:
        built.model.load_trained(loop.best)
        epoch = state.best_epoch
    official = chosen_on == "test"
    accuracy, measured_on = state.best_accuracy, MEASURED_ON[spec.protocol]
    if not official:
        accuracy = loop.evaluate(measured_on, epoch=epoch).accuracy
    tested = measured_on == "test"
    if official:
        last = state.last_accuracy
    else:
        last = accuracy if tested and epoch == spec.epochs else None
    val_accuracy = state.best_accuracy if chosen_on == "val" else None
    result = None
    if loop.journal is not None:
        result = Result(
            dataset=spec.dataset,
            label=spec.label,
            method=spec.method,
            seed=spec.seed,
            protocol=spec.protocol,
            chosen_on=chosen_on,
            accuracy=accuracy,
            epoch=epoch,
            epochs=spec.epochs,
            last_accuracy=last,
            best_test_accuracy=state.best_accuracy if official else None,
            val_accuracy=val_accuracy if tested else accuracy,
            **_rates(spec.folder),
            pipeline_images_per_second=pipeline,
            trainable=built.model.num_trainable,
            train_images=loop.splits.train.num_images,
            test_images=loop.splits.evaluation["test"].num_images if tested else 0,
            backbone=built.backbone.name,
            weights=built.backbone.weights,
            normalize=spec.normalize,
            precision=built.numerics.name,
            eval_precision=built.eval_numerics.name,
            implementation=built.implementation(loop.world)[0],
            note=spec.note,
            versions=versions(),
            measured_on=measured_on,
            source=loop.splits.record.get("train", {}).get("source", {}).get("kind", ""),
        )
        _write(spec.folder, built.model, result)
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
