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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import blocks
from .build import create_model, require_covered, wrap
from .checks import FLOAT_DTYPES, config_from_dict, require, require_bool, require_choice
from .config import TOKEN_PROMPTS, PromptConfig, Savings
from .dispatch import Impl
from .methods.input_config import INPUT_PROMPTS
from .methods.input_prompts import ClusterFramePrompt
from .methods.tuning import backbone_parameters
from .methods.tuning_config import TUNINGS, HeadTuning
from .model import PromptedViT

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT = "tcpa-adapter"
FORMAT_VERSION = 1
METHODS: dict[str, type | None] = {**TOKEN_PROMPTS, "linear": None}
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


def save_pretrained(model: PromptedViT, directory: str | os.PathLike[str]) -> None:
    """Save the trained part of a model.

    Args:
        model: the model.
        directory: folder for the two files; made if absent. Both are written whole before either
            replaces an earlier one, so an earlier adapter survives a failed save.

    Raises:
        TypeError: `model` is not one of ours, or `directory` is no path.
        ValueError: a trained value is NaN or infinite; an earlier adapter stays as it is.
        RuntimeError: another model has taken the backbone over.
        OSError: the folder cannot be written.
    """
    if not isinstance(model, PromptedViT):
        got = type(model).__name__
        raise TypeError(f"model: got {got}, expected what tcpa.wrap returns; unwrap it (.module)")
    model.require_backbone()
    for name, part in (("input_prompt", model.input_prompt), ("mapping", model.mapping)):
        fitted, expected = getattr(part, "fitted", True), "one that was fitted to training images"
        require(fitted, f"model: {name}", "one that was not fitted", expected, "train it first")
    folder = _folder(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"directory: got the file {folder}, expected a folder; rename one")
    tensors = {name: value.detach().cpu() for name, value in model.trained_tensors().items()}
    # Values that share memory would be refused; clones also make views contiguous.
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    _require_finite("model", tensors, "do not save it over a good one; load an earlier adapter")
    record = describe(model)
    text = json.dumps(record | {"sha256": _checksum(tensors, record)}, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    _replace_files(
        {
            folder / WEIGHTS_FILE: lambda path: save_file(tensors, path, {"format": "pt"}),
            folder / CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8"),
        }
    )


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
        "input_prompt": _described(model.input_config, INPUT_PROMPTS),
        "tuning": _described(model.tuning, TUNINGS),
        "num_classes": model.num_classes,
        "backbone": {
            "name": f"{name}.{tag}" if tag else name,
            "image_size": list(backbone.patch_embed.img_size or ()),
            "dtype": _dtype_of(model),
            "settings": blocks.settings(backbone),
            "fingerprint": backbone_fingerprint(backbone, model.tuning, model.mapping is not None),
        },
        "normalization": {"mean": model.normalization.mean, "std": model.normalization.std},
        "versions": {"tcpa": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }


def method_name(config: PromptConfig | None) -> str:
    """Return the name under which a configuration is saved: "tcpa", "vpt" or "linear"."""
    if config is None:
        return "linear"
    return next(name for name, cls in METHODS.items() if cls is type(config))


def _described(config: Any, kinds: Mapping[str, type]) -> dict[str, Any] | None:
    """Return name and values of a configuration, as JSON."""
    if config is None:
        return None
    name = next(name for name, cls in kinds.items() if cls is type(config))
    return {"kind": name, "config": dataclasses.asdict(config)}


def backbone_fingerprint(
    backbone: nn.Module, tuning: HeadTuning | None = None, with_head: bool = False
) -> str:
    """Return the SHA-256 of the frozen weights: names, shapes, dtypes and bytes.

    Weights that `tuning` trains are not part of it; the head is under an output mapping alone.
    """
    heads = {id(p) for h in blocks.classifier_layers(backbone) for p in h.parameters()}
    left_out = set() if with_head else heads
    if tuning is not None:
        left_out |= {id(p) for p in backbone_parameters(tuning, backbone).values()}
    return _checksum({n: p for n, p in backbone.named_parameters() if id(p) not in left_out})


def _checksum(tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> str:
    """Return the SHA-256 of tensors and of what the JSON file says beside it."""
    digest = hashlib.sha256()
    if record is not None:
        rest = {name: value for name, value in record.items() if name != "sha256"}
        digest.update(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()


def _dtype_of(model: PromptedViT) -> str:
    return str(blocks.input_weight(model.backbone).dtype).removeprefix("torch.")


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
        precision (`check_backbone=False`) the trained values are converted to what `wrap` gives it.

    Raises:
        TypeError: `directory` is no path.
        FileNotFoundError: a file is missing.
        ValueError: a file is not ours, damaged, or does not fit the backbone.
        RuntimeError: `backbone` is absent and timm could not load its weights.
    """
    require_bool("check_backbone", check_backbone)
    folder = _folder(directory)
    saved = _read_config(folder / CONFIG_FILE)
    config = _config_of(saved, folder / CONFIG_FILE)
    chosen = {name: _choice_of(saved, name, folder / CONFIG_FILE) for name in CHOICES}
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


def _require_same_backbone(
    described: dict[str, Any], backbone: nn.Module, chosen: dict[str, Any]
) -> None:
    """Check settings and frozen weights against those of the training."""
    found = blocks.settings(backbone)
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


def _folder(directory: object) -> Path:
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise TypeError(f"directory: got {directory!r}, expected a folder's path; name one")
    return Path(os.fsdecode(directory))


def _read_config(path: Path) -> dict[str, Any]:
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


def _config_of(saved: dict[str, Any], path: Path) -> PromptConfig | None:
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


def _choice_of(saved: dict[str, Any], name: str, path: Path) -> Any:
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
    got, expected = _checksum(tensors, saved), saved["sha256"]
    wanted = f"{expected[:12]} as {CONFIG_FILE} says"
    remedy = "one of the two files was altered or is of another save; save the adapter again"
    require(got == expected, str(path), f"checksum {got[:12]}", wanted, remedy)
    _require_finite(str(path), tensors, "load an earlier adapter")
    return tensors


def _require_finite(name: str, tensors: dict[str, Tensor], remedy: str) -> None:
    broken = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    require(not broken, name, f"NaN or infinity in {broken}", "finite values", remedy)


@torch.no_grad()
def _fill(model: PromptedViT, tensors: dict[str, Tensor], path: Path, keep_dtype: str) -> None:
    """Put saved values in place of what training decides.

    They keep their saved dtypes on a backbone of the dtype `keep_dtype`.
    """
    prototypes = tensors.get("input_prompt.prototypes")
    if isinstance(model.input_prompt, ClusterFramePrompt) and prototypes is not None:
        require(prototypes.ndim == 2, str(path), "prototypes", "[J, C]", "save the adapter again")
        model.input_prompt.resize(len(prototypes))
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
    same = _dtype_of(model) == keep_dtype
    for name, parameter in targets.items():
        dtype = tensors[name].dtype if same else parameter.dtype
        parameter.data = tensors[name].to(parameter.device, dtype)
    for part in (model.input_prompt, model.mapping):
        if part is not None and hasattr(part, "find_fitted"):
            part.find_fitted()


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
