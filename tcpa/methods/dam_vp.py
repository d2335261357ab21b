"""DAM-VP: a frame for every cluster of images.

Axes: B batch, J frames, C width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import vit
from ..checks import require, require_int, require_number
from .base import Choices, Modules
from .vp import STRIPS, FramePrompt, VPConfig, image_size


@dataclass(frozen=True, kw_only=True, slots=True)
class DAMVPConfig(VPConfig):
    """DAM-VP (CVPR 2023): a frame for every cluster of images; an image takes that of the nearest
    prototype, the mean feature of a cluster."""

    name: ClassVar[str] = "dam-vp"
    forward_passes: ClassVar[int] = 2

    num_clusters: int | None = 16
    """Clusters, at least two; None: as many as `distance_threshold` makes."""

    distance_threshold: float | None = None
    """Mean distance between features above which clusters are not merged, instead of
    `num_clusters`. The original's thresholds (10 for its ViT-B of ImageNet-21k) are for features
    after a layer that timm's models do not have."""

    num_images: int = 1000
    """Training images whose features are clustered."""

    def __post_init__(self) -> None:
        VPConfig.__post_init__(self)
        given = (self.num_clusters is not None) + (self.distance_threshold is not None)
        got = f"num_clusters={self.num_clusters}, distance_threshold={self.distance_threshold}"
        remedy = "set the other one to None"
        require(given == 1, "num_clusters", got, "exactly one of the two", remedy)
        require_int("num_images", self.num_images, 2)
        if self.num_clusters is not None:
            require_int("num_clusters", self.num_clusters, 2, self.num_images)
        if self.distance_threshold is not None:
            require_number("distance_threshold", self.distance_threshold, 0.0)

    def describe(self) -> str:
        return f"dam-vp, {self.num_clusters} frames"

    def fits_before(self, epoch: int) -> Literal["clusters", "mapping"] | None:
        return "clusters" if epoch == 0 else None

    def validate(self, backbone: Any, choices: Choices) -> None:
        reason = "frozen weights: the prototypes of DAM-VP are features of the backbone as it was"
        remedy = "train modules beside it instead (AdapterTuning), or use VPConfig"
        tuning = choices.tuning
        require(not tuning.trains_backbone, "tuning", type(tuning).__name__, reason, remedy)

    def build(self, backbone: Any, choices: Choices) -> Modules:
        channels, size = vit.input_channels(backbone), image_size(backbone)
        return {"input_prompt": ClusterFramePrompt(self, channels, size, backbone.embed_dim)}


class ClusterFramePrompt(FramePrompt):
    """Add the frame of its cluster to every image; see `assign`.

    Attributes:
        prototypes: `[J, C]`, the mean feature of each cluster; NaN before `fit`.
    """

    clustered = True

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

    def fit_images(self, batches: Iterable[Tensor], features_of: Callable[[Tensor], Tensor]) -> int:
        """Take the clusters of images; return how many there are.

        Args:
            batches: images, of which `num_images` are read.
            features_of: maps images to features `[B, C]`.

        Source:
            DAM-VP (CVPR 2023): the first 1000 augmented, shuffled training images.
        """
        limit, count = self.config.num_images, 0
        found = [torch.zeros(0, self.prototypes.shape[1], device=self.prototypes.device)]
        for batch in batches:
            found.append(features_of(batch[: limit - count]).float())
            count += len(found[-1])
            if count == limit:
                break
        self.fit(torch.cat(found))
        return self.num_frames

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
            require(value.shape == own.shape[1:], "meta_prompt", got, expected, remedy)
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

    def resize_for(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        found = tensors.get(f"{prefix}prototypes")
        if isinstance(found, Tensor) and found.ndim == 2:
            self.resize(len(found))

    def find_fitted(self) -> None:
        self.fitted = bool(torch.isfinite(self.prototypes).all())


def cluster_features(
    features: Tensor, *, num_clusters: int | None = None, threshold: float | None = None
) -> Tensor:
    """Cluster features and return the mean of each cluster.

    Args:
        features: `[n, C]`.
        num_clusters: how many clusters; None: decided by `threshold`.
        threshold: mean distance between two clusters above which they are not merged.

    Returns:
        Prototypes `[J, C]` of the dtype and device of the features, in the order in which the
        clusters appear among them.

    Raises:
        ValueError: there are fewer images than clusters, a feature is not finite, or the threshold
            leaves fewer than two clusters.

    Source:
        DAM-VP (CVPR 2023), which calls scikit-learn's AgglomerativeClustering.
    """
    from scipy.cluster import hierarchy

    count = len(features)
    least = 2 if num_clusters is None else num_clusters
    bound, remedy = f"at least {least}, one for each cluster", "use more, or fewer clusters"
    require(count >= least, "images", count, bound, remedy)
    finite = bool(torch.isfinite(features).all())
    require(finite, "features", "NaN or infinity", "finite values", "check images and weights")
    exact = features.detach().double().cpu()
    tree = hierarchy.linkage(exact.numpy(), method="average")
    if num_clusters is not None:
        labels = hierarchy.cut_tree(tree, n_clusters=num_clusters)[:, 0].tolist()
    else:
        labels = hierarchy.fcluster(tree, threshold, criterion="distance").tolist()
    order = list(dict.fromkeys(labels))
    highest = float(tree[-1, 2])
    got = f"{threshold}, which leaves all {count} images in one cluster"
    remedy = f"choose less than {highest:.4g}"
    require(len(order) >= 2, "distance_threshold", got, "at least two clusters", remedy)
    numbers = torch.tensor([order.index(label) for label in labels])
    means = [exact[numbers == number].mean(0) for number in range(len(order))]
    return torch.stack(means).to(features)
