"""Accuracy on a split."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import tcpa

from .distributed import World
from .inputs import Source
from .precision import Numerics


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an evaluation found, over all processes."""

    accuracy: float
    """Top-1, percent."""
    loss: float
    """Mean cross-entropy."""
    images: int
    seconds: float


@torch.no_grad()
def evaluate(
    model: tcpa.PromptedViT,
    source: Source,
    world: World,
    numerics: Numerics,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Classify a split; waits for the device once, at the end. Leaves the model as it was.

    Args:
        model: its weights have the dtype of `numerics`.
        source: every image once, over all processes.
        world: the processes.
        numerics: precision.
        check: called before every batch; may raise to end it.
    """
    start, was_training = time.perf_counter(), model.training
    model.eval()
    counts, seen = torch.zeros(3, dtype=torch.float64, device=world.device), 0
    for batch in source.epoch(0):
        check()
        # A process may have no row of a tiny last batch.
        if len(batch.images) == 0:
            continue
        with numerics.context(world.device):
            logits = model(batch.images.to(numerics.weights)).float()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        hits = (logits.argmax(1) == batch.labels).sum()
        counts[:2] += torch.stack((hits.double(), loss.double()))
        seen += len(batch.labels)
    model.train(was_training)
    counts[2] = seen
    hits, loss, images = world.sum(counts).tolist()
    return Evaluation(
        accuracy=100 * hits / images,
        loss=loss / images,
        images=int(images),
        seconds=time.perf_counter() - start,
    )


class Twin:
    """A float32 copy of a model whose frozen weights are stored in less, for exact evaluations."""

    def __init__(self, model: tcpa.PromptedViT) -> None:
        self._model = model

    def of(self, model: tcpa.PromptedViT) -> tcpa.PromptedViT:
        """Take over the trained values of a model and return the copy."""
        self._model.load_trained(model.trained_tensors())
        return self._model
