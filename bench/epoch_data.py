"""Images for `tcpa-bench epoch`: generated photos, and three ways to bring them to the model.

disk     JPEG files of 500 x 375 pixels, decoded, resized, cropped and flipped one by one in worker
         processes: what the official code does.
cache    the same images, decoded and resized once, as bytes in host memory; crop, flip and
         normalisation in batches on the device.
device   that cache in the device's memory.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

PHOTO = (500, 375)
"""Width and height of a generated JPEG, pixels: the median photo of CUB-200-2011."""
RESIZE = 256
CROP = 224
MEAN = STD = 0.5
SOURCES = ("disk", "cache", "device")


def write_photos(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write JPEGs of smooth random colours with some detail, so that decoding costs what it does
    for photos.
    """
    rng = np.random.default_rng(seed)
    width, height = PHOTO
    paths = []
    for index in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC))
        noisy = picture.astype(np.int16) + rng.integers(-12, 13, (height, width, 3))
        path = folder / f"{index:05d}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def resized(path: Path) -> Image.Image:
    """Decode a file and scale its shorter side to 256 pixels."""
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        rgb = picture.convert("RGB")
    scale = RESIZE / min(rgb.size)
    width, height = (max(RESIZE, round(side * scale)) for side in rgb.size)
    return rgb.resize((width, height), Image.Resampling.BILINEAR)


class Photos(Dataset):
    """JPEG files, one image at a time, as a training loop of today reads them."""

    def __init__(self, paths: list[Path], *, train: bool) -> None:
        self.paths, self._train = paths, train

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, float32 `[3, 224, 224]`, normalised, and its label."""
        picture = resized(self.paths[index])
        left, top = ((side - CROP) // 2 for side in picture.size)
        if self._train:
            left = int(torch.randint(0, picture.width - CROP + 1, ()))
            top = int(torch.randint(0, picture.height - CROP + 1, ()))
        picture = picture.crop((left, top, left + CROP, top + CROP))
        if self._train and torch.rand(()) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return normalise(pixels), index % 200


@dataclass(frozen=True, slots=True)
class Cache:
    """Decoded and resized images as bytes, `[N, 3, height, width]`, all of one size."""

    pixels: Tensor

    @classmethod
    def of(cls, paths: list[Path]) -> "Cache":
        """Decode files once."""
        pictures = [np.asarray(resized(path)) for path in paths]
        return cls(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous())

    def to(self, device: torch.device) -> "Cache":
        """Return the cache in a device's memory."""
        return Cache(self.pixels.to(device))

    def batch(self, index: Tensor, device: torch.device, *, train: bool) -> Tensor:
        """Crop, flip and normalise images on a device: float32 `[B, 3, 224, 224]`."""
        images = self.pixels[index.to(self.pixels.device)].to(device, non_blocking=True)
        count, _, height, width = images.shape
        if train:
            top = torch.randint(0, height - CROP + 1, (count,), device=device)
            left = torch.randint(0, width - CROP + 1, (count,), device=device)
            flip = torch.rand(count, device=device) < 0.5
        else:
            top = torch.full((count,), (height - CROP) // 2, device=device)
            left = torch.full((count,), (width - CROP) // 2, device=device)
            flip = torch.zeros(count, dtype=torch.bool, device=device)
        return normalise(crop(images, top, left, flip))


def crop(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Cut 224 x 224 pixels out of every image `[B, 3, H, W]` at its own place, some mirrored."""
    steps = torch.arange(CROP, device=images.device)
    rows = top[:, None] + steps
    columns = left[:, None] + torch.where(flip[:, None], CROP - 1 - steps, steps)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None]].permute(
        0, 3, 1, 2
    )


def normalise(pixels: Tensor) -> Tensor:
    """Map bytes to float32 around 0."""
    return (pixels.float() / 255 - MEAN) / STD


def batches(
    source: str,
    data: list[Path] | Cache,
    device: torch.device,
    *,
    batch: int,
    train: bool,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of images, float32 on the device, and labels.

    Args:
        source: one of `SOURCES`.
        data: files for "disk", else a cache where it belongs.
        device: where the model is.
        batch: images at once; training leaves a smaller last batch out, as its graph would.
        train: random crops, flips and order; else the middle of every image.
        workers: processes that read files.
    """
    if isinstance(data, Cache):
        count = len(data.pixels)
        order = torch.randperm(count) if train else torch.arange(count)
        for index in order.split(batch):
            if len(index) == batch or not train:
                yield data.batch(index, device, train=train), (index % 200).to(device)
        return
    assert source == "disk"
    loader = DataLoader(
        Photos(data, train=train),
        batch_size=batch,
        shuffle=train,
        drop_last=train,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


__all__ = ["SOURCES", "Cache", "Photos", "batches", "crop", "resized", "write_photos"]
