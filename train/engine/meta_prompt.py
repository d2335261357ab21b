"""Meta-prompts of DAM-VP: one frame from which the frames of all clusters start, found by Reptile.

A meta-prompt is a safetensors file with the four strips of a frame.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import tcpa
from tcpa.methods.dam_vp import ClusterFramePrompt
from tcpa.methods.vp import STRIPS

from ...cli import UsageError
from ..storage import write_whole
from .inputs import Source
from .randomness import STAGE, derive

FORMAT = "tcpa-meta-prompt"


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaTraining:
    """Reptile as DAM-VP's code sets it."""

    epochs: int = 200
    update_steps: int = 4
    """Steps of a copy before the meta-prompt moves (`update_step`)."""
    learning_rate: float = 1.0
    """Of the copies, annealed by a cosine over the whole training."""
    weight_decay: float = 1e-4
    """Of the copies."""
    head_learning_rate: float = 0.1
    """Of the linear head of each task."""
    meta_rate: float = 0.5
    """Part of the mean distance to the copies that the meta-prompt moves."""
    seed: int = 2023


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A dataset to learn from, with a model whose clusters are fitted to it."""

    model: tcpa.PromptedViT
    source: Source


def meta_train(
    tasks: Sequence[Task],
    settings: MetaTraining,
    on_step: Callable[[int, int], None] = lambda step, total: None,
) -> list[Tensor]:
    """Train a meta-prompt.

    In a step every task starts the frames of its clusters from the meta-prompt, takes
    `update_steps` SGD steps, and the meta-prompt moves towards the mean of all frames of all tasks.
    A task whose images end begins them anew.

    Args:
        tasks: at least one; their frames have one size, their heads are trained along.
        settings: see `MetaTraining`.
        on_step: is told after every step its number, from 1, and how many there are.

    Returns:
        The strips up, down, left, right.

    Raises:
        UsageError: there is no task, or one has no fitted clusters.

    Source:
        DAM-VP (CVPR 2023), code shikiw/DAM-VP dec5821. Every cluster of a task takes part in
        every step, also one of which a batch has no image.
    """
    if not tasks:
        raise UsageError("tasks: got none, expected at least one dataset; name some")
    prompts = [_frames(task, number) for number, task in enumerate(tasks)]
    torch.manual_seed(derive(settings.seed, STAGE, 0))
    meta = [torch.randn_like(getattr(prompts[0], name)[0]) for name in STRIPS]
    heads = [_head_optimizer(task.model, settings) for task in tasks]
    rounds = max(len(task.source) for task in tasks) // settings.update_steps or 1
    total = settings.epochs * rounds
    batches = [_endless(task.source) for task in tasks]
    for step in range(total):
        rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
        found: list[list[Tensor]] = []
        for task, prompt, head, stream in zip(tasks, prompts, heads, batches, strict=True):
            prompt.use_meta_prompt(meta)
            frames = torch.optim.SGD(
                prompt.parameters(), lr=rate, weight_decay=settings.weight_decay
            )
            for _ in range(settings.update_steps):
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
            value -= settings.meta_rate * (value - copies).mean(0)
        on_step(step + 1, total)
    return meta


def _frames(task: Task, number: int) -> ClusterFramePrompt:
    prompt = task.model.input_prompt
    if not isinstance(prompt, ClusterFramePrompt) or not prompt.fitted:
        raise UsageError(
            f"tasks[{number}]: got a model without fitted clusters, expected one wrapped with "
            "DAMVPConfig; call fit_clusters"
        )
    return prompt


def _head_optimizer(model: tcpa.PromptedViT, settings: MetaTraining) -> torch.optim.Optimizer:
    named = model.trainable_named_parameters().items()
    values = [value for name, value in named if name.startswith("backbone.head")]
    return torch.optim.SGD(values, lr=settings.head_learning_rate)


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
    write_whole(path, save(named, {"format": FORMAT}))


def load_meta_prompt(path: Path) -> list[Tensor]:
    """Read the strips of a meta-prompt.

    Raises:
        UsageError: there is no such file, or it is no meta-prompt.
    """
    try:
        with safe_open(path, framework="pt") as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"--meta-prompt: {path} cannot be read ({error}); name a file of meta-training"
        ) from None
    strips = [named.get(name) for name in STRIPS]
    found = [strip for strip in strips if strip is not None and strip.is_floating_point()]
    if not ours or len(found) < len(STRIPS):
        raise UsageError(
            f"--meta-prompt: {path} is no meta-prompt, expected the strips {', '.join(STRIPS)}; "
            "name a file of meta-training"
        )
    return found
