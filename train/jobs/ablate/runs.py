"""The runs of an ablation: on a dataset by the training program, on the demo's digits side by side.

On a dataset a setting is the start with other token prompts and a name of its own; recipe, splits,
checkpoints and resuming are those of `tcpa-train run`. On the digits seed n trains on three
quarters of the demo's 1,000 training images and is validated on the rest, fold n modulo 4; the same
model reads the test images once. A run takes seconds, so that an interrupted one restarts.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import tcpa

from ....cli import UsageError, choose_device
from ...demo.digits import FOLDS
from ...demo.methods import PROMPTS, DemoMethod, chosen_methods
from ...demo.session import DemoProgress
from ...demo.training import DemoOutcome, DemoTask, run_tasks
from ...engine.data import Splits
from ...engine.interruption import raise_on_signal
from ...engine.rundir import brief, differences
from ...options.ablate import DEMO, POOL_OPTIONS, AblateConfig
from ...options.demo import EPOCHS
from ...recipes.runspec import RunSpec, resolve
from ...storage import read_json, write_json
from ..run import run_spec
from .studies import VPT, StudySetting, label, shown_name

RESULT = "result.json"
QUICK_EPOCHS = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationResult:
    """One finished run."""

    validation: float
    """Accuracy on the validation images, percent."""
    test: float | None
    """Accuracy on the test images of the same model, percent; None under protocol tune."""
    trainable: int
    """Trainable parameters, the head included."""
    seconds_per_epoch: float
    """Training time of an epoch, without evaluation: the median; of the digits, the fastest."""


Runs = Mapping[tuple[str, int], AblationResult]
"""Name of a setting and seed -> what was measured."""


def base_prompts(config: AblateConfig) -> tcpa.PromptConfig | None:
    """Return the token prompts from which the studies start.

    Raises:
        UsageError: there is no such dataset or method, or an option does not fit it.
    """
    return PROMPTS["TCPA"] if config.recipe == DEMO else resolve(config.base()).prompts


def train(
    config: AblateConfig, settings: dict[str, StudySetting], splits: Splits | None = None
) -> tuple[Runs, list[str]]:
    """Train what is not finished.

    Args:
        config: what to train.
        settings: by name.
        splits: images to use in place of those that `config.data` holds.

    Returns:
        What was measured, and what is wrong with the runs on a dataset that failed after the first.

    Raises:
        UsageError: the first run cannot be carried out; a result of the digits is damaged or of
            other settings, or cannot be written.
        Interrupted: somebody asked it to end; finished runs are kept, and on a dataset the run of
            that moment is saved.
    """
    if config.recipe == DEMO:
        return _train_on_digits(config, settings), []
    found: dict[tuple[str, int], AblationResult] = {}
    failures: list[str] = []
    for name, setting in settings.items():
        for seed in config.seeds:
            try:
                found[name, seed] = _train_on_dataset(config, setting, seed, splits)
            except UsageError as error:
                if not found and not failures:
                    raise
                failures.append(f"{shown_name(name)}, seed {seed}: {error}")
    return found, failures


# On a dataset.


def _train_on_dataset(
    config: AblateConfig, setting: StudySetting, seed: int, splits: Splits | None
) -> AblationResult:
    """Train one run, or read its result."""
    result = run_spec(spec_of(config, setting, seed), splits)
    assert result.val_accuracy is not None
    return AblationResult(
        validation=result.val_accuracy,
        test=result.accuracy if result.measured_on == "test" else None,
        trainable=result.trainable,
        seconds_per_epoch=result.seconds_per_epoch,
    )


def spec_of(config: AblateConfig, setting: StudySetting, seed: int) -> RunSpec:
    """Return the run of a setting: its prompts are complete, options change them no more, and what
    a search chose for the start holds for it too."""
    start = config.base(seed)
    spec = resolve(start)
    if not setting.name:
        return spec
    changes: dict[str, Any] = dict.fromkeys(POOL_OPTIONS)
    if start.choices is not None:
        chosen = {"learning_rate": spec.peak_rate, "weight_decay": spec.weight_decay}
        changes |= {"choices": None, **chosen}
    method = spec.method.removeprefix(config.base_method)
    return replace(
        resolve(replace(start, **changes)),
        method=label(setting.name, config.base_method) + method,
        prompts=setting.prompts,
    )


# On the digits.


def _train_on_digits(
    config: AblateConfig, settings: dict[str, StudySetting]
) -> dict[tuple[str, int], AblationResult]:
    device = choose_device(config.device)
    found: dict[tuple[str, int], AblationResult] = {}
    left: dict[DemoTask, tuple[str, int]] = {}
    for name, setting in settings.items():
        for seed in config.seeds:
            task = task_of(config, setting, seed, device)
            known = _read(_file(config, name, seed), _describe(task))
            if known is None:
                left[task] = (name, seed)
            else:
                found[name, seed] = known

    def on_outcome(task: DemoTask, outcome: DemoOutcome) -> None:
        result = AblationResult(
            validation=outcome.accuracy,
            test=outcome.then_tested,
            trainable=outcome.trainable,
            seconds_per_epoch=outcome.fastest_epoch,
        )
        file = _file(config, *left[task])
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"description": _describe(task), "result": asdict(result)})
        found[left[task]] = result

    if left:
        epochs = next(iter(left)).epochs
        with (
            raise_on_signal("stopped; the same command resumes the runs that are not finished"),
            DemoProgress(len(left), epochs, "validation") as progress,
        ):
            run_tasks(list(left), progress.epoch, on_outcome)
    return found


def task_of(
    config: AblateConfig, setting: StudySetting, seed: int, device: torch.device
) -> DemoTask:
    """Return the run of a setting on the digits, with the optimizer settings tuned for the demo."""
    _, vpt, ours = chosen_methods()
    tuned = vpt if setting.name == VPT else ours
    rate, decay = config.learning_rate, config.weight_decay
    method = DemoMethod(
        name=label(setting.name, config.base_method),
        prompts=setting.prompts,
        learning_rate=tuned.learning_rate if rate is None else rate,
        weight_decay=tuned.weight_decay if decay is None else decay,
    )
    return DemoTask(
        method=method,
        seed=seed,
        epochs=QUICK_EPOCHS if config.quick else config.epochs or EPOCHS,
        device=device,
        part="quick" if config.quick else FOLDS[seed % len(FOLDS)],
        then_test=config.protocol == "val" and not config.quick,
    )


def _file(config: AblateConfig, name: str, seed: int) -> Path:
    run = f"{config.protocol}-seed{seed}"
    return config.output / DEMO / label(name, config.base_method) / run / RESULT


def _describe(task: DemoTask) -> dict[str, Any]:
    """Return everything that decides a result, as JSON data."""
    described = {
        "method": asdict(task.method),
        "epochs": task.epochs,
        "part": task.part,
        "then_test": task.then_test,
    }
    return json.loads(json.dumps(described))


def _read(file: Path, description: dict[str, Any]) -> AblationResult | None:
    """Return a finished run; None if it is not there."""
    content = read_json(file)
    if content is None:
        return None
    try:
        saved, result = content["description"], AblationResult(**content["result"])
    except (TypeError, KeyError):
        raise UsageError(
            f"{file}: got {brief(content)}, expected what a run of `ablate` writes; delete the "
            "file to train it again"
        ) from None
    changed = differences(saved, description)
    if changed:
        name, before, now = changed[0]
        raise UsageError(
            f"{name}: got {brief(now)}, expected {brief(before)} as in {file}; repeat the first "
            "command, or choose another --output"
        )
    return result
