"""What happens to a resized image on its way into a batch: crop, mirror, normalise."""

from dataclasses import dataclass

import numpy as np

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
