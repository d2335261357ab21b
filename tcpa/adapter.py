"""A saved adapter: its two files, what they hold, how they are written and checked. No pickle.

An adapter is a folder of `adapter_config.json` (method, backbone, normalisation, versions) and
`adapter_model.safetensors` (prompts, optional modules, head). The frozen backbone is not in it, but
its fingerprint is, so that an adapter is never put on other weights unnoticed. `loading.py` puts an
adapter on its backbone.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import vit
from .checks import config_from_dict, require, require_choice
from .methods import INPUT_PROMPTS, TOKEN_PROMPTS, TUNINGS
from .methods.base import PromptConfig, TuningConfig
from .provenance import __version__

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT = "tcpa-adapter"
FORMAT_VERSION = 1
METHODS: dict[str, type[PromptConfig] | None] = {**TOKEN_PROMPTS, "linear": None}
CHOICES: dict[str, dict[str, Any]] = {"input_prompt": INPUT_PROMPTS, "tuning": TUNINGS}
"""Fields of an adapter that has such a choice beside its token prompts; each holds the name of its
kind and its configuration."""
SCHEMA: dict[str, Any] = {
    "method": str,
    "config": (dict, type(None)),
    "num_classes": int,
    "sha256": str,
    "backbone": {
        "name": str,
        "image_size": list,
        "dtype": str,
        "settings": dict,
        "fingerprint": str,
    },
    "normalization": {"mean": list, "std": list},
}
"""What `adapter_config.json` must hold, and of which type."""


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
    # The model calls this and is not to be imported from here. Asked of the class: wrappers of
    # torch.compile and FSDP hand on what they lack themselves.
    if not hasattr(type(model), "trained_tensors"):
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


def folder_of(directory: object) -> Path:
    """Return the folder that a caller named; a TypeError says what else came."""
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise TypeError(f"directory: got {directory!r}, expected a folder's path; name one")
    return Path(os.fsdecode(directory))


def read_config(path: Path) -> dict[str, Any]:
    """Return what `adapter_config.json` says, every field there and of its type.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not where an adapter has it.
        ValueError: it is not ours, of another version, or damaged.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"directory: no {path.name} in {path.parent}, expected a folder written by "
            "save_pretrained; check the path"
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{path}: got a folder, expected a file; check the path") from None
    except NotADirectoryError:
        raise NotADirectoryError(
            f"directory: got the file {path.parent}, expected a folder written by "
            "save_pretrained; pass the folder that holds it"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); save the adapter again") from error
    ours = isinstance(saved, dict) and saved.get("format") == FORMAT
    require(ours, str(path), "another program's file", f'"format": "{FORMAT}"', "check the path")
    version = saved.get("format_version")
    require(
        version == FORMAT_VERSION, str(path), f"format {version}", f"{FORMAT_VERSION}", "upgrade"
    )
    _check_fields(saved, SCHEMA, f"{path}: ")
    for part, name in (
        ("backbone", "image_size"),
        ("normalization", "mean"),
        ("normalization", "std"),
    ):
        values = saved[part][name]
        numbers = all(type(v) in (int, float) for v in values)
        got, remedy = json.dumps(values), "save the adapter again"
        require(numbers, f"{path}: {part}.{name}", got, "a list of numbers", remedy)
    return saved


def _check_fields(values: dict[str, Any], schema: dict[str, Any], where: str) -> None:
    """Check that every field of a schema is there and has its type."""
    remedy = "save the adapter again"
    missing = sorted(schema.keys() - values.keys())
    require(not missing, f"{where}fields", f"none named {missing}", f"{sorted(schema)}", remedy)
    for name, kind in schema.items():
        value = values[name]
        if isinstance(kind, dict):
            kinds: tuple[type, ...] = (dict,)
        else:
            kinds = kind if isinstance(kind, tuple) else (kind,)
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        words = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        require(fits, f"{where}{name}", json.dumps(value), words, remedy)
        if isinstance(kind, dict):
            _check_fields(values[name], kind, f"{where}{name}.")


def config_of(saved: dict[str, Any], path: Path) -> PromptConfig | None:
    """Return the configuration of the token prompts; None for a linear probe."""
    require_choice(f"{path}: method", saved["method"], tuple(METHODS))
    cls, values = METHODS[saved["method"]], saved["config"]
    if cls is None:
        got, remedy = json.dumps(values), "save the adapter again"
        require(values is None, f"{path}: config", got, "null for a linear probe", remedy)
        return None
    try:
        return config_from_dict(cls, values, "config")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def choice_of(saved: dict[str, Any], name: str, path: Path) -> Any:
    """Return the configuration of a choice; None where an adapter does not have it."""
    found, remedy = saved.get(name), "save the adapter again"
    if found is None:
        return None
    where = f"{path}: {name}"
    fits = isinstance(found, dict) and found.keys() == {"kind", "config"}
    require(fits, where, json.dumps(found), "an object with kind and config", remedy)
    require_choice(f"{where}: kind", found["kind"], tuple(CHOICES[name]))
    try:
        return config_from_dict(CHOICES[name][found["kind"]], found["config"], "config")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def backbone_fingerprint(
    backbone: nn.Module, tuning: TuningConfig | None = None, with_head: bool = False
) -> str:
    """Return the SHA-256 of the frozen weights: names, shapes, dtypes and bytes.

    Weights that `tuning` trains are not part of it; the head is under an output mapping alone.
    """
    heads = {id(p) for h in vit.classifier_layers(backbone) for p in h.parameters()}
    left_out = set() if with_head else heads
    if tuning is not None:
        left_out |= {id(p) for p in tuning.backbone_parameters(backbone).values()}
    return checksum({n: p for n, p in backbone.named_parameters() if id(p) not in left_out})


def backbone_dtype(backbone: nn.Module) -> str:
    """Return the name of the dtype of a backbone's weights, such as "float32"."""
    return str(vit.input_weight(backbone).dtype).removeprefix("torch.")


def adapter_checksum(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of tensors and of what the JSON file says beside it."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return checksum(tensors, json.dumps(rest, sort_keys=True))


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return the SHA-256 of a text and of names, shapes, dtypes and bytes of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()


def require_finite(name: str, tensors: dict[str, Tensor], remedy: str) -> None:
    """Raise a ValueError that names the tensors with NaN or infinity, if any."""
    broken = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    require(not broken, name, f"NaN or infinity in {broken}", "finite values", remedy)
