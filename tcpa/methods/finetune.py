"""Parameters of the backbone that are trained: the last blocks, the biases, all."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .. import vit
from ..checks import require, require_int, require_number
from .base import Choices
from .heads import HeadTuning


@dataclass(frozen=True, kw_only=True, slots=True)
class LastBlockTuning(HeadTuning):
    """Train the last blocks, the final norm and the head: Partial-k."""

    name: ClassVar[str] = "last-block"
    trains_backbone: ClassVar[bool] = True

    num_blocks: int = 1
    """k."""

    def __post_init__(self) -> None:
        HeadTuning.__post_init__(self)
        require_int("num_blocks", self.num_blocks, 1)

    def validate(self, backbone: Any, choices: Choices) -> None:
        depth, remedy = len(backbone.blocks), "lower it"
        bound = f"at most {depth}, the blocks of the backbone"
        require(self.num_blocks <= depth, "tuning: num_blocks", self.num_blocks, bound, remedy)

    def backbone_parameters(self, backbone: Any) -> dict[str, nn.Parameter]:
        depth = len(backbone.blocks)
        parts = [f"blocks.{index}." for index in range(depth - self.num_blocks, depth)]
        parts += ["norm.", "fc_norm."]
        return {n: p for n, p in _below_head(backbone).items() if n.startswith(tuple(parts))}


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasTuning(HeadTuning):
    """Train every parameter of the backbone whose name contains "bias", and the head: BitFit."""

    name: ClassVar[str] = "bias"
    trains_backbone: ClassVar[bool] = True

    def backbone_parameters(self, backbone: Any) -> dict[str, nn.Parameter]:
        return {name: p for name, p in _below_head(backbone).items() if "bias" in name}


@dataclass(frozen=True, kw_only=True, slots=True)
class FullTuning(HeadTuning):
    """Train everything."""

    name: ClassVar[str] = "full"
    trains_backbone: ClassVar[bool] = True

    dropout: float = 0.0
    """In training, after the positions and after both layers of every MLP (VPT's ViT: 0.1)."""

    def __post_init__(self) -> None:
        HeadTuning.__post_init__(self)
        require_number("dropout", self.dropout, 0.0, 1.0)

    def backbone_parameters(self, backbone: Any) -> dict[str, nn.Parameter]:
        return _below_head(backbone)

    def dropout_layers(self, backbone: Any) -> list[nn.Dropout]:
        if self.dropout == 0:
            return []
        owners = [backbone, *(block.mlp for block in backbone.blocks)]
        layers = [getattr(m, name, None) for m in owners for name in ("pos_drop", "drop1", "drop2")]
        found = [layer for layer in layers if isinstance(layer, nn.Dropout)]
        for layer in found:
            layer.p = self.dropout
        return found


def _below_head(backbone: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of the backbone, the head's apart, by name."""
    heads = {id(p) for head in vit.classifier_layers(backbone) for p in head.parameters()}
    return {name: p for name, p in backbone.named_parameters() if id(p) not in heads}
