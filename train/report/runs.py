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
    """Metrics; see `engine.journal`."""
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
        "started it goes on with it"
    )


def _read(folder: Path) -> Run:
    config = _json(folder / CONFIG, dict)
    recipe, options = _part(config, "recipe", dict, CONFIG), _part(config, "options", dict, CONFIG)
    for name in ("dataset", "method", "label", "note"):
        _part(recipe, name, str, CONFIG)
    for name in ("seed", "epochs"):
        _part(recipe, name, int, CONFIG)
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


def _part(values: dict[str, Any], name: str, kind: type, file: str) -> Any:
    found = values.get(name)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise _Damaged(f"{file}: {name} is {found!r}")
    return found


def _number(values: dict[str, Any], name: str, file: str) -> float:
    found = values.get(name)
    if not isinstance(found, int | float) or isinstance(found, bool) or not math.isfinite(found):
        raise _Damaged(f"{file}: {name} is {found!r}")
    return found


def _starts(folder: Path) -> list[dict[str, Any]]:
    starts = _json(folder / ENVIRONMENT, list)
    for start in starts:
        if not isinstance(start, dict):
            raise _Damaged(f"{ENVIRONMENT} holds a {type(start).__name__}")
        for name in ("date", "device", "precision", "eval_precision"):
            _part(start, name, str, ENVIRONMENT)
        _part(start, "processes", int, ENVIRONMENT)
        for name in ("backbone", "data", "versions"):
            _part(start, name, dict, ENVIRONMENT)
    if not starts:
        raise _Damaged(f"{ENVIRONMENT} is empty")
    return starts


def _metrics(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = read_metrics(folder)
    except (OSError, ValueError, RecursionError) as error:
        raise _Damaged(f"{METRICS} cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
            raise _Damaged(f"{METRICS}, line {number} is no record")
        place = f"{METRICS}, line {number}"
        if line["kind"] in ("epoch", "evaluation"):
            _part(line, "epoch", int, place)
            _number(line, "loss", place)
            _number(line, "seconds", place)
        if line["kind"] == "evaluation":
            _part(line, "split", str, place)
            _number(line, "accuracy", place)
    return lines


def _check_result(run: Run, result: dict[str, Any]) -> None:
    """Compare a result with the configuration and with the metrics, the source of truth."""
    for name, value in (
        ("dataset", run.dataset),
        ("method", run.method),
        ("seed", run.seed),
        ("protocol", run.protocol),
        ("epochs", run.recipe["epochs"]),
    ):
        if result.get(name) != value:
            raise _Damaged(f"{RESULT} says {name} {result.get(name)!r}, {CONFIG} {value!r}")
    accuracy, epoch = _number(result, "accuracy", RESULT), _part(result, "epoch", int, RESULT)
    for name in ("seconds_per_epoch", "seconds_per_evaluation", "images_per_second",
                 "pipeline_images_per_second", "trainable"):  # fmt: skip
        _number(result, name, RESULT)
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
    if chosen_on is not None:
        # Of equal epochs the first one, as in the engine.
        # Pruning begins anew: only the epochs after it can be chosen.
        earlier = run.recipe["epochs"] - run.recipe["epochs"] // run.recipe.get("rounds", 1)
        points = run.points("evaluation", "accuracy", split=chosen_on)
        points = [point for point in points if point[0] > earlier]
        best, _ = max(points, key=lambda point: point[1], default=(None, 0.0))
        if best != epoch:
            raise _Damaged(
                f"{RESULT} says that epoch {epoch} is the best on {chosen_on}, {METRICS} says "
                f"{best}"
            )
