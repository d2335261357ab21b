"""The modules that a model puts on its backbone, made from the three choices."""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import nn

from .. import blocks
from ..checks import require
from ..config import PromptConfig, TCPAConfig, VPTConfig
from ..prompts import PromptPools, TokenPrompts, ValueAffine, make_image_prompt
from .equilibrium import EquilibriumFeaturePrompt, EquilibriumImagePrompt
from .input_config import AutoVPConfig, DAMVPConfig, InputConfig, LIONConfig
from .input_prompts import BorderPrompt, ClusterFramePrompt, FramePrompt, image_size
from .kv_prompts import E2VPTPrompts, GatedPrompts
from .mapping import OutputMapping
from .token_config import E2VPTConfig, GatedPromptConfig
from .tuning import Adapter, SideNetwork
from .tuning_config import (
    TRAINS_BACKBONE,
    AdapterTuning,
    AdaptFormerTuning,
    HeadTuning,
    LastBlockTuning,
    MLPHeadTuning,
    SideTuning,
)


def make_parts(
    backbone: Any,
    config: PromptConfig | None,
    input_prompt: InputConfig | None,
    tuning: HeadTuning,
    normalization: tuple[Sequence[float], Sequence[float]],
    num_classes: int | None,
) -> dict[str, nn.Module | None]:
    """Return modules by their name in the model, in float32 at least, None where there is none.

    Args:
        backbone: the timm model.
        config, input_prompt, tuning: the three choices, see `wrap`.
        normalization: mean and standard deviation of the images.
        num_classes: classes of an output mapping.
    """
    parts: dict[str, nn.Module | None] = dict.fromkeys(
        ("pools", "tokens", "value_affine", "input_prompt", "feature_prompt", "adapters", "side")
    )
    if isinstance(config, TCPAConfig):
        parts["pools"] = PromptPools(config, backbone)
        if config.value_affine:
            parts["value_affine"] = ValueAffine(config.num_prompts, backbone)
    elif isinstance(config, VPTConfig):
        parts["tokens"] = TokenPrompts(config, backbone)
    elif isinstance(config, E2VPTConfig):
        parts["tokens"] = E2VPTPrompts(config, backbone)
    elif isinstance(config, GatedPromptConfig):
        parts["tokens"] = GatedPrompts(config, backbone)
    parts["image_prompt"] = make_image_prompt(config, blocks.input_channels(backbone))
    parts["mapping"] = None
    _add_input_prompt(parts, backbone, input_prompt, normalization, num_classes)
    if isinstance(tuning, AdapterTuning | AdaptFormerTuning):
        made = (Adapter(tuning, backbone.embed_dim) for _ in backbone.blocks)
        parts["adapters"] = nn.ModuleList(made)
    if isinstance(tuning, SideTuning):
        parts["side"] = SideNetwork(backbone.embed_dim)
    weight = blocks.input_weight(backbone)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for module in parts.values():
        if module is not None:
            module.to(device=weight.device, dtype=dtype)
    return parts


def _add_input_prompt(
    parts: dict[str, nn.Module | None],
    backbone: Any,
    config: InputConfig | None,
    normalization: tuple[Sequence[float], Sequence[float]],
    num_classes: int | None,
) -> None:
    if config is None:
        return
    channels, width = blocks.input_channels(backbone), backbone.embed_dim
    if isinstance(config, LIONConfig):
        parts["input_prompt"] = EquilibriumImagePrompt(config, channels)
        parts["feature_prompt"] = EquilibriumFeaturePrompt(config, channels, width)
        return
    size = image_size(backbone)
    if isinstance(config, AutoVPConfig):
        parts["input_prompt"] = BorderPrompt(config, channels, size, normalization)
        if config.maps_logits:
            parts["mapping"] = OutputMapping(config, backbone.num_classes, num_classes or 0)
    elif isinstance(config, DAMVPConfig):
        parts["input_prompt"] = ClusterFramePrompt(config, channels, size, width)
    else:
        parts["input_prompt"] = FramePrompt(config, channels, size)


def require_sensible(
    backbone: Any,
    config: PromptConfig | None,
    input_prompt: InputConfig | None,
    tuning: HeadTuning,
    num_classes: int | None,
) -> None:
    """Refuse what cannot work together.

    Raises:
        TypeError: a choice is of the wrong type.
        ValueError: two choices, or a choice and the backbone, make no sense; the message says why.
    """
    choices: tuple[tuple[str, object, tuple[type, ...]], ...] = (
        ("config", config, get_args(PromptConfig)),
        ("input_prompt", input_prompt, get_args(InputConfig)),
        ("tuning", tuning, (HeadTuning,)),
    )
    for name, value, kinds in choices:
        if value is not None and not isinstance(value, kinds):
            got, expected = type(value).__name__, ", ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{name}: got {got}, expected {expected} or None; create one")
    kind = type(tuning).__name__
    if isinstance(tuning, TRAINS_BACKBONE):
        dtype = blocks.input_weight(backbone).dtype
        exact, remedy = dtype.itemsize >= 4, "convert it with .float() and train under autocast"
        reason = f"a backbone in {dtype} under {kind}"
        require(exact, "tuning", reason, "float32: it trains weights of the backbone", remedy)
        clusters = isinstance(input_prompt, DAMVPConfig)
        reason = "frozen weights: the prototypes of DAM-VP are features of the backbone as it was"
        remedy = "train modules beside it instead (AdapterTuning), or use VPConfig"
        require(not clusters, "tuning", kind, reason, remedy)
    if isinstance(tuning, LastBlockTuning):
        depth = len(backbone.blocks)
        bound, remedy = f"at most {depth}, the blocks of the backbone", "lower it"
        require(tuning.num_blocks <= depth, "tuning: num_blocks", tuning.num_blocks, bound, remedy)
    heads = len(blocks.classifier_layers(backbone))
    needs_feature = isinstance(tuning, SideTuning) or isinstance(input_prompt, LIONConfig)
    reason, remedy = f"a backbone with {heads} heads", "use one with one head"
    require(not needs_feature or heads == 1, "tuning", reason, "one feature to blend", remedy)
    if isinstance(tuning, SideTuning):
        channels, remedy = blocks.input_channels(backbone), "use another tuning"
        fits = channels in (1, 3)
        require(fits, "tuning", f"{channels} channels", "1 or 3, which AlexNet can read", remedy)
    if isinstance(input_prompt, AutoVPConfig) and input_prompt.maps_logits:
        plain = not isinstance(tuning, MLPHeadTuning) and tuning.head == "linear"
        reason = f"HeadTuning(): mapping={input_prompt.mapping!r} keeps the model's own head"
        require(plain, "tuning", f"{kind}(head={tuning.head!r})", reason, "use mapping='head'")
        remedy = "pass num_classes"
        require(bool(num_classes), "num_classes", num_classes, "the classes to map to", remedy)
        require(heads == 1, "mapping", f"a backbone with {heads} heads", "one head", "use head")
