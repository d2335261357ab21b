"""Reading the folders of runs: what is whole, what is unfinished, what cannot be believed."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cli import UsageError
from ..engine.checkpoint import CURRENT, read_metrics
from ..engine.loop import CHOOSES_ON, MEASURED_ON
from ..engine.rundir import CONFIG, ENVIRONMENT, LOG, METRICS, RESULT, last_log_line
from ..storage import read_json

BEGUN = (CONFIG, RESULT, METRICS, CURRENT)
SIGNS = (*BEGUN, LOG)
"""A folder with one of these files is the folder of a run."""


NUMBERS = ("seconds_per_epoch", "seconds_per_evaluation", "images_per_second",
           "pipeline_images_per_second", "trainable")  # fmt: skip
"""Of a result, beside its accuracy."""


class _Damaged(Exception):
    """A run's files are not what a run writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run, finished or not."""

    folder: Path
    recipe: dict[str, Any]
    options: dict[str, Any]
    starts: list[dict[str, Any]]
    """Entries of the environment record, one for every start."""
    lines: list[dict[str, Any]]
    """Metrics; see `engine.checkpoint.Journal`."""
    result: dict[str, Any] | None
    """None: the run is not finished."""

    @property
    def dataset(self) -> str:
        """Name of the dataset."""
        return self.recipe["dataset"]

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.recipe["method"]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.recipe["seed"]

    @property
    def protocol(self) -> str:
        """How the epoch is chosen."""
        return self.options["protocol"]

    @property
    def devices(self) -> str:
        """Where it ran; several are possible after a resume."""
        names = (
            f"{start['processes']} x {start['device']}"
            if start["processes"] > 1
            else start["device"]
            for start in self.starts
        )
        return "; ".join(dict.fromkeys(names))

    def points(self, kind: str, name: str, **chosen: str) -> list[tuple[int, float]]:
        """Return (epoch, value) of one number of the metrics."""
        return [
            (line["epoch"], line[name])
            for line in self.lines
            if line["kind"] == kind and all(line.get(key) == v for key, v in chosen.items())
        ]


@dataclass(frozen=True, slots=True)
class Problem:
    """A run that is in no mean."""

    folder: Path
    text: str


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Problem]]:
    """Read all runs below some folders.

    Args:
        folders: each the folder of a run, or one that holds some at any depth.

    Returns:
        Runs, unfinished ones among them, and what cannot be used or is unfinished, with the reason.

    Raises:
        UsageError: a folder is not there, or none of them holds a run.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(
                f"FOLDERS: got {folder}, expected a folder of runs; give the --output of "
                "`tcpa-train run` or `sweep`"
            )
        for path in _find(folder):
            found.setdefault(path.resolve(), path)
    if not found:
        raise UsageError(
            f"FOLDERS: got {', '.join(map(str, folders))} without any run, expected folders with "
            f"{CONFIG} and {METRICS} at some depth; give the --output of `tcpa-train run` or "
            "`sweep`"
        )
    runs, problems = [], []
    for path in found.values():
        if not any((path / name).exists() for name in BEGUN):
            said = last_log_line(path) or "empty"
            problems.append(Problem(path, f"has not begun; the end of its {LOG}: {said}"))
            continue
        try:
            run = _read(path)
        except _Damaged as error:
            problems.append(Problem(path, f"damaged: {error}"))
            continue
        runs.append(run)
        if run.result is None:
            problems.append(Problem(path, _how_far(run)))
    return runs, problems


def finished_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run; None where there is none yet.

    Raises:
        UsageError: it does not agree with the run's configuration and metrics.
    """
    if not (folder / RESULT).exists():
        return None
    try:
        return _read(folder).result
    except _Damaged as error:
        raise UsageError(
            f"{folder}: damaged or altered: {error}; if only {RESULT} is, delete it and repeat the "
            "command, which writes it again; else delete the folder to train again"
        ) from None


def _find(folder: Path) -> list[Path]:
    """Return the folders of runs below a folder, in order; links to folders are not followed."""
    found = []
    for path, inner, files in os.walk(folder):
        if set(SIGNS) & set(files):
            found.append(Path(path))
            # A run's folder holds no other run.
            inner.clear()
        inner.sort()
    return found


def _how_far(run: Run) -> str:
    done = max((epoch for epoch, _ in run.points("epoch", "loss")), default=0)
    return (
        f"unfinished: {done} of {run.recipe['epochs']} epochs; it is running, or the command that "
        "started it resumes it"
    )


def _read(folder: Path) -> Run:
    config = _json(folder / CONFIG, dict)
    recipe, options = _parts(config, CONFIG, recipe=dict, options=dict)
    _parts(recipe, CONFIG, dataset=str, method=str, label=str, note=str, seed=int, epochs=int)
    if options.get("protocol") not in CHOOSES_ON:
        raise _Damaged(f"{CONFIG} names no protocol")
    finished = (folder / RESULT).exists()
    begun = (folder / ENVIRONMENT).exists()
    run = Run(
        folder=folder,
        recipe=recipe,
        options=options,
        starts=_starts(folder) if begun or finished else [],
        lines=_metrics(folder),
        result=_json(folder / RESULT, dict) if finished else None,
    )
    if run.result is not None:
        _check_result(run, run.result)
    return run


def _json(path: Path, kind: type) -> Any:
    try:
        found = read_json(path)
    except UsageError:
        raise _Damaged(f"{path.name} is no JSON") from None
    if found is None:
        raise _Damaged(f"{path.name} is missing")
    if not isinstance(found, kind):
        raise _Damaged(f"{path.name} holds a {type(found).__name__}")
    return found


def _parts(values: Any, place: str, **kinds: type) -> list[Any]:
    """Return parts of an object of a file, which have these types; float: a finite number."""
    if not isinstance(values, dict):
        raise _Damaged(f"{place} holds a {type(values).__name__}")
    for name, kind in kinds.items():
        found: Any = values.get(name)
        fits = isinstance(found, int | float if kind is float else kind)
        fits = fits and not isinstance(found, bool)
        if not fits or (kind is float and not math.isfinite(found)):
            raise _Damaged(f"{place}: {name} is {found!r}")
    return [values[name] for name in kinds]


def _starts(folder: Path) -> list[dict[str, Any]]:
    starts = _json(folder / ENVIRONMENT, list)
    if not starts:
        raise _Damaged(f"{ENVIRONMENT} is empty")
    texts = dict.fromkeys(("date", "device", "precision", "eval_precision"), str)
    for start in starts:
        _parts(start, ENVIRONMENT, **texts, processes=int, backbone=dict, data=dict, versions=dict)
    return starts


def _metrics(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = read_metrics(folder)
    except (OSError, ValueError, RecursionError) as error:
        raise _Damaged(f"{METRICS} cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        place = f"{METRICS}, line {number}"
        (kind,) = _parts(line, place, kind=str)
        if kind in ("epoch", "evaluation"):
            _parts(line, place, epoch=int, loss=float, seconds=float)
        if kind == "evaluation":
            _parts(line, place, split=str, accuracy=float)
    return lines


def _check_result(run: Run, result: dict[str, Any]) -> None:
    """Compare a result with the configuration and with the metrics, the source of truth."""
    expected = {name: run.recipe[name] for name in ("dataset", "method", "seed", "epochs")}
    for name, value in (expected | {"protocol": run.protocol}).items():
        if result.get(name) != value:
            raise _Damaged(f"{RESULT} says {name} {result.get(name)!r}, {CONFIG} {value!r}")
    accuracy, epoch = _parts(result, RESULT, accuracy=float, epoch=int)
    _parts(result, RESULT, **dict.fromkeys(NUMBERS, float))
    trained = len(run.points("epoch", "loss"))
    if trained != run.recipe["epochs"]:
        raise _Damaged(f"{METRICS} has {trained} epochs, {CONFIG} {run.recipe['epochs']}")
    measured = run.points("evaluation", "accuracy", split=MEASURED_ON[run.protocol])
    if (epoch, accuracy) not in measured:
        told = dict(measured).get(epoch, "nothing")
        raise _Damaged(
            f"{RESULT} says {accuracy} % after epoch {epoch}, {METRICS} says {told} there"
        )
    chosen_on = CHOOSES_ON[run.protocol]
    if chosen_on is None:
        return
    # Pruning restarts training: only the epochs after it can be chosen.
    earlier = run.recipe["epochs"] - run.recipe["epochs"] // run.recipe.get("rounds", 1)
    points = run.points("evaluation", "accuracy", split=chosen_on)
    points = [point for point in points if point[0] > earlier]
    # Of equal epochs the first one, as in the engine.
    best, _ = max(points, key=lambda point: point[1], default=(None, 0.0))
    if best != epoch:
        raise _Damaged(
            f"{RESULT} says that epoch {epoch} is the best on {chosen_on}, {METRICS} says {best}"
        )
