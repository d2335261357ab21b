"""Saving what was trained: safetensors for the values, JSON for everything else. No pickle.

`adapter_format.py` says what the two files are and hold, and `loading.py` reads them.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from . import vit
from .adapter_format import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    WEIGHTS_FILE,
    adapter_checksum,
    backbone_dtype,
    backbone_fingerprint,
    folder_of,
    require_finite,
)
from .checks import require
from .methods.base import PromptConfig


def save_pretrained(model: Any, directory: str | os.PathLike[str]) -> None:
    """Save the trained part of a model.

    Args:
        model: what `wrap` returns.
        directory: folder for the two files; made if absent. Both are written whole before either
            replaces an earlier one, so an earlier adapter survives a failed save.

    Raises:
        TypeError: `model` is not one of ours, or `directory` is no path.
        ValueError: a trainable parameter is NaN or infinite; an earlier adapter stays as it is.
        RuntimeError: another model has taken the backbone over.
        OSError: the folder cannot be written.
    """
    # Not by type: the model calls this, and is not to be imported from here.
    if not hasattr(model, "trained_tensors"):
        got = type(model).__name__
        raise TypeError(f"model: got {got}, expected what tcpa.wrap returns; unwrap it (.module)")
    model.require_backbone()
    for name, part in model.fitted_parts().items():
        expected = "one that was fitted to training images"
        require(
            part.fitted, f"model: {name}", "one that was not fitted", expected, "train it first"
        )
    folder = folder_of(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"directory: got the file {folder}, expected a folder; rename one")
    tensors = {name: value.detach().cpu() for name, value in model.trained_tensors().items()}
    # Values that share memory would be refused; clones also make views contiguous.
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    require_finite("model", tensors, "do not save it over a good one; load an earlier adapter")
    record = describe(model)
    text = json.dumps(record | {"sha256": adapter_checksum(tensors, record)}, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    _replace_files(
        {
            folder / WEIGHTS_FILE: lambda path: save_file(tensors, path, {"format": "pt"}),
            folder / CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8"),
        }
    )


def describe(model: Any) -> dict[str, Any]:
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
        "input_prompt": _described(model.input_config),
        "tuning": _described(model.tuning),
        "num_classes": model.num_classes,
        "backbone": {
            "name": f"{name}.{tag}" if tag else name,
            "image_size": list(backbone.patch_embed.img_size or ()),
            "dtype": backbone_dtype(model.backbone),
            "settings": vit.settings(backbone),
            "fingerprint": backbone_fingerprint(backbone, model.tuning, model.mapping is not None),
        },
        "normalization": {"mean": model.normalization.mean, "std": model.normalization.std},
        "versions": {"tcpa": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }


def method_name(config: PromptConfig | None) -> str:
    """Return the name under which a configuration is saved: "tcpa", "vpt" or "linear"."""
    return "linear" if config is None else config.name


def _described(config: Any) -> dict[str, Any] | None:
    """Return name and values of a configuration, as JSON."""
    return None if config is None else {"kind": config.name, "config": dataclasses.asdict(config)}


def _replace_files(writers: dict[Path, Callable[[Path], object]]) -> None:
    """Write files beside their places, flush them to disk, then move all into place."""
    temporary: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(handle)
            temporary[path] = Path(name)
            write(temporary[path])
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
        for path, written in temporary.items():
            os.replace(written, path)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)
