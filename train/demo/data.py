"""scikit-learn's handwritten digits as images for the demo's ViT."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import IMAGE_SIZE, normalise

NUM_CLASSES = 10
TRAIN_PER_CLASS = 100
QUICK_IMAGES = 300
FOLDS = ("fold 0", "fold 1", "fold 2", "fold 3")


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


def split_indices(labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Put the images start..stop - 1 of each class, in the order of the file, into one part, the
    others in another; return the int64 indices of both. No seed has a hand in it.
    """
    members = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    inside = torch.cat([of_class[start:stop] for of_class in members])
    outside = torch.cat([torch.cat((m[:start], m[stop:])) for m in members])
    return inside, outside


def make_split(part: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels to train on, images and labels to measure on.

    "test": the first 100 images of each class, and the 797 others. "fold 0" to "fold 3": of those
    100, all but 25 neighbours in the file, and these 25, so that whatever is chosen there has not
    seen the test images. "quick": 10 of each class, and the others of the first 300.

    Digits far apart in the file differ more than neighbours, as if by other hands. The test images
    are the end of the file; the folds are blocks of it, so that they measure the same thing.
    """
    images, labels = load_digits()
    if part == "quick":
        images, labels = images[:QUICK_IMAGES], labels[:QUICK_IMAGES]
        train, measured = split_indices(labels, 0, 10)
    elif part == "test":
        train, measured = split_indices(labels, 0, TRAIN_PER_CLASS)
    else:
        chosen, _ = split_indices(labels, 0, TRAIN_PER_CLASS)
        images, labels = images[chosen], labels[chosen]
        size = TRAIN_PER_CLASS // len(FOLDS)
        start = FOLDS.index(part) * size
        measured, train = split_indices(labels, start, start + size)
    return images[train], labels[train], images[measured], labels[measured]
