"""Images for `tcpa-bench epoch`: generated photos, and three ways to bring them to the model.

disk     JPEG files of 500 x 375 pixels, decoded, resized, cropped and flipped one by one in worker
         processes: what the official code does.
cache    the training program's own input: decoded and resized once, mapped into host memory; crop,
         flip and normalisation in batches on the device.
device   the same with all images in the device's memory.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...train.data.batches import Batches
from ...train.data.cache import RESIZE
from ...train.data.cached import CachedSplit
from ...train.data.crops import Transform
from ...train.data.speed import CROP, PhotoFiles

SOURCES = ("disk", "cache", "device")

Pair = tuple[Tensor, Tensor]
"""Images, float32 `[B, 3, size, size]`, and labels, int64 `[B]`, on the device."""


def resize_of(size: int) -> int:
    """Return the shorter side of photos before images of a side are cropped out: 256 for 224."""
    return round(size * RESIZE / CROP)


class Files:
    """Photos from their files, in worker processes that stay."""

    def __init__(
        self, paths: list[Path], device: torch.device, *, batch: int, workers: int, size: int
    ) -> None:
        self._device = device
        self._loaders = {
            train: DataLoader(
                PhotoFiles(paths, train=train, resize=resize_of(size), crop=size),
                batch_size=batch,
                shuffle=train,
                num_workers=workers,
                pin_memory=device.type == "cuda",
                # Their start would count for many times as much as in an epoch of CUB.
                persistent_workers=workers > 0,
            )
            for train in (True, False)
        }

    def epoch(self, number: int, *, train: bool) -> Iterator[Pair]:
        """Yield the photos once; in training at random crops and in random order."""
        for images, labels in self._loaders[train]:
            device = self._device
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class Cached:
    """Photos from a cache, in host memory or in the device's."""

    def __init__(
        self, split: CachedSplit, device: torch.device, *, batch: int, resident: bool, size: int
    ) -> None:
        self._batches = {
            train: Batches(
                split,
                batch_size=batch,
                transform=Transform(train=train, crop=size),
                device=device,
                seed=0,
                shuffle=train,
                resident=resident,
            )
            for train in (True, False)
        }

    def epoch(self, number: int, *, train: bool) -> Iterator[Pair]:
        """Yield the photos once; in training with the order and the crops of an epoch."""
        for batch in self._batches[train].epoch(number):
            yield batch.images, batch.labels


Source = Files | Cached
