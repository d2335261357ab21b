"""Frozen backbones: which weights, from where, checked to the last tensor and recorded.

Weights come from timm (the Hugging Face hub or its local cache) or from a local file: safetensors,
a `.pth` state dict as DAM-VP and TCPA use it, or Google's original `.npz`. A file that does not
fill the model exactly is refused: a backbone that is loaded in part trains without a word, badly.
"""

import hashlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from tcpa.adapter import backbone_fingerprint
from tcpa.build import require_covered
from tcpa.checks import did_you_mean

from ..cli import UsageError, require
from . import hub

ALIASES = {
    "orig_in21k": "vit_base_patch16_224.orig_in21k",
    "augreg_in21k": "vit_base_patch16_224.augreg_in21k",
}
"""Short name -> timm name, for the two ImageNet-21k checkpoints of ViT-B/16 that are mixed up."""

UNUSED = ("head.", "fc_norm.", "pre_logits.")
"""Beginnings of names that a file may hold and a backbone without a head does not use: the
classifier of the pretraining and, in the original in21k checkpoint, the layer before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneRecord:
    """Which weights a backbone has."""

    name: str
    """timm name with its tag."""
    weights: str
    """"pretrained", "none" or the name of the file."""
    file_sha256: str | None
    """SHA-256 of the file, where the weights came from one that could be found."""
    fingerprint: str
    """SHA-256 over names, shapes and float32 values of the frozen weights."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON data."""
        return asdict(self)


def model_name(name: str) -> str:
    """Return timm's name of a backbone.

    Raises:
        UsageError: there is no such model.
    """
    full = ALIASES.get(name, name)
    if not timm.is_model(full):
        hint = did_you_mean(full, [*ALIASES, *timm.list_models()], "timm.list_models() lists all")
        raise UsageError(
            f"--backbone: got {name!r}, expected {', '.join(ALIASES)} or a timm model; {hint}"
        )
    return full


def load_backbone(
    name: str, weights: str = "pretrained", *, image_size: int = 224, head: bool = False
) -> tuple[nn.Module, BackboneRecord]:
    """Create a timm model, without a head if not told otherwise, and fill it.

    Args:
        name: `orig_in21k`, `augreg_in21k` or any timm model name.
        weights: "pretrained" (timm's), "none" (random) or a file.
        image_size: side of the images, pixels; positions are resampled where they differ.
        head: keep the model's own head, whose logits are going to be mapped; not from a file.

    Returns:
        The model in float32 and evaluation mode, and what is to be recorded of it.

    Raises:
        UsageError: there is no such model, no such file, no connection, or the file does not fit.
    """
    full = model_name(name)
    from_file = weights not in ("pretrained", "none")
    got, remedy = f"{weights} with --mapping", "use the weights of timm, whose head is known"
    require(not (head and from_file), "--weights", got, "pretrained or none", remedy)
    model = _create(full, image_size, pretrained=weights == "pretrained", head=head)
    patches = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    expected = f"a multiple of the {patches[0]} pixels of a patch of {full}"
    fits = image_size % patches[0] == 0 == image_size % patches[1]
    require(fits, "--image-size", image_size, expected, "change it")
    path = None
    if weights == "pretrained":
        path = hub.cached_file(full)
    elif weights != "none":
        path = Path(weights)
        fill(model, path)
    record = BackboneRecord(
        name=full,
        weights=weights if path is None or weights == "pretrained" else path.name,
        file_sha256=None if path is None else sha256(path),
        fingerprint=backbone_fingerprint(model),
    )
    return model.eval(), record


def _create(name: str, image_size: int, *, pretrained: bool, head: bool) -> nn.Module:
    own = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"pretrained": pretrained} | ({} if head else {"num_classes": 0})
    if own is None or own.input_size[-1] != image_size:
        options["img_size"] = image_size
    if pretrained:
        options |= hub.source(name)
    try:
        return timm.create_model(name, **options)
    except TypeError as error:
        _require_covered(name)
        raise UsageError(
            f"--image-size: timm cannot create {name} for {image_size} pixels ({error}); use its "
            "own size or another --backbone"
        ) from None
    except Exception as error:  # What a failed download raises differs between versions.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not pretrained:
            raise UsageError(
                f"--backbone: timm cannot create {name} for {image_size} pixels ({reason}); change "
                "--image-size or --backbone"
            ) from None
        raise hub.not_loaded(name, reason) from None


def _require_covered(name: str) -> None:
    """Raise UsageError if the architecture is none that prompts can be put on."""
    try:
        require_covered(timm.create_model(name, pretrained=False, num_classes=0))
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix("backbone: ")
        raise UsageError(f"--backbone: got {name}: {reason}") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fill(model: nn.Module, path: Path) -> None:
    """Load a local file into a model without a head: all of it, or an error.

    Args:
        model: a timm ViT; its weights are replaced.
        path: `.safetensors`, `.pth`, `.pt` or `.bin` (a state dict, also under "model" or
            "state_dict"), or Google's `.npz`.

    Raises:
        UsageError: the file is missing, damaged, of another format, holds code, or does not hold
            exactly this model.
    """
    if not path.is_file():
        raise UsageError(
            f"--weights: got {path}, expected pretrained, none or a file; check the path"
        )
    if path.suffix == ".npz":
        _fill_from_npz(model, path)
        return
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    elif path.suffix in (".pth", ".pt", ".bin"):
        state = _read_torch(path)
    else:
        raise UsageError(
            f"--weights: got {path}, expected a file named .safetensors, .pth, .pt, .bin or .npz; "
            "rename or convert it"
        )
    _fill_from_state(model, state, path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"--weights: {path} is damaged ({error}); fetch it again") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            raise UsageError(
                f"--weights: {path} holds more than tensors and is not loaded, because a pickle "
                "can run code; save its state dict alone, as safetensors"
            ) from None
        raise UsageError(
            f"--weights: {path} is damaged or no file of torch.save; fetch it again"
        ) from None
    except Exception as error:  # The parser trips over whatever a damaged file holds.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"--weights: {path} is damaged or no file of torch.save ({reason}); fetch it again"
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = isinstance(content, Mapping) and all(isinstance(v, Tensor) for v in content.values())
    if not tensors or not content:
        raise UsageError(
            f"--weights: {path} holds a {type(content).__name__}, expected a state dict of tensors "
            '(also under "model" or "state_dict"); save that'
        )
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _fill_from_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Let timm rename and resample what it knows, then accept an exact fit only."""
    base: Any = eva if isinstance(model, eva.Eva) else vision_transformer
    try:
        state = base.checkpoint_filter_fn(dict(state), model)
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(
            f"--weights: {path} is no checkpoint of this architecture ({error}); name the right "
            "--backbone"
        ) from None
    targets = model.state_dict()
    state = {n: v for n, v in state.items() if n in targets or not n.startswith(UNUSED)}
    problems = [
        *_listed("missing", sorted(targets.keys() - state.keys())),
        *_listed("unexpected", sorted(state.keys() - targets.keys())),
        *_listed("wrong shapes:", _misfits(state, targets)),
        *_listed("NaN or infinity in", sorted(n for n in state if not _finite(state[n]))),
    ]
    if problems:
        raise _refusal(model, path, problems)
    model.load_state_dict(state)


def _misfits(state: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} {list(state[name].shape)} for {list(target.shape)}"
        for name, target in sorted(targets.items())
        if name in state and state[name].shape != target.shape
    ]


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _fill_from_npz(model: nn.Module, path: Path) -> None:
    """Let timm read Google's names; whatever it leaves unset is found by poisoning it first."""
    blocks = _npz_blocks(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    try:
        # timm does not close what it opens by name.
        with path.open("rb") as file:
            cast(Any, model).load_pretrained(file)
    except KeyError as error:
        raise _refusal(model, path, [f"missing {error.args[0]}"]) from None
    except AttributeError:
        kind = type(model).__name__
        raise UsageError(f"--weights: timm reads no .npz into a {kind}; pass safetensors") from None
    except (RuntimeError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise _refusal(
            model, path, [(str(error) or type(error).__name__).splitlines()[0]]
        ) from None
    unset = [name for name, value in model.named_parameters() if not _finite(value)]
    problems = _listed("missing or not finite:", unset)
    if blocks > len(cast(Any, model).blocks):
        problems.append(f"it has {blocks} blocks")
    if problems:
        raise _refusal(model, path, problems)


def _npz_blocks(path: Path) -> int:
    """Count the blocks of a file; 0 where all blocks are stacked in one array."""
    mark = "Transformer/encoderblock_"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if mark in name]
    except (zipfile.BadZipFile, OSError) as error:
        raise UsageError(f"--weights: {path} is damaged ({error}); fetch it again") from None
    return len({name.partition(mark)[2].partition("/")[0] for name in names})


def _listed(what: str, names: list[str], limit: int = 4) -> list[str]:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return [f"{what} {', '.join(names[:limit])}{more}"] if names else []


def _refusal(model: Any, path: Path, problems: list[str]) -> UsageError:
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "model")
    shape = f"{len(model.blocks)} blocks of width {model.embed_dim}"
    return UsageError(
        f"--weights: {path} does not hold a whole {architecture} ({shape}): {'; '.join(problems)}; "
        "check --backbone, --image-size and the file"
    )
