"""What the functions of `tcpa.inspect` share: passes without gradients, checks, the patch grid."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from .. import vit
from ..checks import require, require_int, require_tensor
from ..model import PromptedViT

Pool = Literal["cls", "image"]


@contextmanager
def evaluating(model: PromptedViT) -> Iterator[None]:
    """Put a model into evaluation, without gradients; afterwards it is as it was."""
    if not isinstance(model, PromptedViT):
        got = type(model).__name__
        raise TypeError(f"model: got {got}, expected what tcpa.wrap returns; unwrap it (.module)")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def batches(model: PromptedViT, images: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield images in parts, on the model's device.

    Raises:
        TypeError, ValueError: they are no images, or there are none.
    """
    require_int("batch_size", batch_size, 1)
    images = require_tensor("images", images, "[B, channels, height, width]", 4)
    require(len(images) > 0, "images", "none", "at least one image", "pass some")
    device = vit.input_weight(model.backbone).device
    for part in images.split(batch_size):
        yield part.to(device)


def patch_grid(model: PromptedViT, images: Tensor) -> tuple[int, int]:
    """Return how many patches images have from top to bottom and from left to right."""
    embed: Any = model.backbone.patch_embed
    if not getattr(model.backbone, "dynamic_img_size", False):
        rows, columns = embed.grid_size
        return int(rows), int(columns)
    rows, columns = embed.dynamic_feat_size(tuple(images.shape[2:]))
    return int(rows), int(columns)
