"""Cut crops out of many images at once, on the device that has their bytes."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

PRECISION = 22
"""Bits behind the point of Pillow's weights for 8-bit images."""


@dataclass(frozen=True, slots=True)
class Crops:
    """What to cut out of which images, all `[n]` on one device, in pixels."""

    offsets: Tensor
    """int64, where each image `[3, h, w]` begins among all bytes."""

    heights: Tensor
    """int64, h."""

    widths: Tensor
    """int64, w."""

    scaled_heights: Tensor
    """int64, height to enlarge to; h if the image is to stay as it is."""

    scaled_widths: Tensor
    """int64, width to enlarge to."""

    top: Tensor
    """int64, first row of the crop in the enlarged image."""

    left: Tensor
    """int64, first column of the crop in the enlarged image."""

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
    row, column = _places(crops, side)
    return _gather(pixels, crops, row, column)


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

    Args:
        place: int64 `[n, side]`, pixels of the enlarged axis.
        size, scaled: int64 `[n]`, its length before and after.

    Returns:
        Two int64 `[n, side]` within the axis, and two int32 `[n, side]` that sum to about 2**22.
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
