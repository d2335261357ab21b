"""What `--demo` inspects: TCPA and VPT-deep, trained on the digits a moment ago."""

from collections.abc import Callable

import numpy as np
import torch

import tcpa

from ..demo.backbone import NORMALIZATION, load_backbone
from ..demo.digits import NUM_CLASSES, DigitSplit, make_split
from ..demo.methods import DemoMethod, chosen_methods
from ..demo.training import build_model, measure, train_epochs
from .images import ImageSet
from .subjects import BARE, EarlierModel, Subject

EPOCHS, QUICK_EPOCHS = 10, 2
KEPT = (1, 2, 4, 6, 8)
"""Epochs after which TCPA is kept, besides the first state and the last."""

IMAGES, QUICK_IMAGES = 400, 60
"""Test images that are inspected."""


def demo_inputs(
    *, quick: bool, seed: int, say: Callable[[str], None]
) -> tuple[list[Subject], ImageSet]:
    """Train the demo's methods as the demo does, on the CPU, and return them with test images.

    The seed decides initial values and the order of the images. Two epochs and few images if
    `quick`.
    """
    split = make_split("quick" if quick else "test")
    epochs = QUICK_EPOCHS if quick else EPOCHS
    methods = {method.name: method for method in chosen_methods() if method.prompts is not None}
    subjects = []
    for name in ("TCPA", "VPT-deep"):
        say(f"training {name}, {epochs} epochs on {len(split.train_labels):,} digits")
        subjects.append(_train(methods[name], split, seed, epochs, keep=name == "TCPA"))
    bare = tcpa.wrap(load_backbone(), None, normalization=NORMALIZATION).eval()
    subjects.append(Subject(name=BARE, source="the demo's backbone", model=bare))
    return subjects, _images(split, QUICK_IMAGES if quick else IMAGES)


def _train(method: DemoMethod, split: DigitSplit, seed: int, epochs: int, keep: bool) -> Subject:
    """Train as the demo does, and keep copies on the way."""
    model = build_model(method, split, seed=seed)
    states = [EarlierModel(epoch=0, model=_copy(model))] if keep else []
    for found in train_epochs(model, method, split, seed=seed, epochs=epochs):
        if keep and (found.epoch in KEPT or found.epoch == epochs):
            states.append(EarlierModel(epoch=found.epoch, model=_copy(model)))
    return Subject(
        name=method.name,
        source=f"trained for {epochs} epochs on {len(split.train_labels):,} digits",
        model=model.eval(),
        states=states,
        accuracy=measure(model, split),
    )


def _copy(model: tcpa.PromptedViT) -> tcpa.PromptedViT:
    """Return the model as it is now, on a backbone of its own."""
    config = model.config
    assert config is not None
    twin = tcpa.wrap(
        load_backbone(), config.replace(), num_classes=NUM_CLASSES, normalization=NORMALIZATION
    )
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def _images(split: DigitSplit, count: int) -> ImageSet:
    """Return the first test images of every class, in turns."""
    labels = split.test_labels.numpy()
    rank = np.empty(len(labels), np.int64)
    for kind in np.unique(labels):
        rank[labels == kind] = np.arange((labels == kind).sum())
    chosen = np.lexsort((labels, rank))[:count]
    images = split.test_images[torch.from_numpy(chosen)]
    (mean,), (std,) = NORMALIZATION
    return ImageSet(
        images=images,
        pictures=(images[:, 0] * std + mean).clamp(0, 1).numpy(),
        names=[f"test image {place}, a {labels[place]}" for place in chosen],
        labels=labels[chosen],
        class_names=[str(kind) for kind in range(NUM_CLASSES)],
        skipped=[],
        left_out=len(labels) - len(chosen),
        origin="the digits of scikit-learn (not trained on)",
    )
