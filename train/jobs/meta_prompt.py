"""Meta-prompts of DAM-VP: one frame from which the frames of all clusters start, found by Reptile.

`tcpa-train meta-prompt` opens datasets, fits clusters, trains, and writes one safetensors file with
the four strips of a frame.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

import tcpa
from tcpa.methods.vp import STRIPS

from ...cli import UsageError, require_writable
from ..engine.data import Source, load_splits
from ..engine.distributed import World, join
from ..engine.model import build_model
from ..engine.stages import META_PROMPT, Stages
from ..engine.trainer import STAGE, Trainer, derive
from ..options.meta_prompt import MetaPromptConfig
from ..recipes.runspec import resolve
from ..storage import write_whole

TIMES = 20
"""How often the progress is told."""

WEIGHT_DECAY = 1e-4
"""Of the copies, as DAM-VP's code sets it."""
HEAD_RATE = 0.1
"""Learning rate of the linear head of each task."""
META_RATE = 0.5
"""Part of the mean distance to the copies that the meta-prompt moves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaTask:
    """A dataset to learn from, with a model whose clusters are fitted to it."""

    model: tcpa.PromptedViT
    source: Source


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
        started = time.monotonic()

        def say(step: int, total: int) -> None:
            """Tell twenty times how far it is, and after the first step."""
            if step == 1 or step * TIMES // total > (step - 1) * TIMES // total:
                left = (time.monotonic() - started) / step * (total - step)
                console.print(f"step {step:,} of {total:,}, about {left:,.0f} s left")

        save_meta_prompt(meta_train(tasks, config, say), config.output)
    console.print(f"{config.output}: pass it as --meta-prompt to run --method dam-vp")


def _open(config: MetaPromptConfig, dataset: str, world: World, console: Console) -> MetaTask:
    """Open a dataset and fit the clusters of its model."""
    spec = resolve(config.task(dataset))
    splits = load_splits(spec, world)
    built = build_model(spec, world, splits.num_classes)
    trainer = Trainer(built.model, spec, world, built.numerics, total_steps=1)
    found = Stages(spec, world, trainer, splits.train).before(0)
    console.print(f"{dataset}: {found}")
    return MetaTask(model=built.model, source=splits.train)


def meta_train(
    tasks: Sequence[MetaTask],
    config: MetaPromptConfig,
    on_step: Callable[[int, int], None] = lambda step, total: None,
) -> list[Tensor]:
    """Train a meta-prompt.

    In a step every task starts the frames of its clusters from the meta-prompt, takes
    `update_steps` SGD steps, and the meta-prompt moves towards the mean of all frames of all tasks.
    A task whose images end begins them anew.

    Args:
        tasks: at least one, with fitted clusters; their frames have one size, their heads are
            trained along.
        config: how.
        on_step: is told after every step its number, from 1, and how many there are.

    Returns:
        The strips up, down, left, right.

    Source:
        DAM-VP (CVPR 2023), code shikiw/DAM-VP dec5821. Every cluster of a task takes part in
        every step, also one of which a batch has no image.
    """
    prompts = [cast(Any, task.model.input_prompt) for task in tasks]
    torch.manual_seed(derive(config.seed, STAGE, 0))
    meta = [torch.randn_like(getattr(prompts[0], name)[0]) for name in STRIPS]
    heads = [_head_optimizer(task.model) for task in tasks]
    rounds = max(len(task.source) for task in tasks) // config.update_steps or 1
    total = config.epochs * rounds
    batches = [_endless(task.source) for task in tasks]
    for step in range(total):
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
        found: list[list[Tensor]] = []
        for task, prompt, head, stream in zip(tasks, prompts, heads, batches, strict=True):
            prompt.use_meta_prompt(meta)
            frames = torch.optim.SGD(prompt.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
            for _ in range(config.update_steps):
                batch = next(stream)
                loss = F.cross_entropy(task.model(batch.images).float(), batch.labels)
                for optimizer in (frames, head):
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in (frames, head):
                    optimizer.step()
            found.append([getattr(prompt, name).detach().clone() for name in STRIPS])
        for index, value in enumerate(meta):
            copies = torch.cat([strips[index] for strips in found])
            value -= META_RATE * (value - copies).mean(0)
        on_step(step + 1, total)
    return meta


def _head_optimizer(model: tcpa.PromptedViT) -> torch.optim.Optimizer:
    named = model.trainable_named_parameters().items()
    values = [value for name, value in named if name.startswith("backbone.head")]
    return torch.optim.SGD(values, lr=HEAD_RATE)


def _endless(source: Source):
    epoch = 0
    while True:
        yield from source.epoch(epoch)
        epoch += 1


def save_meta_prompt(strips: Sequence[Tensor], path: Path) -> None:
    """Write a meta-prompt whole.

    Raises:
        UsageError: it cannot be written, or a value is not finite.
    """
    if not all(bool(torch.isfinite(strip).all()) for strip in strips):
        raise UsageError(
            f"{path}: got NaN or infinity in the meta-prompt, expected finite values; train with a "
            "lower learning rate"
        )
    # Strips that share memory would be refused; clones also make views contiguous.
    pairs = zip(STRIPS, strips, strict=True)
    named = {name: strip.detach().cpu().clone().contiguous() for name, strip in pairs}
    write_whole(path, save(named, {"format": META_PROMPT}))
