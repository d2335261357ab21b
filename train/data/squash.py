"""Images resized to a square, whatever their shape: how VPT prepares VTAB-1k."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from .pools import Pool


class SquashedPool:
    """A pool whose images a cache of the same side hands out as squares.

    Bilinear without antialiasing and without regard to the aspect ratio, as TensorFlow's
    `image.resize`, rounded to 8 bits. Square images that are no larger stay as they are: the cache
    enlarges them, to the same pixels but for the rounding, and is many times smaller.

    Args:
        pool: the images.
        side: height and width of the squares, pixels.
    """

    def __init__(self, pool: Pool, side: int) -> None:
        self._pool, self._side = pool, side

    def __len__(self) -> int:
        return len(self._pool)

    def name(self, index: int) -> str:
        return self._pool.name(index)

    def key(self, index: int) -> str:
        return self._pool.key(index)

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height of the squashed image, pixels."""
        width, height = self._pool.size(index)
        return (width, height) if self._stays(width, height) else (self._side, self._side)

    def load(self, index: int) -> Image.Image:
        picture = self._pool.load(index)
        return picture if self._stays(*picture.size) else squash(picture, self._side)

    def stamps(self) -> list[str]:
        return [f"{stamp}:squashed" for stamp in self._pool.stamps()]

    def _stays(self, width: int, height: int) -> bool:
        return width == height <= self._side


def squash(picture: Image.Image, side: int) -> Image.Image:
    """Resize an RGB image to `side` x `side` pixels, bilinear without antialiasing."""
    planes = torch.from_numpy(np.array(picture).transpose(2, 0, 1))
    # torchvision declares more than it takes; it rounds to 8 bits.
    resize: Any = transforms.resize
    squashed = resize(planes, [side, side], InterpolationMode.BILINEAR, antialias=False)
    return Image.fromarray(squashed.permute(1, 2, 0).numpy())
