"""Batches on the training device out of a cache: gather, crop, mirror, normalise, all at once.

Order and augmentation are pure functions of (seed, epoch, position): they depend neither on the
number of processes nor on where one resumes, and no generator's state has to be saved.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...cli import UsageError
from .cached import CachedSplit
from .crops import Transform
from .delivery import Plan, choose_delivery


@dataclass(frozen=True, slots=True)
class Batch:
    """A part of a global batch."""

    images: Tensor
    """float32 `[n, 3, H, W]`, normalised, on the training device."""

    labels: Tensor
    """int64 `[n]`, on the training device."""

    size: int
    """Images of the global batch, over all ranks (n <= size)."""


def local_rows(size: int, rank: int, world: int) -> np.ndarray:
    """Return a rank's rows of a global batch, ascending.

    Mixup pairs row i with row size - 1 - i. Pairs are dealt out whole, so that reversing the
    local rows is the local part of reversing the global ones.
    """
    rows = np.arange(size)
    pair = np.minimum(rows, size - 1 - rows)
    return rows[pair % world == rank]


class Batches:
    """The batches of a split, epoch after epoch.

    Args:
        cache: a split with its cache, as `open_cached` returns it.
        batch_size: images of a global batch, over all ranks.
        transform: crop and normalisation; its crop must fit the cache's images.
        device: where images and labels go.
        seed: decides, with the epoch, order and augmentation.
        shuffle: a new order every epoch; else the order of the split.
        rank, world: this process and how many there are.
        even: leave out the last image of an odd global batch, as the official Mixup does.
        resident: keep all images in the device's memory; None: if they take little of what is
            free. On a CPU the cache file itself is mapped.

    Raises:
        UsageError: an argument is out of range, or the crop is larger than the images.
    """

    def __init__(
        self,
        cache: CachedSplit,
        *,
        batch_size: int,
        transform: Transform,
        device: torch.device | str,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world: int = 1,
        even: bool = False,
        resident: bool | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world or seed < 0:
            raise UsageError(
                f"batches: got batch_size {batch_size}, rank {rank} of {world}, seed {seed}, "
                "expected batch_size >= 1, 0 <= rank < world and seed >= 0; check them"
            )
        if transform.crop > cache.cache.resize:
            raise UsageError(
                f"crop: got {transform.crop}, expected at most {cache.cache.resize}, the shorter "
                "side in the cache; choose a larger resize"
            )
        self._split, self._batch_size, self._transform = cache, batch_size, transform
        self._device = torch.device(device)
        self._seed, self._shuffle, self._even = seed, shuffle, even
        self._rank, self._world = rank, world
        self.num_classes = cache.num_classes
        self.class_names = cache.class_names
        self.num_images = len(cache.rows)
        self._delivery = choose_delivery(cache.cache, transform, self._device, resident)

    def __len__(self) -> int:
        count, last = divmod(self.num_images, self._batch_size)
        # One image alone has no partner and is left out with `even`.
        return count + (last > (1 if self._even else 0))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch index `start` on."""
        plan = self.plan(epoch)
        labels = torch.from_numpy(self._split.labels[plan.samples]).to(self._device)
        images = self._delivery.images(plan, start)
        for batch, pixels in zip(range(start, len(self)), images, strict=True):
            yield Batch(pixels, labels[plan.part(batch)], plan.sizes[batch])

    def plan(self, epoch: int) -> Plan:
        """Return which images this rank gets in an epoch, and their crops."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        # Drawn for all images of the epoch, whatever this rank needs of them.
        chances = generator.random((self.num_images, 3))
        order = np.arange(self.num_images)
        if self._shuffle:
            order = np.argsort(generator.random(self.num_images), kind="stable")
        sizes, positions, bounds = [], [], [0]
        for batch in range(len(self)):
            begin = batch * self._batch_size
            size = min(self._batch_size, self.num_images - begin)
            size -= size % 2 if self._even else 0
            local = begin + local_rows(size, self._rank, self._world)
            sizes.append(size)
            positions.append(local)
            bounds.append(bounds[-1] + len(local))
        mine = np.concatenate(positions) if positions else np.zeros(0, np.int64)
        rows = self._split.rows[order[mine]]
        cache = self._split.cache
        scaled = cache.scaled_heights[rows], cache.scaled_widths[rows]
        places = self._transform.places(*scaled, chances[mine])
        return Plan(order[mine], rows, *places, bounds, sizes)
