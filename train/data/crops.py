"""Crops of resized images: where they lie, and how a device cuts many at once."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ...cli import UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation that the official code normalises with, for values in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transform:
    """RandomCrop and RandomHorizontalFlip, or CenterCrop; then ToTensor and Normalize.

    Equal to torchvision's on the same crop. The official code crops 224 out of a shorter side of
    256 and mirrors digits and traffic signs too.
    """

    train: bool
    """Random crop and mirroring; else the middle of the image."""

    crop: int = 224
    """Height and width of the model's input, pixels."""

    flip: float = 0.5
    """Probability that a training image is mirrored."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.crop < 1:
            raise UsageError(f"crop: got {self.crop}, expected pixels, 1 or more; 224 is usual")
        if not 0 <= self.flip <= 1:
            raise UsageError(f"flip: got {self.flip}, expected 0 to 1; 0.5 is usual")
        if min(self.std) <= 0:
            raise UsageError(f"std: got {self.std}, expected three positive numbers; check them")

    def places(
        self, heights: np.ndarray, widths: np.ndarray, chances: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Choose crops.

        Args:
            heights, widths: of the images, int64 `[N]`, pixels, at least `crop`.
            chances: float64 `[N, 3]` in [0, 1), for top, left and mirroring.

        Returns:
            top and left, int64 `[N]`, pixels; mirrored, bool `[N]`.
        """
        spare = np.stack([heights, widths]) - self.crop
        if self.train:
            # 1 - 2**-53 times a large number may round up to it.
            top, left = np.minimum((chances.T[:2] * (spare + 1)).astype(np.int64), spare)
            return top, left, chances[:, 2] < self.flip
        # Half to even, as torchvision's CenterCrop rounds.
        top, left = np.rint(spare / 2).astype(np.int64)
        return top, left, np.zeros(len(heights), bool)


PRECISION = 22
"""Bits behind the point of Pillow's weights for 8-bit images."""


@dataclass(frozen=True, slots=True)
class Crops:
    """What to cut out of which images, all `[n]` on one device, in pixels."""

    offsets: Tensor
    """int64, where each image `[3, h, w]` begins among all bytes."""

    heights: Tensor
    widths: Tensor
    """int64, h and w."""

    scaled_heights: Tensor
    scaled_widths: Tensor
    """int64, size to enlarge to; h and w if the image is to stay as it is."""

    top: Tensor
    left: Tensor
    """int64, first row and column of the crop in the enlarged image."""

    flip: Tensor
    """bool, whether to mirror."""

    def part(self, part: slice) -> "Crops":
        """Return some of the crops."""
        return Crops(*(getattr(self, field.name)[part] for field in fields(self)))


def gather_crops(pixels: Tensor, crops: Crops, side: int) -> Tensor:
    """Cut a square out of every image at its own place, without a loop over images.

    Args:
        pixels: uint8 `[bytes]`, images `[3, h, w]` one after another.
        crops: the places; no image is enlarged.
        side: height and width of a crop, pixels.

    Returns:
        uint8 `[n, 3, side, side]` on the device of `pixels`.
    """
    return _gather(pixels, crops, *_places(crops, side))


def gather_enlarged_crops(pixels: Tensor, crops: Crops, side: int) -> Tensor:
    """Cut a square out of every image as Pillow would enlarge it bilinearly, bit for bit.

    Pillow's arithmetic: rows first, then columns, each with two weights of 22 bits and a rounding
    to 8 bits. An image that has its size already stays as it is.

    Args:
        pixels, side: as for `gather_crops`.
        crops: the places; no image may shrink.

    Returns:
        uint8 `[n, 3, side, side]` on the device of `pixels`.
    """
    row, column = _places(crops, side)
    lines, line_weights = _taps(row, crops.heights, crops.scaled_heights)
    columns, column_weights = _taps(column, crops.widths, crops.scaled_widths)
    between = [
        _blend(
            [_gather(pixels, crops, line, column) for column in columns],
            [weight[:, None, None, :] for weight in column_weights],
        )
        for line in lines
    ]
    return _blend(between, [weight[:, None, :, None] for weight in line_weights]).to(torch.uint8)


def _places(crops: Crops, side: int) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of each crop, int64 `[n, side]`."""
    steps = torch.arange(side, device=crops.top.device)
    mirrored = torch.where(crops.flip[:, None], side - 1 - steps, steps)
    return crops.top[:, None] + steps, crops.left[:, None] + mirrored


def _gather(pixels: Tensor, crops: Crops, row: Tensor, column: Tensor) -> Tensor:
    """Read `[n, side]` rows by `[n, side]` columns of every image: uint8 `[n, 3, side, side]`."""
    line = crops.offsets[:, None] + row * crops.widths[:, None]
    # [n, side, side], the same place in each of the three planes.
    place = line[:, :, None] + column[:, None, :]
    plane = (crops.heights * crops.widths)[:, None, None]
    return torch.stack([pixels[place + channel * plane] for channel in range(3)], dim=1)


def _taps(place: Tensor, size: Tensor, scaled: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the two neighbours that each enlarged pixel lies between, and their weights.

    `place` int64 `[n, side]`, pixels of the enlarged axis; `size` and `scaled` int64 `[n]`, its
    length before and after. Two int64 `[n, side]` within the axis, and two int32 `[n, side]` that
    sum to about 2**22.
    """
    scale = (size.double() / scaled.double())[:, None]
    centre = (place.double() + 0.5) * scale
    first = torch.floor(centre - 0.5)
    last = (size - 1)[:, None]
    found, weights = [], []
    for tap in (first, first + 1):
        weight = 1 - (tap - centre + 0.5).abs()
        weights.append(torch.where((tap < 0) | (tap > last), 0.0, weight))
        found.append(tap.long().clamp(min=0).minimum(last))
    total = weights[0] + weights[1]
    return found, [(0.5 + weight / total * (1 << PRECISION)).int() for weight in weights]


def _blend(values: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Return the weighted sum of 8-bit values, rounded to 8 bits: int32."""
    total = values[0].int() * weights[0] + values[1].int() * weights[1]
    # Weights may sum to 2**22 + 1: 255.5 of 255 is still 255.
    return (total + (1 << (PRECISION - 1))) >> PRECISION
