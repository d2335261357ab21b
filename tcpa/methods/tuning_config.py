"""What is trained besides prompts: head, weights of the backbone, or modules beside its own.

Sources: the VPT repository (KMnP/vpt, commit 4410440) and ShoufaChen/AdaptFormer.
"""

from dataclasses import dataclass
from typing import Literal

from ..checks import require_bool, require_choice, require_int, require_number

HEADS = ("linear", "prior", "normed")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadTuning:
    """Train the classification head; nothing of the backbone."""

    head: Literal["linear", "prior", "normed"] = "linear"
    """"linear": a linear layer as torch initialises it (TCPA). "prior": Kaiming-normal weights and
    biases -log 99 (VPT). "normed": batch normalisation without parameters, then a linear layer with
    truncated normal weights of 0.01 (AdaptFormer). A head that the model already has and keeps is
    not initialised."""

    def __post_init__(self) -> None:
        require_choice("head", self.head, HEADS)


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPHeadTuning(HeadTuning):
    """Train a head of several layers: (linear, ReLU, batch norm, dropout), then linear."""

    head: Literal["linear", "prior", "normed"] = "prior"
    """Initial values of the last layer; "normed" would normalise what is normalised already."""

    hidden_layers: int = 2
    """Layers of the backbone's width before the last one. MLP-3 is 2: three layers in all (whether
    the paper counts so cannot be told from its code)."""

    dropout: float = 0.1
    """After each hidden layer."""

    def __post_init__(self) -> None:
        require_choice("head", self.head, ("linear", "prior"))
        require_int("hidden_layers", self.hidden_layers, 1)
        require_number("dropout", self.dropout, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LastBlockTuning(HeadTuning):
    """Train the last blocks, the final norm and the head: Partial-k."""

    num_blocks: int = 1
    """k."""

    def __post_init__(self) -> None:
        HeadTuning.__post_init__(self)
        require_int("num_blocks", self.num_blocks, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasTuning(HeadTuning):
    """Train every parameter of the backbone whose name contains "bias", and the head: BitFit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTuning(HeadTuning):
    """Train a bottleneck after the MLP of every block, and the head: y + U gelu(V y)."""

    reduction: int = 8
    """r; the bottleneck has C / r channels, at least one."""

    zero_init: bool = False
    """True, for parity: all values start from 0, as in VPT's repository, where only the biases of
    U can ever be trained. False: V starts as torch initialises it, U and its biases from 0."""

    def __post_init__(self) -> None:
        HeadTuning.__post_init__(self)
        require_int("reduction", self.reduction, 1)
        require_bool("zero_init", self.zero_init)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptFormerTuning(HeadTuning):
    """Train a bottleneck beside the MLP of every block, and the head: + scale U relu(V h)."""

    head: Literal["linear", "prior", "normed"] = "normed"

    bottleneck: int = 64
    """Channels between V and U."""

    scale: float = 0.1

    dropout: float = 0.1
    """Between ReLU and U."""

    def __post_init__(self) -> None:
        HeadTuning.__post_init__(self)
        require_int("bottleneck", self.bottleneck, 1)
        require_number("scale", self.scale, 0.0)
        require_number("dropout", self.dropout, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SideTuning(HeadTuning):
    """Train a side network, AlexNet's convolutions, and the head: s f + (1 - s) W AlexNet(x).

    Grey images are given to it three times, images of less than 63 pixels enlarged.
    """

    pretrained: bool = True
    """Start AlexNet from torchvision's ImageNet-1k weights, which are downloaded once. False:
    from random ones."""

    def __post_init__(self) -> None:
        HeadTuning.__post_init__(self)
        require_bool("pretrained", self.pretrained)


@dataclass(frozen=True, kw_only=True, slots=True)
class FullTuning(HeadTuning):
    """Train everything."""

    dropout: float = 0.0
    """In training, after the positions and after both layers of every MLP (VPT's ViT: 0.1)."""

    def __post_init__(self) -> None:
        HeadTuning.__post_init__(self)
        require_number("dropout", self.dropout, 0.0, 1.0)


TuningConfig = HeadTuning
"""Any of the above: they all train the head."""

TRAINS_BACKBONE = (LastBlockTuning, BiasTuning, FullTuning)
"""Tunings of which weights of the backbone are part."""

TUNINGS: dict[str, type[HeadTuning]] = {
    "head": HeadTuning,
    "mlp-head": MLPHeadTuning,
    "last-block": LastBlockTuning,
    "bias": BiasTuning,
    "adapter": AdapterTuning,
    "adaptformer": AdaptFormerTuning,
    "side": SideTuning,
    "full": FullTuning,
}
"""Name under which a tuning is saved and asked for."""
