"""Saving what was trained: safetensors for the values, JSON for everything else. No pickle.

A saved adapter is a folder of two files: `adapter_config.json` (method, backbone, normalisation,
versions) and `adapter_model.safetensors` (prompts, optional modules, head). The frozen backbone is
not saved, but its fingerprint is, so that an adapter is never put on other weights unnoticed.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import blocks
from .build import create_model, wrap
from .checks import config_from_dict, require, require_choice
from .config import PromptConfig, Savings, TCPAConfig, VPTConfig
from .dispatch import Impl
from .model import PromptedViT

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT = "tcpa-adapter"
FORMAT_VERSION = 1
METHODS: dict[str, type | None] = {"tcpa": TCPAConfig, "vpt": VPTConfig, "linear": None}


def save_pretrained(model: PromptedViT, directory: str | os.PathLike[str]) -> None:
    """Save the trained part of a model.

    Args:
        model: the model.
        directory: folder for the two files; made if absent. Each file is replaced as a whole, so an
            earlier adapter survives a failed save.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: p.detach().cpu() for k, p in model.trainable_named_parameters().items()}
    text = json.dumps(describe(model), indent=2) + "\n"
    # Values that share memory would be refused; clones also make views contiguous.
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    _replace(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, {"format": "pt"}))
    _replace(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def describe(model: PromptedViT) -> dict[str, Any]:
    """Return what `adapter_config.json` says of a model."""
    from . import __version__

    backbone = model.backbone
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    tag = cfg.get("tag")
    name = cfg.get("architecture") or type(backbone).__name__
    config = model.config
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": method_name(config),
        "config": None if config is None else dataclasses.asdict(config),
        "num_classes": model.num_classes,
        "backbone": {
            "name": f"{name}.{tag}" if tag else name,
            "image_size": list(backbone.patch_embed.img_size or ()),
            "fingerprint": backbone_fingerprint(model),
        },
        "normalization": {"mean": model.normalization.mean, "std": model.normalization.std},
        "versions": {"tcpa": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }


def method_name(config: PromptConfig | None) -> str:
    """Return the name under which a configuration is saved: "tcpa", "vpt" or "linear"."""
    if config is None:
        return "linear"
    return next(name for name, cls in METHODS.items() if cls is type(config))


def backbone_fingerprint(model: PromptedViT) -> str:
    """Return the SHA-256 of the frozen weights: names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    heads = {id(p) for h in blocks.classifier_layers(model.backbone) for p in h.parameters()}
    for name, parameter in sorted(model.backbone.named_parameters()):
        if id(parameter) in heads:
            continue
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
        values = parameter.detach().cpu().contiguous()
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
        The model in evaluation mode, bit-equal to the one that was saved.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not ours, damaged, or does not fit the backbone.
    """
    folder = Path(directory)
    saved = _read_config(folder / CONFIG_FILE)
    config = _config_of(saved, folder / CONFIG_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    options: dict[str, Any] = {
        "num_classes": saved["num_classes"],
        "savings": savings,
        "impl": impl,
        "normalization": (saved["normalization"]["mean"], saved["normalization"]["std"]),
    }
    if backbone is None:
        name = saved["backbone"]["name"]
        options["img_size"] = tuple(saved["backbone"]["image_size"])
        model = create_model(name, pretrained=True, tcpa=config, **options)
    else:
        model = wrap(backbone, config, **options)
    if check_backbone:
        expected, got = saved["backbone"]["fingerprint"], backbone_fingerprint(model)
        require(
            got == expected,
            "backbone",
            f"weights {got[:12]}",
            f"{expected[:12]} ({saved['backbone']['name']}, on which the adapter was trained)",
            "load those weights in that precision, or pass check_backbone=False",
        )
    _fill(model, tensors, folder / WEIGHTS_FILE)
    return model.eval()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"directory: no {path.name} in {path.parent}, expected a folder written by "
            "save_pretrained; check the path"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); save the adapter again") from error
    ours = isinstance(saved, dict) and saved.get("format") == FORMAT
    require(ours, str(path), "another program's file", f'"format": "{FORMAT}"', "check the path")
    version = saved.get("format_version")
    require(
        version == FORMAT_VERSION, str(path), f"format {version}", f"{FORMAT_VERSION}", "upgrade"
    )
    needed = {"method", "config", "num_classes", "backbone", "normalization"}
    missing = sorted(needed - saved.keys())
    require(not missing, str(path), f"no {missing}", f"{sorted(needed)}", "save the adapter again")
    return saved


def _config_of(saved: dict[str, Any], path: Path) -> PromptConfig | None:
    require_choice(f"{path}: method", saved["method"], tuple(METHODS))
    cls = METHODS[saved["method"]]
    return None if cls is None else config_from_dict(cls, saved["config"], f"{path}: config")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"directory: no {path.name} in {path.parent}; save the adapter again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); save the adapter again") from error


@torch.no_grad()
def _fill(model: PromptedViT, tensors: dict[str, Tensor], path: Path) -> None:
    """Put saved values in place of the trained parameters, in the saved dtype."""
    targets = model.trainable_named_parameters()
    missing, unknown = sorted(targets.keys() - tensors), sorted(tensors.keys() - targets)
    fits = not missing and not unknown
    expected = "exactly the trained parameters"
    require(fits, str(path), f"missing {missing}, unknown {unknown}", expected, "check the folder")
    for name, parameter in targets.items():
        value = tensors[name]
        got, shape = f"{name} {list(value.shape)}", f"{list(parameter.shape)}"
        remedy = "use the backbone architecture that the adapter was trained on"
        require(value.shape == parameter.shape, str(path), got, shape, remedy)
    for name, parameter in targets.items():
        parameter.data = tensors[name].to(parameter.device)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path`, flush it to disk and move it into place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
