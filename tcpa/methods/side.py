"""Side-tuning: AlexNet's convolutions on the image, blended with the backbone's feature."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import vit
from ..checks import require, require_bool
from .base import Choices, Modules, require_one_head
from .heads import HeadTuning

ALEXNET_PIXELS = 63
"""Smallest images that AlexNet's convolutions take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SideTuning(HeadTuning):
    """Train a side network, AlexNet's convolutions, and the head: s f + (1 - s) W AlexNet(x).

    Grey images are given to it three times, images of less than 63 pixels enlarged.
    """

    name: ClassVar[str] = "side"

    pretrained: bool = True
    """Start AlexNet from torchvision's ImageNet-1k weights, which are downloaded once. False:
    from random ones."""

    def __post_init__(self) -> None:
        HeadTuning.__post_init__(self)
        require_bool("pretrained", self.pretrained)

    def validate(self, backbone: Any, choices: Choices) -> None:
        require_one_head(backbone, "tuning", "one feature to blend", "use one with one head")
        channels, remedy = vit.input_channels(backbone), "use another tuning"
        fits = channels in (1, 3)
        require(fits, "tuning", f"{channels} channels", "1 or 3, which AlexNet can read", remedy)

    def build(self, backbone: Any, choices: Choices) -> Modules:
        return {"side": SideNetwork(backbone.embed_dim)}

    def load_pretrained(self, model: Any) -> None:
        if self.pretrained:
            model.side.load_pretrained()

    def without_download(self) -> Self:
        return self.replace(pretrained=False)


def for_alexnet(images: Tensor) -> Tensor:
    """Return images `[B, 1 or 3, H, W]` as AlexNet takes them: three channels, grey ones three
    times, and a shorter side of 63 pixels at least, small ones enlarged."""
    shorter = min(images.shape[-2:])
    if shorter < ALEXNET_PIXELS:
        size = [round(side * ALEXNET_PIXELS / shorter) for side in images.shape[-2:]]
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    return images.expand(-1, 3, -1, -1)


class SideNetwork(nn.Module):
    """AlexNet's convolutions on the image, mapped to the backbone's width and blended with its
    feature; sigmoid of `blend`, 0 at first, is the backbone's share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from torchvision.models import alexnet

        self.features = alexnet(weights=None).features
        self.pool = nn.AdaptiveAvgPool2d((6, 6))
        self.project = nn.Linear(256 * 6 * 6, width, bias=False)
        self.blend = nn.Parameter(torch.zeros(()))

    def load_pretrained(self) -> None:
        """Take torchvision's ImageNet-1k weights.

        Raises:
            RuntimeError: they are not there and cannot be downloaded.
        """
        from torchvision.models import AlexNet_Weights

        try:
            state = AlexNet_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        except Exception as error:  # What a failed download raises differs between versions.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"tuning: torchvision could not load AlexNet's weights ({reason}); connect once so "
                "that they are cached, or pass SideTuning(pretrained=False)"
            ) from error
        own = {name.removeprefix("features."): v for name, v in state.items() if "features" in name}
        self.features.load_state_dict(own)

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """Blend the backbone's features `[B, C]` with those of images `[B, 3, H, W]`."""
        x = self.features(for_alexnet(images.to(self.project.weight.dtype)))
        if x.shape[-2:] != (6, 6):
            x = self.pool(x)
        x = x.flatten(1)
        share = torch.sigmoid(self.blend)
        return share * features + (1 - share) * self.project(x)
