"""Putting prompts on a timm model: `wrap` for an instance, `create_model` for a name."""

import math
from collections.abc import Sequence
from typing import Any

import timm
from torch import nn

from . import vit
from .checks import require, require_choice, require_int
from .config import Savings
from .dispatch import IMPLS, Impl
from .forward import implementation_on
from .methods.base import Choices, InputConfig, Normalization, PromptConfig, TuningConfig
from .methods.heads import HeadTuning
from .model import PromptedViT


def wrap(
    backbone: nn.Module,
    config: PromptConfig | None,
    *,
    input_prompt: InputConfig | None = None,
    tuning: TuningConfig | None = None,
    num_classes: int | None = None,
    savings: Savings | None = None,
    impl: Impl = "auto",
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    load_weights: bool = True,
) -> PromptedViT:
    """Freeze a timm Vision Transformer and put trained prompts on it.

    The instance is taken over: its weights are frozen, its head is replaced when `num_classes` is
    given, and it stays in evaluation mode. Other instances and timm itself are not touched. A model
    that had the instance before refuses to work from then on.

    Args:
        backbone: a timm `VisionTransformer` or `Eva` model.
        config: token prompts: `TCPAConfig` (TCPA), `VPTConfig` (VPT-Shallow, VPT-Deep, VFPT),
            `E2VPTConfig`, `GatedPromptConfig` or None.
        input_prompt: what is done to the image: `VPConfig`, `DAMVPConfig`, `AutoVPConfig`,
            `LIONConfig` or None.
        tuning: trainable parameters besides prompts: `HeadTuning` (the default; without prompts a
            linear probe), `MLPHeadTuning`, `LastBlockTuning`, `BiasTuning`, `AdapterTuning`,
            `AdaptFormerTuning`, `SideTuning` or `FullTuning`.
        num_classes: classes of a fresh linear head; 0 removes the head, None keeps the model's own.
        savings: work left out without changing the result; all by default.
        impl: implementation of the operations: "auto", "triton", "sdpa", "dense" or "reference".
        normalization: channel mean and standard deviation of the images, for the record; the
            backbone's own by default.
        load_weights: let a side network start from pretrained weights as its configuration says;
            False when its values are going to be replaced.

    Returns:
        A module with `logits = model(images)`.

    Raises:
        TypeError, ValueError: an argument does not fit, choices make no sense together, or the
            architecture is not covered; the message says why.
        RuntimeError: the `impl` that was asked for cannot run where the backbone is, or the weights
            of a side network cannot be had.
    """
    require_covered(backbone)
    tuning = HeadTuning() if tuning is None else tuning
    if savings is not None and not isinstance(savings, Savings):
        raise TypeError(f"savings: got {type(savings).__name__}, expected Savings; create one")
    require_choice("impl", impl, IMPLS)
    if num_classes is not None:
        require_int("num_classes", num_classes, 0)
    record = _normalization(backbone, normalization)
    choices = Choices(config, input_prompt, tuning, num_classes, record)
    choices.validate(backbone)
    if config is not None:
        choices = choices._replace(prompts=config.fit_to(backbone))
    if impl != "auto":
        implementation_on(backbone, impl)
    model = PromptedViT(backbone, choices, savings=savings or Savings(), impl=impl)
    if num_classes is None and tuning.needs_own_head:
        num_classes = model.num_classes
    if num_classes is not None and model.mapping is None:
        model.reset_classifier(num_classes)
    if load_weights:
        tuning.load_pretrained(model)
    model.take_over()
    return model


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    tcpa: PromptConfig | None = None,
    input_prompt: InputConfig | None = None,
    tuning: TuningConfig | None = None,
    savings: Savings | None = None,
    impl: Impl = "auto",
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    load_weights: bool = True,
    **timm_arguments: Any,
) -> PromptedViT:
    """Create a timm model by name and put trained prompts on it.

    Args:
        name: timm model name, with or without a weight tag.
        pretrained: load timm's weights.
        num_classes: as in `wrap`.
        tcpa: the token prompts; None for none.
        input_prompt, tuning, savings, impl, normalization, load_weights: as in `wrap`.
        timm_arguments: passed to `timm.create_model` (`img_size`, `checkpoint_path`, ...).

    Raises:
        TypeError: an argument is of the wrong type or unknown.
        ValueError: timm does not know the model, cannot create it, or it is not covered.
    """
    if "config" in timm_arguments:
        raise TypeError("config: got it, expected the prompt method as `tcpa`; pass tcpa=...")
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, expected a timm model name; pass a str")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:3] if name else []
        hint = f"did you mean one of {near}?" if near else "timm.list_models() lists them"
        raise ValueError(f"name: got {name!r}, expected a timm model; {hint}")
    try:
        backbone = timm.create_model(name, pretrained=pretrained, **timm_arguments)
    except (RuntimeError, TypeError, OSError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in timm_arguments.items())
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"name: timm cannot create {name!r} with {given or 'no further arguments'} ({reason}); "
            "check the weight tag, the arguments and the paths in them"
        ) from error
    return wrap(
        backbone,
        tcpa,
        input_prompt=input_prompt,
        tuning=tuning,
        num_classes=num_classes,
        savings=savings,
        impl=impl,
        normalization=normalization,
        load_weights=load_weights,
    )


def require_covered(backbone: nn.Module) -> None:
    """Raise TypeError or ValueError unless prompts can be put on a model."""
    if isinstance(backbone, PromptedViT):
        raise ValueError("backbone: got a wrapped model, expected a timm model; wrap it only once")
    if not isinstance(backbone, nn.Module):
        got = type(backbone).__name__
        raise TypeError(f"backbone: got {got}, expected a timm model; see timm.create_model")
    reason = vit.unsupported_reason(backbone)
    if reason is not None:
        raise ValueError(f"backbone: {reason}; use one of timm's {vit.SUPPORTED}")


def _normalization(
    backbone: Any, given: tuple[Sequence[float], Sequence[float]] | None
) -> Normalization:
    channels = vit.input_channels(backbone)
    expected = f"(mean, std) with {channels} means and {channels} positive standard deviations"
    if given is None:
        cfg = getattr(backbone, "pretrained_cfg", None) or {}
        own = (cfg.get("mean", (0.5,) * channels), cfg.get("std", (0.5,) * channels))
        fits = [len(values) for values in own] == [channels, channels]
        got = f"nothing, and the backbone's own is for {len(own[0])} channels: {own}"
        require(fits, "normalization", got, expected, "pass what your images are normalised with")
        given = own
    try:
        mean, std = (tuple(float(v) for v in values) for values in given)
    except (TypeError, ValueError):
        raise TypeError(
            f"normalization: got {given!r}, expected {expected}; pass two tuples of numbers"
        ) from None
    fits = len(mean) == len(std) == channels and all(map(math.isfinite, mean))
    fits = fits and all(0 < s < math.inf for s in std)
    require(fits, "normalization", given, expected, "pass (mean, std)")
    return Normalization(mean, std)
