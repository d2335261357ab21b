"""AutoVP: the image inside a trained border, and a mapping from source classes to classes.

Axes: B batch, C classes, S source classes, m sources of a class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import vit
from ..checks import require, require_bool, require_choice, require_int
from .base import Choices, InputConfig, Modules, require_one_head
from .modules import Fitted, InputPrompt
from .vp import image_size, in_proportion, require_size

MAPPINGS = ("head", "full", "frequency", "iterative", "semantic")
SCALES = (0.1, 5.0)
"""Range of the trainable scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoVPConfig(InputConfig):
    """AutoVP (ICLR 2024): the image made smaller, trained pixels around it, and a mapping from
    source classes to classes."""

    name: ClassVar[str] = "autovp"

    image_size: int | None = None
    """Side of the image inside, pixels. None: 192 of 224 (the code's demo), in proportion on other
    images."""

    trainable_scale: bool = False
    """Train a factor of that side, from 1, kept in 0.1 to 5."""

    mapping: Literal["head", "full", "frequency", "iterative", "semantic"] = "head"
    """"head": a linear head on the features. The others map the logits of the model's own, frozen
    head. "full": by a linear layer. "frequency": to the mean of `sources` source classes, chosen
    once by how often training images are taken for them. "iterative": chosen anew at the start of
    every epoch. "semantic" is refused: it compares names of classes, which a timm model lacks."""

    sources: int = 1
    """Source classes of a class for "frequency" and "iterative" (m; the paper searches 1, 5,
    10)."""

    def __post_init__(self) -> None:
        if self.image_size is not None:
            require_int("image_size", self.image_size, 1)
        require_bool("trainable_scale", self.trainable_scale)
        require_choice("mapping", self.mapping, MAPPINGS)
        require_int("sources", self.sources, 1)
        if self.mapping == "semantic":
            raise ValueError(
                "mapping: got 'semantic', expected head, full, frequency or iterative: a semantic "
                "mapping compares the names of source classes and classes, and neither a timm "
                "model nor a dataset here has any; choose 'frequency'"
            )

    @property
    def maps_logits(self) -> bool:
        return self.mapping != "head"

    def size_on(self, side: int) -> int:
        """Return the side of the image inside, on images of a side, pixels."""
        return in_proportion(192, side) if self.image_size is None else self.image_size

    def fits_before(self, epoch: int) -> Literal["clusters", "mapping"] | None:
        chosen_now = self.mapping == "iterative" or (self.mapping == "frequency" and epoch == 0)
        return "mapping" if chosen_now else None

    def validate(self, backbone: Any, choices: Choices) -> None:
        if not self.maps_logits:
            return
        tuning = choices.tuning
        got = f"{type(tuning).__name__}(head={getattr(tuning, 'head', None)!r})"
        reason = f"HeadTuning(): mapping={self.mapping!r} keeps the model's own head"
        require(tuning.plain_head, "tuning", got, reason, "use mapping='head'")
        given, remedy = choices.num_classes, "pass num_classes"
        require(bool(given), "num_classes", given, "the classes to map to", remedy)
        require_one_head(backbone, "mapping", "one head", "use head")

    def build(self, backbone: Any, choices: Choices) -> Modules:
        channels, size = vit.input_channels(backbone), image_size(backbone)
        made: Modules = {"input_prompt": BorderPrompt(self, channels, size, choices.normalization)}
        if self.maps_logits:
            made["mapping"] = OutputMapping(self, backbone.num_classes, choices.num_classes or 0)
        return made


class BorderPrompt(InputPrompt):
    """Make the image smaller and put trained pixels around it (AutoVP): sigmoid(pixels), from 0.

    The border is made of pixels of 0 to 1 and then normalised, as the image was.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: AutoVPConfig,
        channels: int,
        size: tuple[int, int],
        normalization: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        super().__init__()
        self.config, self.size = config, size
        self.inside = config.size_on(min(size))
        limit = min(size) - (not config.trainable_scale)
        bound, remedy = (
            f"at most {limit} on images of {list(size)}",
            "make the image inside smaller",
        )
        require(self.inside <= limit, "input_prompt: image_size", self.inside, bound, remedy)
        self.pixels = nn.Parameter(torch.zeros(channels, *size))
        self.scale = nn.Parameter(torch.ones(())) if config.trainable_scale else None
        for name, values in zip(("mean", "std"), normalization, strict=True):
            flat = torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(name, flat, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images `[B, 3, H, W]` to others of the same size."""
        require_size(images, self.size)
        exact = images.to(self.pixels.dtype)
        shape = [self.inside * side // min(self.size) for side in self.size]
        small = F.interpolate(exact, shape, mode="bilinear", antialias=True)
        border = (torch.sigmoid(self.pixels) - self.mean) / self.std
        placed, covered = self._place(small) if self.scale is None else self._place_scaled(small)
        return torch.where(covered, placed, border).to(images.dtype)

    def _place(self, small: Tensor) -> tuple[Tensor, Tensor]:
        """Return the canvas with the image in its middle, and where it is."""
        (height, width), (own_height, own_width) = self.size, small.shape[-2:]
        top, left = (height - own_height) // 2, (width - own_width) // 2
        pad = (left, width - own_width - left, top, height - own_height - top)
        covered = F.pad(small.new_ones(small.shape[-2:], dtype=torch.bool), pad)
        return F.pad(small, pad), covered

    def _place_scaled(self, small: Tensor) -> tuple[Tensor, Tensor]:
        """Likewise, the image larger or smaller by the trained scale."""
        assert self.scale is not None
        factor = self.scale.clamp(*SCALES)
        (height, width), (own_height, own_width) = self.size, small.shape[-2:]
        stretch = torch.stack([width / (own_width * factor), height / (own_height * factor)])
        theta = torch.cat((torch.diag(stretch), stretch.new_zeros(2, 1)), dim=1)
        size = [1, small.shape[1], height, width]
        grid = F.affine_grid(theta[None], size, align_corners=False)
        covered = (grid.detach().abs() <= 1).all(-1)
        grid = grid.expand(len(small), -1, -1, -1)
        return F.grid_sample(small, grid, padding_mode="border", align_corners=False), covered


class OutputMapping(Fitted):
    """Map source logits `[B, S]` to logits `[B, C]`: by a linear layer, or by means.

    Attributes:
        index: int64 `[C, m]`, the source classes of every class; -1 before `fit`. None under
            "full".
    """

    index: Tensor | None

    def __init__(self, config: AutoVPConfig, num_sources: int, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_sources, self.num_classes = config, num_sources, num_classes
        remedy = "create the backbone with the head of its training, or use mapping='head'"
        require(num_sources > 0, "mapping: source classes", num_sources, "at least one", remedy)
        self.linear, self.fitted = None, config.mapping == "full"
        index = None
        if config.mapping == "full":
            self.linear = nn.Linear(num_sources, num_classes)
        else:
            needed = num_classes * config.sources
            bound = f"at least {needed}, {config.sources} for each of {num_classes} classes"
            remedy = "use fewer sources, or mapping='full'"
            enough = num_sources >= needed
            require(enough, "mapping: source classes", num_sources, bound, remedy)
            index = torch.full((num_classes, config.sources), -1)
        self.register_buffer("index", index)

    def find_fitted(self) -> None:
        self.fitted = self.index is None or bool((self.index >= 0).all())

    def count(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Count how often images of a class are taken for a source class, int64 `[S, C]`.

        Args:
            logits: of the source classes, `[B, S]`.
            labels: int64 `[B]`.
        """
        places = logits.argmax(1) * self.num_classes + labels
        counts = torch.bincount(places, minlength=self.num_sources * self.num_classes)
        return counts.view(self.num_sources, self.num_classes)

    def fit(self, counts: Tensor) -> None:
        """Choose the sources of every class.

        Args:
            counts: `[S, C]`, how many training images of a class the model takes for a source
                class.
        """
        assert self.index is not None
        chosen = frequency_mapping(counts, self.config.sources)
        self.index.copy_(chosen)
        self.fitted = True

    def forward(self, logits: Tensor) -> Tensor:
        """Map logits.

        Raises:
            RuntimeError: the sources are not chosen yet.
        """
        if self.linear is not None:
            return self.linear(logits.to(self.linear.weight.dtype))
        if not self.fitted or self.index is None:
            raise RuntimeError(
                "mapping: no source classes are chosen yet; call model.mapping.fit with the sum of "
                "model.count_sources(images, labels) over training images first"
            )
        return logits[:, self.index.flatten()].unflatten(1, self.index.shape).mean(-1)


def frequency_mapping(counts: Tensor, sources: int) -> Tensor:
    """Give every class the source classes that its images are most often taken for.

    Greedy: the highest count of all first; a source class serves one class, a class takes
    `sources`. Equal counts go to the lower source class, then to the lower class.

    Args:
        counts: `[S, C]`, S >= C * sources.
        sources: m.

    Returns:
        int64 `[C, m]` on the CPU.

    Source:
        ILM-VP and AutoVP (frequency label mapping).
    """
    num_classes = counts.shape[1]
    order = counts.detach().cpu().flatten().argsort(descending=True, stable=True).tolist()
    found: list[list[int]] = [[] for _ in range(num_classes)]
    used: set[int] = set()
    missing = num_classes * sources
    for place in order:
        source, target = divmod(place, num_classes)
        if source in used or len(found[target]) == sources:
            continue
        found[target].append(source)
        used.add(source)
        missing -= 1
        if missing == 0:
            break
    return torch.tensor(found)
