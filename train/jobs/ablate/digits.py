"""Ablations on the demo's digits: small runs side by side, one result file each.

Seed n trains on three quarters of the demo's 1,000 training images and is validated on the rest,
fold n modulo 4; the same model reads the test images once. A run takes seconds, so that an
interrupted one starts anew.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

import tcpa

from ....cli import UsageError, choose_device
from ...demo.digits import FOLDS
from ...demo.methods import PROMPTS, DemoMethod, chosen_methods
from ...demo.session import DemoProgress
from ...demo.training import DemoOutcome, DemoTask, run_tasks
from ...engine.folder import brief, differences
from ...engine.interruption import raised
from ...options.ablate import DEMO, AblateConfig
from ...options.demo import EPOCHS
from ...storage import read_json, write_json
from .measured import Measured
from .studies import VPT, Setting, label

RESULT = "result.json"
QUICK_EPOCHS = 1


def base_prompts() -> tcpa.PromptConfig | None:
    """Return the token prompts from which the studies start: the demo's."""
    return PROMPTS["TCPA"]


def train(
    config: AblateConfig, settings: dict[str, Setting]
) -> tuple[dict[tuple[str, int], Measured], list[str]]:
    """Train what is not finished; see `datasets.train`.

    Raises:
        UsageError: a result that is there is damaged or of other settings, or cannot be written.
        Interrupted: somebody asked it to end; finished runs are kept.
    """
    device = choose_device(config.device)
    found: dict[tuple[str, int], Measured] = {}
    left: dict[DemoTask, tuple[str, int]] = {}
    for name, setting in settings.items():
        for seed in config.seeds:
            task = _task(config, setting, seed, device)
            known = _read(_file(config, name, seed), _describe(task))
            if known is None:
                left[task] = (name, seed)
            else:
                found[name, seed] = known
    if left:
        with raised("stopped; the same command goes on with the runs that are not finished"):
            _train(config, left, found)
    return found, []


def _train(
    config: AblateConfig,
    left: dict[DemoTask, tuple[str, int]],
    found: dict[tuple[str, int], Measured],
) -> None:
    epochs = next(iter(left)).epochs
    with DemoProgress(len(left) * epochs, epochs, "validation") as progress:

        def on_outcome(task: DemoTask, outcome: DemoOutcome) -> None:
            measured = Measured(
                validation=outcome.accuracy,
                test=outcome.then_tested,
                trainable=outcome.trainable,
                seconds_per_epoch=outcome.fastest_epoch,
            )
            name, seed = left[task]
            file = _file(config, name, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {"description": _describe(task), "result": dataclasses.asdict(measured)}
            write_json(file, content)
            found[name, seed] = measured

        run_tasks(list(left), progress.epoch, on_outcome)


def _task(config: AblateConfig, setting: Setting, seed: int, device: torch.device) -> DemoTask:
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
        "method": dataclasses.asdict(task.method),
        "epochs": task.epochs,
        "part": task.part,
        "then_test": task.then_test,
    }
    return json.loads(json.dumps(described))


def _read(file: Path, description: dict[str, Any]) -> Measured | None:
    """Return a finished run; None if it is not there."""
    content = read_json(file)
    if content is None:
        return None
    try:
        saved, result = content["description"], Measured(**content["result"])
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
