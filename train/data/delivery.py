"""Three ways from a cache to float32 images on the training device; all give the same pixels.

host        the processor crops and normalises out of the mapped file.
resident    all images are in the device's memory, which crops and normalises whole batches.
streamed    the host crops, the device normalises; for sets that do not fit.
"""

import math
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...cli import UsageError
from .cache import Cache
from .crops import Crops, Transform, gather_crops, gather_enlarged_crops
from .decoding import usable_cores

MAX_ARRAYS = 4
"""Batches that may be alive at once before further ones get memory of their own."""

RESIDENT_SHARE = 0.4
"""Share of the device's free memory that a resident set may take; train and test are two."""

CPU_THREADS = 4
"""Most threads that make a batch on the host; Python lets few more work at once."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One epoch of one rank: arrays over its images in order, and where each batch begins."""

    samples: np.ndarray
    """Places in the split, int64 `[N]`."""

    rows: np.ndarray
    """Places in the cache, int64 `[N]`."""

    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray
    bounds: list[int]
    sizes: list[int]
    """Images of each global batch."""

    def __len__(self) -> int:
        return len(self.sizes)

    def part(self, batch: int) -> slice:
        """Return which of the images are a batch."""
        return slice(self.bounds[batch], self.bounds[batch + 1])


class Delivery(Protocol):
    def images(self, plan: Plan, start: int) -> Iterator[Tensor]:
        """Yield float32 `[n, 3, S, S]`, normalised, for each batch from `start` on."""
        ...


def choose_delivery(
    cache: Cache, transform: Transform, device: torch.device, resident: bool | None
) -> Delivery:
    """Return the way for a device; `resident` None decides by its free memory.

    Raises:
        UsageError: only CUDA and ROCm devices can be streamed to.
    """
    if device.type == "cpu":
        return Host(cache, transform)
    if device.type != "cuda" and resident is False:
        raise UsageError(
            f"resident: got False on {device}, expected True or nothing; only CUDA devices take "
            "images batch by batch"
        )
    if resident is None:
        resident = device.type != "cuda" or (cache.folder, device) in _resident
    if resident is False:
        free, _ = torch.cuda.mem_get_info(device)
        resident = cache.pixels.numel() <= RESIDENT_SHARE * free
    kind = Resident if resident else Streamed
    return kind(cache, transform, device)


def crop_into(out: np.ndarray, cache: Cache, plan: Plan, places: range, side: int) -> None:
    """Copy the crops of images of a plan to `[n, 3, S, S]`, mirrored where the plan says so."""
    for target, place in zip(out, places, strict=True):
        top, left = plan.top[place], plan.left[place]
        image = cache.image(plan.rows[place])[:, top : top + side, left : left + side]
        target[:] = image[:, :, ::-1] if plan.flip[place] else image


class Memory:
    """Float32 arrays that are used again once nobody holds them.

    A tensor made by `torch.from_numpy`, and every view of it, holds a reference to the array; an
    array without references is free. Fresh memory costs more than filling it: above 32 MB malloc
    takes empty pages from the system every time, and batches of 64 and 128 images of 224 pixels
    come 1.9 and 1.6 times as fast with this; batches of 32 come alike.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return a contiguous array with any content; nobody else has it."""
        size = math.prod(shape)
        for index in range(len(self._arrays)):
            # One reference is the list's, the other that of the call.
            if sys.getrefcount(self._arrays[index]) == 2:
                if self._arrays[index].size < size:
                    self._arrays[index] = np.empty(size, np.float32)
                return self._arrays[index][:size].reshape(shape)
        array = np.empty(size, np.float32)
        if len(self._arrays) < MAX_ARRAYS:
            self._arrays.append(array)
        return array[:size].reshape(shape)


class Host:
    """Crops and normalises image by image, so that one stays in the cache of the processor.

    In numpy, which has no team of threads that waits for each other when other work has the cores.
    """

    def __init__(self, cache: Cache, transform: Transform) -> None:
        self._cache, self._transform, self._memory = cache, transform, Memory()
        self._mean, self._std = (
            np.array(values, np.float32)[:, None, None]
            for values in (transform.mean, transform.std)
        )

    def images(self, plan: Plan, start: int) -> Iterator[Tensor]:
        side, count = self._transform.crop, min(usable_cores(), CPU_THREADS)
        with ThreadPoolExecutor(count) as threads:
            for batch in range(start, len(plan)):
                part = plan.part(batch)
                images = self._memory.take((part.stop - part.start, 3, side, side))
                places = range(part.start, part.stop)
                shares = [
                    threads.submit(self._fill, images[first::count], plan, places[first::count])
                    for first in range(count)
                ]
                for share in shares:
                    share.result()
                yield torch.from_numpy(images)
                # Or this name would keep the memory from being used again.
                del images

    def _fill(self, images: np.ndarray, plan: Plan, places: range) -> None:
        """Make one thread's share of a batch, with torchvision's operations in their order."""
        for number, image in enumerate(images):
            crop_into(image[None], self._cache, plan, places[number : number + 1], len(image[0]))
            image /= np.float32(255)
            image -= self._mean
            image /= self._std


class _OnDevice:
    """What the ways of an accelerator share."""

    def __init__(self, cache: Cache, transform: Transform, device: torch.device) -> None:
        self._cache, self._transform, self._device = cache, transform, device
        channels = torch.tensor([transform.mean, transform.std], dtype=torch.float32)
        self._mean, self._std = channels.to(device)[:, :, None, None]

    def _normalise(self, pixels: Tensor) -> Tensor:
        """Map uint8 `[n, 3, S, S]` to float32, with torchvision's operations in their order."""
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)


_resident: weakref.WeakValueDictionary[tuple[Path, torch.device], Tensor]
_resident = weakref.WeakValueDictionary()
"""Sets in the memory of devices; train and val share one."""


class Resident(_OnDevice):
    """Gathers from the set in the device's memory; the host only starts the work."""

    def __init__(self, cache: Cache, transform: Transform, device: torch.device) -> None:
        super().__init__(cache, transform, device)
        # At once, so that the next set sees what memory is left.
        pixels = _resident.get((cache.folder, device))
        self._pixels = cache.pixels.to(device) if pixels is None else pixels
        _resident[cache.folder, device] = self._pixels

    def images(self, plan: Plan, start: int) -> Iterator[Tensor]:
        cache = self._cache
        sizes = (cache.heights, cache.widths, cache.scaled_heights, cache.scaled_widths)
        numbers = [n[plan.rows] for n in (cache.offsets, *sizes)]
        numbers += [np.ascontiguousarray(n) for n in (plan.top, plan.left, plan.flip)]
        crops = Crops(*(torch.from_numpy(n).to(self._device) for n in numbers))
        gather = gather_enlarged_crops if cache.small else gather_crops
        for batch in range(start, len(plan)):
            part = crops.part(plan.part(batch))
            yield self._normalise(gather(self._pixels, part, self._transform.crop))


class Streamed(_OnDevice):
    """Uploads uint8 crops through two pinned buffers, one batch ahead.

    Written for CUDA; needs a GPU to be tested.
    """

    def images(self, plan: Plan, start: int) -> Iterator[Tensor]:
        side, device = self._transform.crop, self._device
        largest = max(
            (b - a for a, b in zip(plan.bounds, plan.bounds[1:], strict=False)), default=0
        )
        shape = (largest, 3, side, side)
        buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        uploaded: list[torch.cuda.Event | None] = [None, None]
        stream = torch.cuda.Stream(device)

        def fill(batch: int) -> Tensor:
            event = uploaded[batch % 2]
            if event is not None:
                event.synchronize()
            part = plan.part(batch)
            buffer = buffers[batch % 2][: part.stop - part.start]
            crop_into(buffer.numpy(), self._cache, plan, range(part.start, part.stop), side)
            return buffer

        with ThreadPoolExecutor(1) as thread:
            waiting = [thread.submit(fill, batch) for batch in range(start, len(plan))[:1]]
            for batch in range(start, len(plan)):
                buffer = waiting.pop().result()
                with torch.cuda.stream(stream):
                    pixels = buffer.to(device, non_blocking=True)
                    event = torch.cuda.Event()
                    event.record(stream)
                uploaded[batch % 2] = event
                if batch + 1 < len(plan):
                    waiting.append(thread.submit(fill, batch + 1))
                current = torch.cuda.current_stream(device)
                current.wait_stream(stream)
                pixels.record_stream(current)
                yield self._normalise(pixels)
