"""scikit-learn's handwritten digits as images for the demo's ViT, and the best linear probe."""

import statistics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import IMAGE_SIZE, load_backbone, normalise

NUM_CLASSES = 10
TRAIN_PER_CLASS = 100
QUICK_IMAGES = 300
FOLDS = ("fold 0", "fold 1", "fold 2", "fold 3")

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Inverse weights of the L2 penalty that the probe may choose from."""


class DigitSplit(NamedTuple):
    """Images to train on and to measure on: float32 `[N, 1, 32, 32]`, int64 `[N]`, one device."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> tuple[Tensor, Tensor]:
    """Return the 1,797 digits: images float32 `[1797, 1, 32, 32]` in [-1, 1], labels int64.

    They come with scikit-learn (8 x 8 pixels, 17 amounts of ink) and are enlarged bilinearly, dark
    ink on light paper: the backbone, pretrained on bright figures on a dark ground, has to adapt.
    Nothing is downloaded.
    """
    from sklearn.datasets import load_digits as load

    # A Bunch, where scikit-learn declares the tuple of `return_X_y` too.
    bunch: Any = load()
    small = 1 - torch.from_numpy(bunch.images).float()[:, None] / 16
    images = F.interpolate(small, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    return normalise(images), torch.from_numpy(bunch.target).long()


def _take(labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return indices of the images start..stop - 1 of each class, in the order of the file, and of
    the others. No seed has a hand in it."""
    members = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    inside = torch.cat([of_class[start:stop] for of_class in members])
    outside = torch.cat([torch.cat((m[:start], m[stop:])) for m in members])
    return inside, outside


def make_split(part: str, device: torch.device | str = "cpu") -> DigitSplit:
    """Return the images of a part.

    "test": the first 100 images of each class, and the 797 others. "fold 0" to "fold 3": of those
    100, all but 25 neighbours in the file, and these 25, so that whatever is chosen there has not
    seen the test images. "quick": 10 of each class, and the others of the first 300.

    Digits far apart in the file differ more than neighbours, as if by other hands. The test images
    are the end of the file; the folds are blocks of it, so that they measure the same thing.
    """
    images, labels = load_digits()
    if part == "quick":
        images, labels = images[:QUICK_IMAGES], labels[:QUICK_IMAGES]
        train, measured = _take(labels, 0, 10)
    elif part == "test":
        train, measured = _take(labels, 0, TRAIN_PER_CLASS)
    else:
        chosen, _ = _take(labels, 0, TRAIN_PER_CLASS)
        images, labels = images[chosen], labels[chosen]
        size = TRAIN_PER_CLASS // len(FOLDS)
        start = FOLDS.index(part) * size
        measured, train = _take(labels, start, start + size)
    found = (images[train], labels[train], images[measured], labels[measured])
    return DigitSplit(*(tensor.to(device) for tensor in found))


def converged_probe(part: str, strength: float) -> float:
    """Return the accuracy of logistic regression on the frozen features, in percent.

    Args:
        part: see `make_split`.
        strength: inverse weight of the penalty.
    """
    from sklearn.linear_model import LogisticRegression

    images, labels, test_images, test_labels = make_split(part)
    probe = LogisticRegression(C=strength, max_iter=10_000)
    probe.fit(_features(images), labels.numpy())
    return 100 * float(probe.score(_features(test_images), test_labels.numpy()))


@torch.no_grad()
def _features(images: Tensor):
    """Return what the frozen backbone hands to its head, float32 `[N, 128]`."""
    backbone = load_backbone()
    return torch.cat([backbone(some) for some in images.split(256)]).numpy()


def best_strength() -> float:
    """Return the inverse weight of the penalty that does best on the folds of the training images.

    About a minute; `tune-demo` records it.
    """
    return max(STRENGTHS, key=lambda s: statistics.fmean(converged_probe(f, s) for f in FOLDS))
