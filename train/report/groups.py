"""Runs that may share a mean: equal in everything that decides a result, apart from the seed."""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...cli import UsageError
from ..data.vtab_tasks import TASKS
from ..engine.loop import MEASURED_ON
from ..engine.rundir import differences
from ..recipes.recipe import SCRIPTS, recipe
from .paper import ROWS, published
from .runs import Problem, Run

LABELS = tuple(script.label for script in SCRIPTS.values())
"""Columns of the paper's Table 1."""

CHOSEN = ("learning_rate", "rate_batch", "weight_decay", "chosen")
"""Fields of a recipe that a search decides."""

COMPLETE, PARTIAL, OWN = "complete", "INCOMPLETE", "own"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a line of the table has in common, over datasets and seeds."""

    method: str
    protocol: str
    backbone: str
    weights: str
    normalize: str
    precision: str
    evaluation: str
    """Precision of the evaluation."""
    data: str
    """Whether the images are those of the published dataset."""
    changes: str
    """Options given in place of the recipe's values; "" for the recipe."""


SETTING = [field.name for field in fields(Setting)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunGroup:
    """Finished runs of one setting on one dataset, one for each seed."""

    setting: Setting
    label: str
    """Column of Table 1, or the name of a task of VTAB-1k or of a dataset of the user's own."""
    runs: tuple[Run, ...]
    remarks: tuple[str, ...]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies, percent."""
        return [run.result["accuracy"] for run in self.runs if run.result]

    @property
    def mean(self) -> float:
        """Mean test accuracy, percent."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1), points; None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.runs) > 1 else None

    @property
    def listed(self) -> tuple[str, str, str]:
        """Seeds, accuracies and folders of the runs."""
        seeds = " ".join(str(run.seed) for run in self.runs)
        folders = " ; ".join(str(run.folder) for run in self.runs)
        return seeds, " ".join(map(str, self.accuracies)), folders

    @property
    def paper(self) -> float | None:
        """Published accuracy, percent."""
        return published(self.setting.method, self.label)

    @property
    def source(self) -> str:
        """What the images of VTAB-1k are: original, jpeg or unclear; "" of other datasets."""
        kinds = {_source(split) for split in _splits(self.runs[0]).values()} - {""}
        return " and ".join(sorted(kinds))

    @property
    def comparable(self) -> bool:
        """Whether the images are all those of the published dataset."""
        return self.setting.data == COMPLETE and self.source in ("", "original")

    @property
    def delta(self) -> float | None:
        """Our mean minus the published value, points; None where they are of other images."""
        return self.mean - self.paper if self.comparable and self.paper is not None else None


def average(groups: Sequence[RunGroup]) -> float | None:
    """Return the mean over the ten datasets, percent; None unless each is there just once."""
    if sorted(group.label for group in groups) != sorted(LABELS):
        return None
    return statistics.fmean(group.mean for group in groups)


def group_runs(runs: Iterable[Run]) -> tuple[list[RunGroup], list[Problem]]:
    """Put finished runs together.

    Returns:
        Groups by setting and then in the order of Table 1 and of VTAB-1k, and runs that are left
        out: they repeat a seed of their group, or were not tested.
    """
    found: dict[Any, dict[int, Run]] = {}
    problems = []
    for run in runs:
        if run.result is None:
            continue
        if MEASURED_ON[run.protocol] != "test":
            text = "left out: a trial of a search, which never reads the test images"
            problems.append(Problem(run.folder, text))
            continue
        seeds = found.setdefault((setting_of(run), run.recipe["label"], _identity(run)), {})
        first = seeds.setdefault(run.seed, run)
        if first is not run:
            text = f"left out: repeats seed {run.seed} of {first.folder}"
            problems.append(Problem(run.folder, text))
    groups = [
        RunGroup(setting=setting, label=label, runs=tuple(seeds.values()), remarks=_remarks(seeds))
        for (setting, label, _), seeds in found.items()
    ]
    order = {setting: place for place, setting in enumerate(_in_order(groups))}
    groups.sort(key=lambda group: (order[group.setting], place_of(group.label)))
    return groups, problems


def place_of(label: str) -> tuple[int, str]:
    """Return the key that sorts datasets as Table 1 does, then the tasks of VTAB-1k, then those of
    the user's own."""
    known = (*LABELS, *TASKS)
    return (known.index(label) if label in known else len(known)), label


def _in_order(groups: Iterable[RunGroup]) -> list[Setting]:
    """Return the settings, methods as in the tables and others after them."""
    rows = list(ROWS)

    def place(setting: Setting) -> tuple[Any, ...]:
        row = rows.index(setting.method) if setting.method in rows else len(rows)
        return row, *asdict(setting).values()

    return sorted({group.setting for group in groups}, key=place)


def by_setting(groups: Iterable[RunGroup]) -> dict[Setting, list[RunGroup]]:
    """Return the groups of each setting."""
    found: dict[Setting, list[RunGroup]] = {}
    for group in groups:
        found.setdefault(group.setting, []).append(group)
    return found


def setting_of(run: Run) -> Setting:
    """Return the setting of a run that has begun."""
    options, start = run.options, run.starts[0]
    backbone = start["backbone"]
    weights = str(backbone.get("weights"))
    if weights != "none":
        # Random weights differ from seed to seed, as the seed decides them.
        weights += f" ({str(backbone.get('fingerprint'))[:8]})"
    return Setting(
        method=run.method,
        protocol=run.protocol,
        backbone=str(backbone.get("name")),
        weights=weights,
        normalize=str(options.get("normalize")),
        precision=start["precision"],
        evaluation=start["eval_precision"],
        data=_completeness(run),
        changes=", ".join(_changes(run)),
    )


def names_of(settings: Sequence[Setting]) -> dict[Setting, str]:
    """Return short names: method and protocol, what differs between the settings, and whatever
    makes a comparison with the paper unfair."""
    varying = [name for name in SETTING if len({getattr(one, name) for one in settings}) > 1]
    return {setting: ", ".join(_words(setting, varying)) for setting in settings}


def _words(setting: Setting, varying: Sequence[str]) -> Iterator[str]:
    yield setting.method
    yield setting.protocol
    for name in ("backbone", "weights", "normalize", "precision"):
        if name in varying:
            yield getattr(setting, name)
    if "evaluation" in varying:
        yield f"evaluated in {setting.evaluation}"
    if setting.data != COMPLETE:
        yield f"{setting.data} data"
    if setting.changes:
        yield setting.changes


def _splits(run: Run) -> dict[str, dict[str, Any]]:
    data = run.starts[0]["data"]
    return {name: split for name, split in data.items() if isinstance(split, dict)}


def _source(split: dict[str, Any]) -> str:
    """Return what the images of a split of VTAB-1k are; "" of other datasets."""
    return str(split.get("source", {}).get("kind", ""))


def _completeness(run: Run) -> str:
    if run.recipe["label"] not in (*LABELS, *TASKS):
        return OWN
    splits = _splits(run)
    whole = bool(splits) and all(split.get("complete") is True for split in splits.values())
    return COMPLETE if whole else PARTIAL


def _changes(run: Run) -> list[str]:
    """Return what differs from the recipe of this version, as `name=value`."""
    try:
        usual = json.loads(json.dumps(asdict(recipe(run.dataset, run.method))))
    except UsageError:
        return ["a method that this version does not have"]
    chosen = run.recipe.get("chosen")
    # What a search chose differs from dataset to dataset; that it chose is one setting.
    aside = ("seed", "note", *(CHOSEN if chosen else ()))
    changed = [
        f"{name.removeprefix('prompts.')}={value}"
        for name, _, value in differences(usual, run.recipe)
        if name not in aside
    ]
    changed += [f"rate and decay chosen on validation images ({chosen})"] if chosen else []
    return changed + [name for name in ("compile", "cuda_graph") if run.options.get(name)]


def _identity(run: Run) -> str:
    """Return what tells apart runs that look alike: the whole recipe, and which images."""
    splits = {}
    for name, split in _splits(run).items():
        known = {key: split.get(key) for key in ("images", "classes", "rule")}
        if "source" in split:
            known["source"] = _source(split)
        if _completeness(run) != COMPLETE:
            # The sizes of the images in their order, which do not depend on the machine.
            known["index"] = split.get("cache", {}).get("index_sha256")
        splits[name] = known
    described = {name: value for name, value in run.recipe.items() if name not in ("seed", "note")}
    # What the setting has in resolved form.
    resolved = ("precision", "eval_precision", "weights")
    options = {name: value for name, value in run.options.items() if name not in resolved}
    return json.dumps([described, options, splits], sort_keys=True)


def _copies(splits: dict[str, dict[str, Any]]) -> list[str]:
    """Say once of each kind that images of VTAB-1k are not, or may not be, the originals."""
    reasons: dict[str, Any] = {}
    for split in splits.values():
        if _source(split) not in ("", "original"):
            reasons.setdefault(_source(split), split["source"].get("reason"))
    names = {"jpeg": "lossy copies", "unclear": "perhaps lossy copies"}
    return [
        f"images are {names.get(kind, kind)} ({reason}): not comparable with published results"
        for kind, reason in reasons.items()
    ]


def _remarks(seeds: dict[int, Run]) -> tuple[str, ...]:
    """Return what a reader of the mean should know."""
    remarks: list[str] = []
    for run in seeds.values():
        splits = _splits(run)
        short = [
            f"{split.get('images')} of {split.get('expected_images')} {name}"
            for name, split in splits.items()
            if split.get("complete") is False
        ]
        if short:
            remarks.append(f"{', '.join(short)} images")
        remarks += _copies(splits)
        for split in splits.values():
            if "ours" in str(split.get("rule")):
                remarks.append(str(split["rule"]))
            if split.get("caution"):
                remarks.append(str(split["caution"]).rstrip("."))
    return tuple(dict.fromkeys(remarks))
