"""scikit-learn's handwritten digits as images for the demo's ViT."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import IMAGE_SIZE, normalise

NUM_CLASSES = 10
TRAIN_PER_CLASS = 100
QUICK_IMAGES = 300
FIRST_PER_CLASS = {"test": TRAIN_PER_CLASS, "validation": 80, "quick": 10}


def load_digits() -> tuple[Tensor, Tensor]:
    """Return the 1,797 digits: images float32 `[1797, 1, 32, 32]` in [-1, 1], labels int64.

    They come with scikit-learn (8 x 8 pixels, 17 amounts of ink) and are enlarged bilinearly, dark
    ink on light paper: the backbone, pretrained on bright figures on a dark ground, has to adapt.
    Nothing is downloaded.
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    small = 1 - torch.from_numpy(bunch.images).float()[:, None] / 16
    images = F.interpolate(small, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    return normalise(images), torch.from_numpy(bunch.target).long()


def split_indices(labels: Tensor, first_per_class: int) -> tuple[Tensor, Tensor]:
    """Put the first images of each class, in the order of the file, into one part, the others in
    another; return the int64 indices of both. No seed has a hand in it.
    """
    members = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    first = torch.cat([of_class[:first_per_class] for of_class in members])
    return first, torch.cat([of_class[first_per_class:] for of_class in members])


def make_split(part: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels to train on, images and labels to measure on.

    "test": 100 images of each class, and the 797 others. "validation": 80 and 20 of those 100,
    so that whatever is chosen there has not seen the test images. "quick": 10 of each class, and
    the others of the first 300.
    """
    images, labels = load_digits()
    if part == "quick":
        images, labels = images[:QUICK_IMAGES], labels[:QUICK_IMAGES]
    elif part == "validation":
        train, _ = split_indices(labels, TRAIN_PER_CLASS)
        images, labels = images[train], labels[train]
    first, rest = split_indices(labels, FIRST_PER_CLASS[part])
    return images[first], labels[first], images[rest], labels[rest]
