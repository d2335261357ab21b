"""Train one method on one split of the digits; the same loop for all methods."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import tcpa

from ..engine.step import keep_critical
from .backbone import NORMALIZATION, autocast, load_backbone
from .data import NUM_CLASSES

BATCH_SIZE = 32
WARMUP_SHARE = 0.1
"""Share of the steps over which the learning rate rises; a cosine to zero follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to adapt the frozen backbone."""

    name: str
    prompts: tcpa.PromptConfig | None
    learning_rate: float
    weight_decay: float
    input_prompt: tcpa.InputConfig | None = None
    tuning: tcpa.TuningConfig = field(default_factory=tcpa.HeadTuning)


@dataclass(frozen=True, slots=True)
class Split:
    """Training and test images of one seed: float32 `[N, 1, 32, 32]`, int64 `[N]`, one device."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch of training gave; `test_accuracy` is None where it was not measured."""

    method: str
    seed: int
    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float | None
    seconds: float


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak learning rate for step 0..steps - 1: warm-up, then a cosine."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = torch.tensor((step - warmup) / max(1, steps - warmup))
    return float((1 + torch.cos(torch.pi * progress)) / 2)


@torch.no_grad()
def predict(model: tcpa.PromptedViT, images: Tensor) -> Tensor:
    """Return the digits that the model reads in images `[N, 1, 32, 32]`: int64 `[N]`."""
    model.eval()
    with autocast(images.device):
        return torch.cat([model(x).argmax(1) for x in images.split(256)])


def wrap_backbone(
    prompts: tcpa.PromptConfig | None,
    input_prompt: tcpa.InputConfig | None,
    tuning: tcpa.TuningConfig,
) -> tcpa.PromptedViT:
    """Put three choices on a fresh copy of the shipped backbone.

    Raises:
        ValueError: they cannot be put on it; the message says why.
    """
    return tcpa.wrap(
        load_backbone(),
        prompts,
        input_prompt=input_prompt,
        tuning=tuning,
        num_classes=NUM_CLASSES,
        normalization=NORMALIZATION,
        # No images of ours are among those that a side network's weights come from.
        load_weights=False,
    )


def train_method(
    method: Method, split: Split, *, seed: int, epochs: int, on_epoch: Callable[[Epoch], None]
) -> tcpa.PromptedViT:
    """Adapt a fresh copy of the shipped backbone and return it.

    The seed decides the initial prompts and head, dropout, and the order of the images. The test
    images are only looked at, every fifth epoch and after the last; nothing is chosen by them.

    Raises:
        ValueError: the method cannot be put on the backbone.
    """
    device = split.train_images.device
    torch.manual_seed(seed)
    model = wrap_backbone(method.prompts, method.input_prompt, method.tuning).to(device)
    if isinstance(method.input_prompt, tcpa.DAMVPConfig):
        with autocast(device):
            model.fit_clusters(split.train_images)
    optimizer = torch.optim.AdamW(
        model.trainable_parameters(), method.learning_rate, weight_decay=method.weight_decay
    )
    order = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(split.train_labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    for epoch in range(epochs):
        start = time.perf_counter()
        model.train()
        model.set_epoch(epoch)
        loss, hits = train_epoch(model, split, optimizer, schedule, order)
        seconds = time.perf_counter() - start
        measured = (epoch + 1) % 5 == 0 or epoch + 1 == epochs
        test = measure(model, split) if measured else None
        on_epoch(Epoch(method.name, seed, epoch + 1, loss, hits, test, seconds))
    return model


def train_epoch(model, split, optimizer, schedule, order) -> tuple[float, float]:
    """Train one epoch; return mean loss and training accuracy in percent, as seen on the way."""
    device, count = split.train_images.device, len(split.train_labels)
    match_weight = getattr(model.config, "match_weight", 0.0)
    total, hits = torch.zeros((), device=device), torch.zeros((), device=device)
    for index in torch.randperm(count, generator=order).to(device).split(BATCH_SIZE):
        images, labels = split.train_images[index], split.train_labels[index]
        with autocast(device):
            logits, distance = model(images, return_distance=True)
        loss = F.cross_entropy(logits.float(), labels) + match_weight * distance
        optimizer.zero_grad()
        loss.backward()
        if isinstance(model.input_config, tcpa.LIONConfig):
            prompts = [*model.input_prompt.parameters(), *model.feature_prompt.parameters()]
            keep_critical(prompts, model.input_config.critical_share)
        optimizer.step()
        schedule.step()
        total += loss.detach() * len(labels)
        hits += (logits.argmax(1) == labels).sum()
    # Reading the sums waits for the device, so that the epoch's seconds are whole.
    return float(total) / count, 100 * float(hits) / count


def measure(model: tcpa.PromptedViT, split: Split) -> float:
    """Return the share of test images that the model reads rightly, in percent."""
    right = predict(model, split.test_images) == split.test_labels
    return 100 * int(right.sum()) / len(right)


def seconds_per_epoch(epochs: list[Epoch]) -> float:
    """Return the median training time of an epoch, in seconds, without testing."""
    return statistics.median(epoch.seconds for epoch in epochs)
