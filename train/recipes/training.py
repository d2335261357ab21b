"""How something is optimised: what a recipe has besides its model, and the settings of the sources
from which several methods come."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Trainable parameters with settings of their own; each belongs to the first group that names
    it."""

    pattern: str
    """Regular expression that is found in the names of the values."""
    learning_rate: float | None = None
    """Peak of the schedule; None: that of the others."""
    weight_decay: float | None = None
    """None: that of the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Optimiser, schedule and augmentation; the defaults are those of the official TCPA scripts."""

    learning_rate: float
    """Peak of the schedule, see `rate_batch`."""
    weight_decay: float
    """On every trainable parameter, biases and prompts included, but for `groups`."""
    rate_batch: int = 0
    """Batch size for which the learning rate holds; it grows with the batch. 0: for any."""
    optimizer: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    momentum: float = 0.0
    """Of SGD."""
    epsilon: float = 1e-8
    """Of AdamW and Adam."""
    groups: tuple[Group, ...] = ()
    schedule: Literal["cosine", "epoch-cosine", "steps"] = "cosine"
    """"cosine": per step, to 0. "epoch-cosine": per epoch, to 0, the first epoch of a warm-up at
    rate 0 (VPT). "steps": a tenth at each milestone."""
    warmup_fraction: float = 0.2
    """Share of all steps, or epochs, over which the learning rate rises first."""
    milestones: tuple[float, ...] = ()
    """Shares of the training at which "steps" lowers the rate."""
    batch_size: int = 128
    """Images of a step, over all devices."""
    epochs: int = 100
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 0.0
    mix_prob: float = 0.5
    """Share of the batches that are mixed."""
    label_smoothing: float = 0.1
    augment: bool = True
    """Crop at random and mirror; False: the crop of the evaluation."""
    rounds: int = 1
    """Times that the training is done, all together `epochs`: 2 where prompts are pruned in between
    and everything else restarts."""
    learning_rate_grid: tuple[float, ...] = ()
    """What the source searches on validation images, in the units of `learning_rate`."""
    weight_decay_grid: tuple[float, ...] = ()


PLAIN: dict[str, Any] = {"mixup_alpha": 0.0, "mix_prob": 0.0, "label_smoothing": 0.0}
"""No mixing: one label an image."""

SGD_RATES = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
DECAYS = (0.01, 0.001, 0.0001, 0.0)
ADAM_RATES = (0.001, 0.0001, 0.0005, 0.005)
HEAD_BIAS = Group(pattern=r"^backbone\.head(_dist)?\.(\d+\.)?bias$", weight_decay=0.0)


def vpt_sgd(**changes: Any) -> Training:
    """The VPT repository's SGD (KMnP/vpt): a grid of rates for batches of 256, warm-up of 10 of 100
    epochs, cosine per epoch, no weight decay on the head's bias, no mixing."""
    settings: dict[str, Any] = {
        "optimizer": "SGD",
        "momentum": 0.9,
        "learning_rate": 1.0,
        "rate_batch": 256,
        "weight_decay": 0.001,
        "groups": (HEAD_BIAS,),
        "schedule": "epoch-cosine",
        "warmup_fraction": 0.1,
        "learning_rate_grid": SGD_RATES,
        "weight_decay_grid": DECAYS,
        **PLAIN,
    }
    return Training(**settings | changes)


def vpt_adamw(**changes: Any) -> Training:
    """The VPT repository's AdamW, for what trains weights of the backbone or modules in it."""
    settings: dict[str, Any] = {
        "optimizer": "AdamW",
        "learning_rate": 0.001,
        "rate_batch": 256,
        "weight_decay": 0.0001,
        "groups": (HEAD_BIAS,),
        "schedule": "epoch-cosine",
        "warmup_fraction": 0.1,
        "learning_rate_grid": ADAM_RATES,
        "weight_decay_grid": DECAYS,
        **PLAIN,
    }
    return Training(**settings | changes)


def dam_vp_sgd(**changes: Any) -> Training:
    """DAM-VP's head-tuning (shikiw/DAM-VP): SGD, prompts and head with rates of their own, warm-up
    of a fifth and cosine per step, no mixing."""
    settings: dict[str, Any] = {
        "optimizer": "SGD",
        "momentum": 0.9,
        "learning_rate": 1.0,
        "weight_decay": 0.0001,
        "groups": (Group(pattern=r"^backbone\.head", learning_rate=0.1, weight_decay=0.0),),
        "epochs": 50,
        **PLAIN,
    }
    return Training(**settings | changes)
