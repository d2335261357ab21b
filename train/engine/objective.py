"""Mixed images and soft targets."""

from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from ..recipes.recipe import Recipe
from .randomness import numpy_seeded


class Mixer:
    """Mixes the images of a batch in pairs and turns labels into soft targets."""

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self._recipe, self._num_classes = recipe, num_classes
        self.mixes = mixes(recipe)
        self._mixup = Mixup(
            mixup_alpha=recipe.mixup_alpha,
            cutmix_alpha=recipe.cutmix_alpha,
            prob=recipe.mix_prob,
            label_smoothing=recipe.label_smoothing,
            num_classes=num_classes,
        )

    def __call__(
        self, images: Tensor, labels: Tensor, *, epoch: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """Return mixed images and float32 targets `[n, classes]`.

        Row i is mixed with row n - 1 - i; all rows of the global batch by one weight, drawn from
        (seed, epoch, step). `images` may be changed in place.

        Args:
            images: float `[n, 3, H, W]`; n is even where images are mixed.
            labels: int64 `[n]`.
            epoch, step: position in the training.

        Source:
            Official trainer: timm's Mixup per batch, label smoothing on every batch.
        """
        if not self.mixes or len(images) == 0:
            smoothing = self._recipe.label_smoothing
            return images, mixup_target(labels, self._num_classes, 1.0, smoothing)
        with numpy_seeded(self._recipe.seed, epoch, step):
            return self._mixup(images, labels)


def mixes(recipe: Recipe) -> bool:
    """Tell whether images are mixed; global batches must then be even."""
    return recipe.mix_prob > 0 and (recipe.mixup_alpha > 0 or recipe.cutmix_alpha > 0)
