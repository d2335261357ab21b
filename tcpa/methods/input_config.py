"""Configurations of what is done to the image: frames, clusters of frames, resizing with an output
mapping, equilibrium layers."""

from dataclasses import dataclass
from typing import Literal

from ..checks import require, require_bool, require_choice, require_int, require_number

REFERENCE_SIDE = 224
"""Side of the images, pixels, for which the papers state their sizes."""

MAPPINGS = ("head", "full", "frequency", "iterative", "semantic")


def in_proportion(pixels: int, side: int) -> int:
    """Return what `pixels` of a 224-pixel image are on an image of another side."""
    return max(round(pixels * side / REFERENCE_SIDE), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class VPConfig:
    """Visual Prompting (Bahng et al., 2022): a trained frame added to the normalised image."""

    width: int | None = None
    """Width of the frame, pixels. None: 30 of 224, in proportion on other images."""

    def __post_init__(self) -> None:
        if self.width is not None:
            require_int("width", self.width, 1)

    def width_on(self, side: int) -> int:
        """Return the width of the frame on images of a side, pixels."""
        return in_proportion(30, side) if self.width is None else self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class DAMVPConfig(VPConfig):
    """DAM-VP (CVPR 2023): a frame for every cluster of images; an image takes that of the nearest
    prototype, the mean feature of a cluster."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoVPConfig:
    """AutoVP (ICLR 2024): the image made smaller, trained pixels around it, and a mapping from
    source classes to classes."""

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
        """Whether the model's own head is kept and its logits are mapped."""
        return self.mapping != "head"

    def size_on(self, side: int) -> int:
        """Return the side of the image inside, on images of a side, pixels."""
        return in_proportion(192, side) if self.image_size is None else self.image_size


@dataclass(frozen=True, kw_only=True, slots=True)
class LIONConfig:
    """LION (AAAI 2024): an equilibrium layer that prompts the image, and one that prompts the
    feature before the head.

    Unverified: no code is public and the paper's equations were not at hand; what is built is what
    its abstract says, with layers of our choice (see `equilibrium`).
    """

    hidden: int = 64
    """Channels of the equilibrium of the feature."""

    kernel_size: int = 3
    """Side of the convolutions of the equilibrium of the image, pixels, odd."""

    contraction: float = 0.5
    """Largest factor by which a step of the iteration brings two states together; the equilibrium
    then exists and is unique."""

    iterations: int = 24
    """Steps to the equilibrium, and as many for its gradient: the error is below contraction **
    iterations."""

    critical_share: float = 1.0
    """Share of the values of each prompt parameter that training updates, those with the largest
    |value * gradient| in a step; the others are only decayed. 1: all of them."""

    def __post_init__(self) -> None:
        require_int("hidden", self.hidden, 1)
        require_int("kernel_size", self.kernel_size, 1)
        require(self.kernel_size % 2 == 1, "kernel_size", self.kernel_size, "odd", "add 1")
        require_number("contraction", self.contraction, 0.0, 1.0)
        require_int("iterations", self.iterations, 1)
        require_number("critical_share", self.critical_share, 0.0)
        top = self.critical_share <= 1
        require(top, "critical_share", self.critical_share, "a share from 0 to 1", "lower it")


InputConfig = VPConfig | DAMVPConfig | AutoVPConfig | LIONConfig

INPUT_PROMPTS: dict[str, type[InputConfig]] = {
    "vp": VPConfig,
    "dam-vp": DAMVPConfig,
    "autovp": AutoVPConfig,
    "lion": LIONConfig,
}
"""Name under which an input prompt is saved and asked for."""
