"""Images a second of the input alone: this package against Pillow and torch's DataLoader.

Both read the same generated JPEGs of 500 x 375 pixels, decode, resize to 256, crop 224, mirror and
normalise; rounds alternate, so that other work on the machine meets both. Building the cache is
told apart: it happens once. Run `python -m tcpa.train.data.speed`.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from .batches import Batches
from .building import build_cache
from .cache import RESIZE
from .cached import CachedSplit
from .crops import IMAGENET_MEAN, IMAGENET_STD, Transform
from .pools import FilePool

PHOTO = (500, 375)
"""Width and height of a generated JPEG, pixels: the median photo of CUB-200-2011."""

CLASSES = 200
CROP = 224
"""Side of the images that a model gets, pixels."""


@dataclass(frozen=True, slots=True)
class InputSpeed:
    """What was measured; of the DataLoader and of `Batches` images a second, one figure a round."""

    images: int
    loader: list[float]
    ours: list[float]
    build_seconds: float
    """Seconds to decode and resize all images once into the cache, start of processes included."""

    workers: int
    """Processes of the DataLoader."""

    device: str

    @property
    def ratio(self) -> float:
        """Median of ours over median of the DataLoader."""
        return statistics.median(self.ours) / statistics.median(self.loader)


def write_photos(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write JPEGs of smooth random colours with some detail: they cost to decode what photos do."""
    rng = np.random.default_rng(seed)
    width, height = PHOTO
    paths = [folder / f"{index:05d}.jpg" for index in range(count)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(PHOTO, Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = smooth + rng.integers(-12, 13, (height, width, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


class PhotoFiles(Dataset):
    """Files one at a time, as the official code reads them; with `train` at random crops."""

    def __init__(
        self, paths: list[Path], *, train: bool = True, resize: int = RESIZE, crop: int = CROP
    ) -> None:
        self._paths = paths
        random = [transforms.RandomCrop(crop), transforms.RandomHorizontalFlip(0.5)]
        # torchvision declares that the image stays one; the list ends in tensors.
        self._transform: Any = transforms.Compose(
            [
                transforms.Resize(resize),
                *(random if train else [transforms.CenterCrop(crop)]),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self._paths[index]) as picture:
            return self._transform(picture.convert("RGB")), index % CLASSES


def cached_photos(paths: list[Path], cache: Path, *, resize: int = RESIZE) -> CachedSplit:
    """Decode photos of one folder into a cache; classes go round."""
    pool = FilePool(paths[0].parent, [path.name for path in paths])
    rows = np.arange(len(paths))
    names = [str(label) for label in range(CLASSES)]
    return CachedSplit(
        build_cache(pool, cache, "photos", resize=resize), rows, rows % CLASSES, names, {}
    )


def measure_input(
    images: int = 2000,
    *,
    rounds: int = 3,
    batch_size: int = 128,
    workers: int = 2,
    device: str = "cpu",
    folder: Path | None = None,
) -> InputSpeed:
    """Measure both inputs on the same generated files.

    Args:
        images: JPEGs to write.
        rounds: epochs of each, alternating.
        batch_size: images at once.
        workers: processes of the DataLoader.
        device: where batches go; the DataLoader's are uploaded.
        folder: where to write; None: a temporary folder.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        photos = Path(temporary) / "photos"
        photos.mkdir()
        paths = write_photos(photos, images)
        started = time.perf_counter()
        cached = cached_photos(paths, Path(temporary) / "cache")
        build_seconds = time.perf_counter() - started
        batches = Batches(
            cached,
            batch_size=batch_size,
            transform=Transform(train=True),
            device=device,
            seed=0,
            shuffle=True,
        )
        loader = DataLoader(
            PhotoFiles(paths),
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            pin_memory=device != "cpu",
            persistent_workers=workers > 0,
        )
        # The DataLoader's processes start once; torch's import is not its speed.
        _seconds(lambda: iter(loader), device)
        _seconds(lambda: _pairs(batches, 0), device)
        theirs, ours = [], []
        for number in range(rounds):
            theirs.append(images / _seconds(lambda: iter(loader), device))
            ours.append(images / _seconds(lambda n=number: _pairs(batches, n + 1), device))
    return InputSpeed(images, theirs, ours, build_seconds, workers, device)


def _pairs(batches: Batches, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches.epoch(epoch):
        yield batch.images, batch.labels


def _seconds(start: Callable[[], Iterable[tuple[Tensor, Tensor]]], device: str) -> float:
    """Bring all batches to the device, wait for them, and return how long that took."""
    begun = time.perf_counter()
    for images, labels in start():
        images.to(device, non_blocking=True)
        labels.to(device, non_blocking=True)
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begun


def describe(speed: InputSpeed) -> str:
    """Return the measurement as two lines."""
    theirs, ours = (statistics.median(found) for found in (speed.loader, speed.ours))
    return (
        f"input alone, {speed.images:,} JPEGs of {PHOTO[0]} x {PHOTO[1]} to {speed.device}: "
        f"DataLoader with {speed.workers} workers {theirs:,.0f} images/s, cache {ours:,.0f} "
        f"images/s, {speed.ratio:.1f} times as many\n"
        f"building the cache once: {speed.build_seconds:.1f} s, "
        f"{speed.images / speed.build_seconds:,.0f} images/s"
    )


if __name__ == "__main__":
    print(describe(measure_input(device="cuda" if torch.cuda.is_available() else "cpu")))
