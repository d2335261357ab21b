"""A training run that takes a second: generated images in memory, and a ViT of six small blocks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcpa.train.engine.data import Splits
from tcpa.train.options.run import RunConfig

SIZE, CLASSES = 32, 4


class MemoryBatch(NamedTuple):
    """The fields of `tcpa.train.data`'s Batch."""

    images: Tensor
    labels: Tensor
    size: int


class MemorySource:
    """Images in memory with the interface of `tcpa.train.data.batches.Batches`: order and noise are
    functions of (seed, epoch, position), and processes take symmetric pairs of rows."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        shuffle: bool = False,
        even: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.labels = images, labels
        self.num_images = len(labels)
        self._size, self._shuffle, self._even = batch_size, shuffle, even
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return -(-self.num_images // self._size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[MemoryBatch]:
        generator = torch.Generator().manual_seed(epoch)
        order = torch.arange(self.num_images)
        if self._shuffle:
            order = torch.randperm(self.num_images, generator=generator)
        noise = torch.randn(self.num_images, 1, 1, 1, generator=generator) * self._shuffle
        for index in range(start, len(self)):
            places = torch.arange(self.num_images)[index * self._size :][: self._size]
            if self._even:
                places = places[: len(places) // 2 * 2]
            size = len(places)
            pairs = torch.minimum(torch.arange(size), size - 1 - torch.arange(size))
            mine = places[pairs % self._world == self._rank]
            rows = order[mine]
            yield MemoryBatch(self.images[rows] + noise[mine], self.labels[rows], size)


def make_splits(
    count: int = 22, batch_size: int = 8, *, rank: int = 0, world: int = 1, even: bool = True
) -> Splits:
    """Return splits whose classes differ in colour; `count` training images."""
    generator = torch.Generator().manual_seed(7)

    def source(number: int, **options: Any) -> MemorySource:
        labels = torch.arange(number) % CLASSES
        images = torch.randn(number, 3, SIZE, SIZE, generator=generator)
        images[:, 0] += labels.view(-1, 1, 1)
        options |= {"batch_size": batch_size, "rank": rank, "world": world}
        return MemorySource(images, labels, **options)

    return Splits(
        train=source(count, shuffle=True, even=even),
        evaluation={"val": source(10), "test": source(13)},
        num_classes=CLASSES,
        record={"dataset": "generated"},
    )


def make_config(output: Path, **options: Any) -> RunConfig:
    """Return a configuration for `make_splits`; CUB's recipe in float32, two epochs."""
    defaults: dict[str, Any] = {
        "dataset": "cub",
        "output": output,
        "backbone": "test_vit",
        "weights": "none",
        "image_size": SIZE,
        "epochs": 2,
        "batch_size": 8,
        "precision": "fp32",
        "device": "cpu",
        "pool_size": 4,
        "top_k": 2,
        "random_selection_epochs": 1,
        "log_steps": 1,
        "checkpoint_seconds": 0.0,
        "tensorboard": False,
    }
    if options.get("method", "tcpa").endswith("tcpa") is False:
        for name in ("pool_size", "top_k", "random_selection_epochs"):
            defaults.pop(name)
    return RunConfig(**defaults | options)
