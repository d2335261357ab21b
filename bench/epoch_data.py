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

from ..train.data.batches import Batches
from ..train.data.cached import CachedSplit
from ..train.data.speed import PhotoFiles
from ..train.data.transform import Transform

SOURCES = ("disk", "cache", "device")

Pair = tuple[Tensor, Tensor]
"""Images, float32 `[B, 3, 224, 224]`, and labels, int64 `[B]`, on the device."""


class Files:
    """Photos from their files, in worker processes that start with every epoch."""

    def __init__(
        self, paths: list[Path], device: torch.device, *, batch: int, workers: int
    ) -> None:
        self._paths, self._device, self._batch, self._workers = paths, device, batch, workers

    def epoch(self, number: int, *, train: bool) -> Iterator[Pair]:
        """Yield the photos once; in training at random crops and in random order."""
        loader = DataLoader(
            PhotoFiles(self._paths, train=train),
            batch_size=self._batch,
            shuffle=train,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
        )
        for images, labels in loader:
            device = self._device
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class Cached:
    """Photos from a cache, in host memory or in the device's."""

    def __init__(
        self, split: CachedSplit, device: torch.device, *, batch: int, resident: bool
    ) -> None:
        self._batches = {
            train: Batches(
                split,
                batch_size=batch,
                transform=Transform(train=train),
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
