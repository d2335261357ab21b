"""What is measured: shapes of operations, and steps.

A shape's name tells all of it: `b16-224-p36-b128` is ViT-B/16 at 224 pixels with 36 prompt rows
shared by a batch of 128; `...-p36s-...` has prompts of their own per sample.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tcpa import HTA_DATASETS

from ...cli import UsageError

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Backbone:
    """The sizes of a ViT that attention and matching see."""

    heads: int
    head_dim: int
    depth: int
    patch: int
    prefix: int = 1
    """Tokens before the patches."""

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim


BACKBONES = {
    "ti16": Backbone(3, 64, 12, 16),
    "s16": Backbone(6, 64, 12, 16),
    "b16": Backbone(12, 64, 12, 16),
    "l16": Backbone(16, 64, 24, 16),
    "h14": Backbone(16, 80, 32, 14),
    "dinov2_s14": Backbone(6, 64, 12, 14, prefix=5),
    "dinov2_b14": Backbone(12, 64, 12, 14, prefix=5),
}
"""ViT-Ti/S/B/L/H; DINOv2 with four registers beside the class token."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one attention or matching: a backbone, its image, prompts and batch."""

    backbone: str
    image: int
    """Height and width of the image, pixels."""
    prompts: int
    """Prompt rows of both pools together, P."""
    batch: int
    per_sample: bool = False
    """Whether every sample has prompts of its own."""

    @property
    def vit(self) -> Backbone:
        """The backbone's sizes."""
        return BACKBONES[self.backbone]

    @property
    def tokens(self) -> int:
        """Tokens of an image, L."""
        return self.vit.prefix + (self.image // self.vit.patch) ** 2

    @property
    def pools(self) -> tuple[int, int]:
        """Entries of the CLS pool and of the image pool, one row each."""
        return self.prompts // 2, self.prompts - self.prompts // 2

    @property
    def top_k(self) -> tuple[int, int]:
        """Entries that a token sees of either pool: 10 as in the official settings, or all."""
        return min(10, self.pools[0]), min(10, self.pools[1])

    @property
    def name(self) -> str:
        """The name that `parse_shape` reads."""
        mark = "s" if self.per_sample else ""
        return f"{self.backbone}-{self.image}-p{self.prompts}{mark}-b{self.batch}"


PROMISED = Shape("b16", 224, 36, 128)
"""What the targets are for: the official CUB settings on ViT-B/16."""

_NAME = re.compile(r"(\w+)-(\d+)-p(\d+)(s?)-b(\d+)")


def parse_shape(text: str, option: str = "--shape") -> Shape:
    """Read a shape's name.

    Raises:
        UsageError: it is none; the message says what is expected.
    """
    found = _NAME.fullmatch(text)
    fits = found is not None and found[1] in BACKBONES
    sizes = [int(found[i]) for i in (2, 3, 5)] if found and fits else []
    if not found or not fits or sizes[0] < BACKBONES[found[1]].patch or sizes[2] < 1:
        raise UsageError(
            f"{option}: got {text!r}, expected BACKBONE-IMAGE-pPROMPTS-bBATCH such as "
            f"{PROMISED.name} (p36s: prompts per sample), BACKBONE one of {', '.join(BACKBONES)}; "
            "correct the name"
        )
    return Shape(found[1], sizes[0], sizes[1], sizes[2], found[4] == "s")


def standard_shapes() -> list[Shape]:
    """Return what `tcpa-bench ops` measures on a GPU, the promised shape first."""
    return list(dict.fromkeys(_standard()))


def _standard() -> Iterator[Shape]:
    yield PROMISED
    yield Shape("b16", 224, 36, 128, per_sample=True)
    for backbone in ("s16", "l16", "h14", "dinov2_b14"):
        yield Shape(backbone, 224, 36, 128 if backbone != "h14" else 64)
    for backbone in ("s16", "b16", "l16"):
        yield Shape(backbone, 384, 36, 32)
    for prompts in (0, 10, 64, 100, 256):
        yield Shape("b16", 224, prompts, 128)
    for batch in (1, 8, 32, 512):
        yield Shape("b16", 224, 36, batch)


def small_shapes() -> list[Shape]:
    """Return what `tcpa-bench ops` measures on a CPU: the same kinds, in seconds."""
    return [
        Shape("b16", 224, 36, 4),
        Shape("b16", 224, 36, 4, per_sample=True),
        Shape("b16", 224, 0, 4),
        Shape("s16", 384, 36, 2),
        Shape("dinov2_s14", 224, 36, 4),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCase:
    """What one step computes."""

    model: str = "vit_base_patch16_224"
    """timm name of the backbone; weights are random."""
    dataset: str = "cub"
    """Whose official settings to use, without the image prompt."""
    batch: int = 8
    """Images a step."""
    mode: str = "train"
    """"train": forward, backward, optimiser. "eval": forward without gradients."""
    device: str = "cpu"

    precision: str = "float32"
    """Precision of the run, for the record; every provider has its own."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default."""
    table: str = "step"
    """"step": methods and forms side by side. "ladder": one change after the other."""

    def __post_init__(self) -> None:
        if self.dataset not in HTA_DATASETS:
            raise ValueError(f"dataset: got {self.dataset!r}, expected one of {HTA_DATASETS}")
