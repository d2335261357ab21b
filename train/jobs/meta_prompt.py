"""Meta-training from the command line: open datasets, fit clusters, train, write one file."""

import time

from rich.console import Console

from ...cli import UsageError, require_writable
from ..engine.datasets import load_splits
from ..engine.distributed import World, join
from ..engine.meta_prompt import MetaTraining, Task, meta_train, save_meta_prompt
from ..engine.model import build_model
from ..engine.stages import Stages
from ..engine.trainer import Trainer
from ..options.meta_prompt import MetaPromptConfig
from ..recipes.runspec import resolve

TIMES = 20
"""How often the progress is told."""


def train_meta_prompt(config: MetaPromptConfig) -> None:
    """Train a meta-prompt and write it.

    Raises:
        UsageError: something that was asked for cannot be had, or there are several processes.
    """
    require_writable(config.output, "--output")
    console = Console(highlight=False, soft_wrap=True)
    with join(config.device) as world:
        if world.size > 1:
            raise UsageError(
                f"meta-prompt: got {world.size} processes, expected one; start it without torchrun"
            )
        tasks = [_open(config, dataset, world, console) for dataset in config.datasets]
        settings = MetaTraining(
            epochs=config.epochs,
            update_steps=config.update_steps,
            learning_rate=config.learning_rate,
            seed=config.seed,
        )
        started = time.monotonic()

        def say(step: int, total: int) -> None:
            """Tell twenty times how far it is, and after the first step."""
            if step == 1 or step * TIMES // total > (step - 1) * TIMES // total:
                left = (time.monotonic() - started) / step * (total - step)
                console.print(f"step {step:,} of {total:,}, about {left:,.0f} s left")

        save_meta_prompt(meta_train(tasks, settings, say), config.output)
    console.print(f"{config.output}: pass it as --meta-prompt to run --method dam-vp")


def _open(config: MetaPromptConfig, dataset: str, world: World, console: Console) -> Task:
    """Open a dataset and fit the clusters of its model."""
    spec = resolve(config.task(dataset))
    splits = load_splits(spec, world)
    built = build_model(spec, world, splits.num_classes)
    trainer = Trainer(built.model, spec, world, built.numerics, total_steps=1)
    found = Stages(spec, world, trainer, splits.train).before(0)
    console.print(f"{dataset}: {found}")
    return Task(model=built.model, source=splits.train)
