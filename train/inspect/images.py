"""Images to inspect: read from a folder, unreadable ones listed and left out."""

import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

import tcpa
from tcpa.vit import input_channels

from ...cli import UsageError

SPLITS = {"train", "val", "test"}
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises for damaged files, and for those that would fill the memory."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class ImageSet:
    """Images, ready for a model."""

    images: Tensor
    """float32 `[B, channels, S, S]`, normalised."""
    pictures: np.ndarray
    """float32 `[B, S, S]` or `[B, S, S, 3]` in [0, 1], to look at."""
    names: list[str]
    labels: np.ndarray | None
    """int64 `[B]`; None without classes."""
    class_names: list[str]
    skipped: list[tuple[str, str]]
    """Name and reason of what could not be read."""
    left_out: int
    """Images that were not read, because of `max_images`."""
    origin: str


def read_images(folder: Path, model: tcpa.PromptedViT, *, count: int, seed: int) -> ImageSet:
    """Read the images below a folder: shorter side to 8/7 of the size, the middle cut out.

    Args:
        folder: images at any depth; two or more folders in it are classes.
        model: decides size, channels and normalisation.
        count: as many are read; which, if there are more, the seed decides.
        seed: of that choice.

    Raises:
        UsageError: no folder, no image, none that can be read, or a model for other channels.
    """
    size, channels = model.backbone.patch_embed.img_size, input_channels(model.backbone)
    size = 224 if not size else int(size[0])
    if channels not in (1, 3):
        raise UsageError(
            f"RUNS: got a backbone for images of {channels} channels, expected 1 or 3; use "
            "tcpa.inspect with tensors of your own"
        )
    if not folder.is_dir():
        raise UsageError(f"--images: got {folder}, expected a folder of images; check the path")
    found = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise UsageError(
            f"--images: got {folder} without any image, expected files that end in {kinds}; check "
            "the path"
        )
    order = np.random.default_rng(seed).permutation(len(found))
    read: dict[int, np.ndarray] = {}
    skipped = []
    for place in order:
        if len(read) == count:
            break
        try:
            read[place] = _read(folder / found[place], size, channels)
        except UNREADABLE as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            # Pillow repeats the whole path.
            reason = reason.replace(f" {str(folder / found[place])!r}", "")
            skipped.append((found[place].as_posix(), reason))
    if not read:
        name, reason = min(skipped)
        raise UsageError(
            f"--images: none of the {len(found)} images in {folder} can be read ({name}: "
            f"{reason}); check the files"
        )
    places = sorted(read)
    names = [found[place].as_posix() for place in places]
    classes = _classes(found)
    labels = [classes.index(_class_of(Path(name))) for name in names] if classes else None
    pixels = np.stack([read[place] for place in places])
    return ImageSet(
        images=_normalise(pixels, model.normalization),
        pictures=(pixels[..., 0] if channels == 1 else pixels).astype(np.float32) / 255,
        names=names,
        labels=None if labels is None else np.array(labels, np.int64),
        class_names=classes,
        skipped=sorted(skipped),
        left_out=len(found) - len(read) - len(skipped),
        origin=str(folder),
    )


def _read(path: Path, size: int, channels: int) -> np.ndarray:
    """Return uint8 `[size, size, channels]`."""
    with warnings.catch_warnings():
        # Everything else that Pillow warns of leaves an image that can be shown.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            picture = file.convert("L" if channels == 1 else "RGB")
    # torchvision declares tensors only.
    resize: Any = transforms.resize
    crop: Any = transforms.center_crop
    picture = crop(resize(picture, [round(size * 8 / 7)], InterpolationMode.BILINEAR), [size, size])
    return np.asarray(picture).reshape(size, size, channels)


def _normalise(pixels: np.ndarray, normalization: Any) -> Tensor:
    """Map uint8 `[B, S, S, channels]` to float32 `[B, channels, S, S]` as a model expects it."""
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in normalization)
    scaled = torch.from_numpy(pixels).float() / 255
    return ((scaled - mean) / std).permute(0, 3, 1, 2).contiguous()


def _class_of(name: Path) -> str:
    parts = name.parts[:-1]
    skip = len(parts) > 1 and parts[0] in SPLITS
    return parts[1 if skip else 0] if parts else ""


def _classes(names: list[Path]) -> list[str]:
    """Return the names of the classes; none where images lie in no folder or all in one."""
    classes = sorted({_class_of(name) for name in names})
    return classes if len(classes) > 1 and "" not in classes else []
