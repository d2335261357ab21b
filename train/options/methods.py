"""What the list of methods can be asked for."""

from dataclasses import dataclass

from ...cli import require


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodsConfig:
    """List every method: what is trained, how many values, FLOPs an image, source, verification.

    Values and FLOPs are those of the model that a run would build, without any memory for it.
    """

    dataset: str = "cub"
    """Dataset whose recipes are shown, see `run`."""

    classes: int = 200
    """Classes of the head."""

    backbone: str = "vit_base_patch16_224"
    """timm model on which values and FLOPs are counted."""

    image_size: int | None = None
    """Side of the images, pixels; that of the backbone by default."""

    csv: bool = False
    """Print every column as comma-separated values."""

    def __post_init__(self) -> None:
        for option in ("classes", "image_size"):
            value = getattr(self, option)
            usable = value is None or value >= 1
            require(usable, f"--{option.replace('_', '-')}", value, "1 or more", "change it")
