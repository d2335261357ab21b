"""Ablations on a dataset: every setting is a run of the training program, in a folder of its own.

A setting is a row of the registry with other token prompts, so that everything else - recipe,
splits, checkpoints, resuming - is that of `tcpa-train run`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import tcpa

from ....cli import UsageError
from ...engine.inputs import Splits
from ...options.ablate import POOL_OPTIONS, AblateConfig
from ...options.run import RunConfig
from ...recipes.rows import METHODS, Method
from ...recipes.runspec import resolve
from ..run import run
from .measured import Measured
from .studies import Setting, label, shown_name


def base_prompts(config: AblateConfig) -> tcpa.PromptConfig | None:
    """Return the token prompts from which the studies start.

    Raises:
        UsageError: there is no such dataset or method, or an option does not fit it.
    """
    return resolve(config.base()).prompts


def train(
    config: AblateConfig, settings: dict[str, Setting], splits: Splits | None = None
) -> tuple[dict[tuple[str, int], Measured], list[str]]:
    """Train what is not finished, setting by setting and seed by seed.

    Args:
        config: what to train.
        settings: by name.
        splits: images to use in place of those that `config.data` holds.

    Returns:
        What was measured, and what is wrong with the runs that failed after the first.

    Raises:
        UsageError: the first run cannot be carried out.
        Interrupted: somebody asked it to end; the run of that moment is saved.
    """
    found: dict[tuple[str, int], Measured] = {}
    failures: list[str] = []
    for name, setting in settings.items():
        for seed in config.seeds:
            try:
                found[name, seed] = _train(config, setting, seed, splits)
            except UsageError as error:
                if not found and not failures:
                    raise
                failures.append(f"{shown_name(name)}, seed {seed}: {error}")
    return found, failures


def _train(config: AblateConfig, setting: Setting, seed: int, splits: Splits | None) -> Measured:
    """Train one run, or read its result."""
    start = config.base(seed)
    with _registered(config, setting) as method:
        result = run(_configured(start, method) if setting.name else start, splits)
    assert result.val_accuracy is not None
    return Measured(
        validation=result.val_accuracy,
        test=result.accuracy if result.measured_on == "test" else None,
        trainable=result.trainable,
        seconds_per_epoch=result.seconds_per_epoch,
    )


def _configured(start: RunConfig, method: str) -> RunConfig:
    """Return the configuration of a setting: its prompts are complete, options change them no more,
    and what a search chose for the start holds for it too."""
    changes = dict.fromkeys(POOL_OPTIONS)
    if start.choices is not None:
        base = resolve(start)
        chosen = {"learning_rate": base.peak_rate, "weight_decay": base.weight_decay}
        changes |= {"choices": None, **chosen}
    return replace(start, method=method, **changes)


@contextmanager
def _registered(config: AblateConfig, setting: Setting) -> Iterator[str]:
    """Make a setting a row of the registry while it is trained; yield the row's name."""
    name = label(setting.name, config.base_method)
    if not setting.name:
        yield name
        return
    METHODS[name] = _row(METHODS[config.base_method], setting)
    try:
        yield name
    finally:
        del METHODS[name]


def _row(base: Method, setting: Setting) -> Method:
    return replace(base, prompts=lambda dataset: setting.prompts)
