"""scikit-learn's handwritten digits as images for the demo's ViT."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import IMAGE_SIZE, normalise

NUM_CLASSES = 10


def load_digits() -> tuple[Tensor, Tensor]:
    """Return the 1,797 digits: images float32 `[1797, 1, 32, 32]` in [-1, 1], labels int64.

    They come with scikit-learn (8 x 8 pixels, 17 grey levels, white on black) and are enlarged
    bilinearly. Nothing is downloaded.
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    small = torch.from_numpy(bunch.images).float()[:, None] / 16
    images = F.interpolate(small, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    return normalise(images), torch.from_numpy(bunch.target).long()


def split_indices(labels: Tensor, train_per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose `train_per_class` images of each class for training, all others for testing.

    Returns int64 indices of the training and of the test images; the seed decides both.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        train.append(members[:train_per_class])
        test.append(members[train_per_class:])
    return torch.cat(train), torch.cat(test)
