"""Batches on the training device out of a cache: gather, crop, mirror, normalise, all at once.

Order and augmentation are pure functions of (seed, epoch, position): they depend neither on the
number of processes nor on where one resumes, and no generator's state has to be saved.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...cli import UsageError
from .building import usable_cores
from .cached import CachedSplit
from .memory import Memory
from .transform import Transform

RESIDENT_SHARE = 0.5
"""Share of the device's free memory that a resident set may take."""


CPU_THREADS = 4
"""Most threads that make a batch on a CPU; Python lets few more work at once."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A part of a global batch."""

    images: Tensor
    """float32 `[n, 3, H, W]`, normalised, on the training device."""

    labels: Tensor
    """int64 `[n]`, on the training device."""

    size: int
    """Images of the global batch, over all ranks (n <= size)."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """One epoch of one rank, CPU arrays over its images in order, and where each batch begins."""

    samples: np.ndarray
    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray
    bounds: list[int]
    sizes: list[int]

    def part(self, batch: int) -> slice:
        return slice(self.bounds[batch], self.bounds[batch + 1])


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
        resident: keep all images in the device's memory; None: if they take at most half of what
            is free. On a CPU the cache file itself is mapped.

    Raises:
        UsageError: an argument is out of range, or the images are smaller than the crop.
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
        self._split, self._cache = cache, cache.cache
        self._batch_size, self._transform = batch_size, transform
        self._device = torch.device(device)
        self._seed, self._shuffle, self._even = seed, shuffle, even
        self._rank, self._world = rank, world
        self.num_classes = cache.num_classes
        self.class_names = cache.class_names
        self.num_images = len(cache.rows)
        self.resident = self._fits() if resident is None else resident
        self._pixels: Tensor | None = None
        self._memory = Memory()
        self._channels = (transform.mean, transform.std)
        channels = torch.tensor(self._channels, dtype=torch.float32)
        self._mean, self._std = channels.to(self._device)[:, :, None, None]

    def __len__(self) -> int:
        count, last = divmod(self.num_images, self._batch_size)
        # One image alone has no partner and is left out with `even`.
        return count + (last > (1 if self._even else 0))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch index `start` on."""
        plan = self._plan(epoch)
        labels = torch.from_numpy(self._split.labels[plan.samples]).to(self._device)
        if self._device.type == "cpu":
            images = self._on_cpu(plan, start)
        elif self.resident:
            images = self._on_device(plan, start)
        else:
            images = self._streamed(plan, start)
        for batch, pixels in zip(range(start, len(self)), images, strict=True):
            yield Batch(pixels, labels[plan.part(batch)], plan.sizes[batch])

    def _plan(self, epoch: int) -> _Plan:
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
        samples = order[mine]
        rows = self._split.rows[samples]
        places = self._transform.places(
            self._cache.heights[rows], self._cache.widths[rows], chances[mine]
        )
        return _Plan(samples, *places, bounds, sizes)

    def _fits(self) -> bool:
        if self._device.type != "cuda":
            return self._device.type != "cpu"
        free, _ = torch.cuda.mem_get_info(self._device)
        return self._cache.about["bytes"] <= RESIDENT_SHARE * free

    def _normalise(self, pixels: Tensor) -> Tensor:
        """Map uint8 `[n, 3, S, S]` to float32, with torchvision's operations in their order."""
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)

    def _crop_into(self, out: np.ndarray, plan: _Plan, part: slice) -> None:
        """Copy crops of images to `[n, 3, S, S]`, mirrored where the plan says so."""
        side = self._transform.crop
        rows = self._split.rows[plan.samples[part]]
        columns = zip(rows, plan.top[part], plan.left[part], plan.flip[part], strict=True)
        for target, (row, top, left, flip) in zip(out, columns, strict=True):
            image = self._cache.image(row).numpy()[:, top : top + side, left : left + side]
            target[:] = image[:, :, ::-1] if flip else image

    def _on_cpu(self, plan: _Plan, start: int) -> Iterator[Tensor]:
        """Crop and normalise image by image, so that one stays in the cache of the processor.

        In numpy, which has no team of threads that waits for each other when other work has the
        cores; two passes of an image through memory and not ten.
        """
        side, count = self._transform.crop, min(usable_cores(), CPU_THREADS)
        with ThreadPoolExecutor(count) as threads:
            for batch in range(start, len(self)):
                part = plan.part(batch)
                images = self._memory.take((part.stop - part.start, 3, side, side))
                shares = [slice(first, None, count) for first in range(count)]
                # The list waits for all and passes an error on.
                list(threads.map(lambda s, i=images, p=part: self._fill(i[s], plan, p, s), shares))
                yield torch.from_numpy(images)
                # Or this name would keep the memory from being used again.
                del images

    def _fill(self, images: np.ndarray, plan: _Plan, part: slice, share: slice) -> None:
        """Make one thread's share of the images of a batch, float32 `[n, 3, S, S]`."""
        mean, std = (np.array(values, np.float32)[:, None, None] for values in self._channels)
        for image, place in zip(images, range(part.start, part.stop)[share], strict=True):
            self._crop_into(image[None], plan, slice(place, place + 1))
            image /= np.float32(255)
            image -= mean
            image /= std

    def _on_device(self, plan: _Plan, start: int) -> Iterator[Tensor]:
        """Gather from the set in the device's memory; the host only starts the work."""
        if self._pixels is None:
            self._pixels = self._cache.pixels.to(self._device)
        rows = self._split.rows[plan.samples]
        numbers = (
            self._cache.offsets[rows],
            self._cache.heights[rows],
            self._cache.widths[rows],
            plan.top,
            plan.left,
            plan.flip,
        )
        table = [torch.from_numpy(np.ascontiguousarray(n)).to(self._device) for n in numbers]
        for batch in range(start, len(self)):
            part = plan.part(batch)
            crops = gather_crops(self._pixels, *(n[part] for n in table), self._transform.crop)
            yield self._normalise(crops)

    def _streamed(self, plan: _Plan, start: int) -> Iterator[Tensor]:
        """Crop on the host and upload uint8 through two pinned buffers, one batch ahead.

        Written for CUDA; needs a GPU to be tested.
        """
        side = self._transform.crop
        largest = max(np.diff(plan.bounds), default=0)
        buffers = [
            torch.empty(largest, 3, side, side, dtype=torch.uint8, pin_memory=True)
            for _ in range(2)
        ]
        uploaded: list[torch.cuda.Event | None] = [None, None]
        stream = torch.cuda.Stream(self._device)

        def fill(batch: int) -> Tensor:
            event = uploaded[batch % 2]
            if event is not None:
                event.synchronize()
            part = plan.part(batch)
            buffer = buffers[batch % 2][: part.stop - part.start]
            self._crop_into(buffer.numpy(), plan, part)
            return buffer

        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(fill, start) if start < len(self) else None
            for batch in range(start, len(self)):
                assert ahead is not None
                buffer = ahead.result()
                with torch.cuda.stream(stream):
                    pixels = buffer.to(self._device, non_blocking=True)
                    event = torch.cuda.Event()
                    event.record(stream)
                uploaded[batch % 2] = event
                if batch + 1 < len(self):
                    ahead = thread.submit(fill, batch + 1)
                current = torch.cuda.current_stream(self._device)
                current.wait_stream(stream)
                pixels.record_stream(current)
                yield self._normalise(pixels)


def gather_crops(
    pixels: Tensor,
    offsets: Tensor,
    heights: Tensor,
    widths: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    side: int,
) -> Tensor:
    """Cut a square out of every image at its own place, without a loop over images.

    Args:
        pixels: uint8 `[bytes]`, images `[3, h, w]` one after another.
        offsets, heights, widths, top, left: int64 `[n]`; where an image begins, its size and where
            its crop begins, pixels.
        flip: bool `[n]`, whether to mirror.
        side: height and width of a crop, pixels.

    Returns:
        uint8 `[n, 3, side, side]` on the device of `pixels`.
    """
    steps = torch.arange(side, device=pixels.device)
    column = left[:, None] + torch.where(flip[:, None], side - 1 - steps, steps)
    row = (top[:, None] + steps) * widths[:, None]
    # [n, side, side], the same place in each of the three planes.
    place = offsets[:, None, None] + row[:, :, None] + column[:, None, :]
    plane = (heights * widths)[:, None, None]
    return torch.stack([pixels[place + channel * plane] for channel in range(3)], dim=1)
