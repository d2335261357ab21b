"""Prompts on the image: frames, one for all images or one per cluster, and resizing into a border.

Axes: B batch, J frames, C width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import require
from .clusters import cluster_features
from .input_config import AutoVPConfig, DAMVPConfig, VPConfig

STRIPS = ("up", "down", "left", "right")
SCALES = (0.1, 5.0)
"""Range of AutoVP's trainable scale."""


class FramePrompt(nn.Module):
    """Add a frame of trained pixels to the normalised image; values start from N(0, 1)."""

    up: nn.Parameter
    down: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter

    def __init__(self, config: VPConfig, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.channels, self.size = config, channels, size
        self.width = config.width_on(min(size))
        limit = (min(size) - 1) // 2
        bound, remedy = f"at most {limit} on images of {list(size)}", "make the frame narrower"
        require(self.width <= limit, "input_prompt: width", self.width, bound, remedy)
        self._make_frames(1, None)

    def _make_frames(self, count: int, like: Tensor | None) -> None:
        (height, width), channels, border = self.size, self.channels, self.width
        shapes = {
            "up": (count, channels, border, width),
            "down": (count, channels, border, width),
            "left": (count, channels, height - 2 * border, border),
            "right": (count, channels, height - 2 * border, border),
        }
        options: dict[str, Any] = {}
        if like is not None:
            options = {"device": like.device, "dtype": like.dtype}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, **options)))
        self.reset_parameters()

    @property
    def num_frames(self) -> int:
        """J."""
        return len(self.up)

    def reset_parameters(self) -> None:
        """Draw all frames from N(0, 1)."""
        for name in STRIPS:
            nn.init.normal_(getattr(self, name))

    def frames(self, index: Tensor | None = None) -> Tensor:
        """Return frames with zeros inside, `[J, 3, H, W]`, or those of an index, `[B, 3, H, W]`."""
        strips = [getattr(self, name) for name in STRIPS]
        if index is not None:
            strips = [strip[index] for strip in strips]
        up, down, left, right = strips
        inside = left.new_zeros(*left.shape[:3], self.size[1] - 2 * self.width)
        return torch.cat((up, torch.cat((left, inside, right), dim=3), down), dim=2)

    def forward(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """Add the frame, or to image b the frame `index[b]`, to images `[B, 3, H, W]`."""
        require_size(images, self.size)
        return (images + self.frames(index)).to(images.dtype)


class ClusterFramePrompt(FramePrompt):
    """Add the frame of its cluster to every image; see `assign`.

    Attributes:
        prototypes: `[J, C]`, the mean feature of each cluster; NaN before `fit`.
    """

    config: DAMVPConfig
    prototypes: Tensor

    def __init__(
        self, config: DAMVPConfig, channels: int, size: tuple[int, int], features: int
    ) -> None:
        super().__init__(config, channels, size)
        self.fitted = False
        count = config.num_clusters or 2
        self.register_buffer("prototypes", torch.full((count, features), float("nan")))
        self._make_frames(count, None)

    def resize(self, count: int) -> None:
        """Make room for another number of clusters, with fresh frames and no prototypes."""
        if count != len(self.prototypes):
            width = self.prototypes.shape[1]
            self.prototypes = self.prototypes.new_full((count, width), float("nan"))
            self._make_frames(count, self.up)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take the clusters of features `[n, C]`, in whatever number they come.

        Raises:
            ValueError: they make fewer than two clusters, or are too few.
        """
        config = self.config
        found = cluster_features(
            features, num_clusters=config.num_clusters, threshold=config.distance_threshold
        )
        self.resize(len(found))
        self.prototypes.copy_(found)
        self.fitted = True

    @torch.no_grad()
    def use_meta_prompt(self, strips: Sequence[Tensor]) -> None:
        """Start all frames from one, whose strips are given: up, down, left, right.

        Raises:
            ValueError: it is of another size.
        """
        for name, value in zip(STRIPS, strips, strict=True):
            own = getattr(self, name)
            got, expected = f"{name} {list(value.shape)}", f"{list(own.shape[1:])}"
            remedy = "use a meta-prompt of the same width and image size"
            require(
                tuple(value.shape) == tuple(own.shape[1:]), "meta_prompt", got, expected, remedy
            )
        for name, value in zip(STRIPS, strips, strict=True):
            getattr(self, name).copy_(value)

    def assign(self, features: Tensor) -> Tensor:
        """Return the number of the nearest prototype of each feature, `[B, C]` -> int64 `[B]`.

        Raises:
            RuntimeError: there are no prototypes yet.
        """
        if not self.fitted:
            raise RuntimeError(
                "input_prompt: DAM-VP has no clusters yet; call model.fit_clusters(images) with "
                "training images first"
            )
        exact = torch.promote_types(features.dtype, self.prototypes.dtype)
        difference = features.to(exact)[:, None] - self.prototypes.to(exact)
        return difference.square().sum(-1).argmin(1)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **options: Any
    ) -> None:
        found = state_dict.get(f"{prefix}prototypes")
        if isinstance(found, Tensor) and found.ndim == 2:
            self.resize(len(found))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
        self.find_fitted()

    def find_fitted(self) -> None:
        """See whether there are prototypes, after they were replaced."""
        self.fitted = bool(torch.isfinite(self.prototypes).all())


class BorderPrompt(nn.Module):
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

    def reset_parameters(self) -> None:
        """Start from pixels of 0 before the sigmoid, and scale 1."""
        nn.init.zeros_(self.pixels)
        if self.scale is not None:
            nn.init.ones_(self.scale)

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


def image_size(backbone: Any) -> tuple[int, int]:
    """Return the size of the images of a backbone, which a prompt on the image has too.

    Raises:
        ValueError: it takes images of any size.
    """
    size = getattr(backbone.patch_embed, "img_size", None)
    if size is None:
        raise ValueError(
            "input_prompt: got a backbone without image size, expected one with it; create it with "
            "img_size=..."
        )
    return tuple(size)


def require_size(images: Tensor, size: tuple[int, int]) -> None:
    """Check that images have the size of the prompt."""
    got, remedy = f"size {list(images.shape[-2:])}", "resize them"
    expected = f"{list(size)}, for which the prompt on the image was made"
    require(tuple(images.shape[-2:]) == size, "images", got, expected, remedy)
