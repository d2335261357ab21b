"""Loading a saved adapter onto its backbone: every check of the files, then their values.

Nothing is unpickled. `adapter.py` says what the two files are and hold, and checks the JSON one.
"""

import os
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import vit
from .adapter import (
    CHOICES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_checksum,
    backbone_dtype,
    backbone_fingerprint,
    choice_of,
    config_of,
    folder_of,
    read_config,
    require_finite,
)
from .build import create_model, require_covered, wrap
from .checks import FLOAT_DTYPES, require, require_bool
from .config import Savings
from .dispatch import Impl
from .methods.base import PromptConfig
from .model import PromptedViT


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    backbone: nn.Module | None = None,
    savings: Savings | None = None,
    impl: Impl = "auto",
    check_backbone: bool = True,
) -> PromptedViT:
    """Load a saved adapter onto its backbone.

    Args:
        directory: folder written by `save_pretrained`.
        backbone: the timm model with the weights that the adapter was trained on; it is taken over.
            When absent, timm creates the model by its saved name with pretrained weights.
        savings, impl: as in `wrap`.
        check_backbone: refuse a backbone whose weights differ from those of the training.

    Returns:
        The model in evaluation mode, bit-equal to the one that was saved. On a backbone of another
        precision (`check_backbone=False`) trainable parameters get the dtypes that `wrap` gives.

    Raises:
        TypeError: `directory` is no path.
        FileNotFoundError: a file is missing.
        ValueError: a file is not ours, damaged, or does not fit the backbone.
        RuntimeError: `backbone` is absent and timm could not load its weights.
    """
    require_bool("check_backbone", check_backbone)
    folder = folder_of(directory)
    saved = read_config(folder / CONFIG_FILE)
    config = config_of(saved, folder / CONFIG_FILE)
    chosen = {name: choice_of(saved, name, folder / CONFIG_FILE) for name in CHOICES}
    tensors = _read_tensors(folder / WEIGHTS_FILE, saved)
    options: dict[str, Any] = {
        **chosen,
        "load_weights": False,
        "num_classes": saved["num_classes"],
        "savings": savings,
        "impl": impl,
        "normalization": (saved["normalization"]["mean"], saved["normalization"]["std"]),
    }
    if backbone is None:
        model = _create_backbone(saved["backbone"], config, options)
        if check_backbone:
            _require_same_backbone(saved["backbone"], model.backbone, chosen)
    else:
        # Before it is taken over, so that one that is refused stays as it is.
        require_covered(backbone)
        if check_backbone:
            _require_same_backbone(saved["backbone"], backbone, chosen)
        model = wrap(backbone, config, **options)
    _fill(model, tensors, folder / WEIGHTS_FILE, keep_dtype=saved["backbone"]["dtype"])
    return model.eval()


def _create_backbone(
    described: dict[str, Any], config: PromptConfig | None, options: dict[str, Any]
) -> PromptedViT:
    """Let timm create the backbone that an adapter names, with its pretrained weights."""
    name, image_size = described["name"], tuple(described["image_size"])
    if not timm.is_model(name):
        raise ValueError(
            f"backbone: got none, and timm does not know {name!r}, on which the adapter was "
            "trained; pass backbone=..."
        )
    if image_size:
        options = options | {"img_size": image_size}
    try:
        return create_model(name, pretrained=True, tcpa=config, **options)
    except Exception as error:  # What a failed download raises differs between versions.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"backbone: got none, and timm could not load {name!r} with pretrained weights "
            f"({reason}); pass backbone=..., the model with the weights of the training"
        ) from error


def _require_same_backbone(
    described: dict[str, Any], backbone: nn.Module, chosen: dict[str, Any]
) -> None:
    """Check settings and frozen weights against those of the training."""
    found = vit.settings(backbone)
    for name, value in described["settings"].items():
        got, remedy = repr(found.get(name)), "create the backbone as for the training, or pass "
        remedy += "check_backbone=False"
        require(found.get(name) == value, f"backbone: {name}", got, repr(value), remedy)
    mapped = getattr(chosen["input_prompt"], "maps_logits", False)
    expected = described["fingerprint"]
    got = backbone_fingerprint(backbone, chosen["tuning"], mapped)
    architecture = described["name"].split(".")[0]
    require(
        got == expected,
        "backbone",
        f"weights {got[:12]}",
        f"{expected[:12]} (the {architecture} on which the adapter was trained)",
        f"load those weights in {described['dtype']}, or pass check_backbone=False",
    )


def _read_tensors(path: Path, saved: dict[str, Any]) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"directory: no {path.name} in {path.parent}; save the adapter again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); save the adapter again") from error
    got, expected = adapter_checksum(tensors, saved), saved["sha256"]
    wanted = f"{expected[:12]} as {CONFIG_FILE} says"
    remedy = "one of the two files was altered or is of another save; save the adapter again"
    require(got == expected, str(path), f"checksum {got[:12]}", wanted, remedy)
    require_finite(str(path), tensors, "load an earlier adapter")
    return tensors


@torch.no_grad()
def _fill(model: PromptedViT, tensors: dict[str, Tensor], path: Path, keep_dtype: str) -> None:
    """Put saved values in place of what training decides.

    They keep their saved dtypes on a backbone of the dtype `keep_dtype`.
    """
    prototypes = tensors.get("input_prompt.prototypes")
    if prototypes is not None:
        require(prototypes.ndim == 2, str(path), "prototypes", "[J, C]", "save the adapter again")
    for name, part in model.fitted_parts().items():
        part.resize_for(tensors, f"{name}.")
    targets = model.trained_tensors()
    missing, unknown = sorted(targets.keys() - tensors), sorted(tensors.keys() - targets)
    fits = not missing and not unknown
    expected = "exactly the trained parameters"
    require(fits, str(path), f"missing {missing}, unknown {unknown}", expected, "check the folder")
    for name, parameter in targets.items():
        value = tensors[name]
        got, shape = f"{name} {list(value.shape)}", f"{list(parameter.shape)}"
        remedy = "use the backbone architecture that the adapter was trained on"
        require(value.shape == parameter.shape, str(path), got, shape, remedy)
        remedy = "save the adapter again"
        if parameter.is_floating_point():
            is_float = value.dtype in FLOAT_DTYPES
            require(is_float, str(path), f"{name} {value.dtype}", "floating point", remedy)
        else:
            fits, expected = value.dtype == parameter.dtype, str(parameter.dtype)
            require(fits, str(path), f"{name} {value.dtype}", expected, remedy)
    same = backbone_dtype(model.backbone) == keep_dtype
    for name, parameter in targets.items():
        dtype = tensors[name].dtype if same else parameter.dtype
        parameter.data = tensors[name].to(parameter.device, dtype)
    for part in model.fitted_parts().values():
        part.find_fitted()
