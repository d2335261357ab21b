"""The models that are compared: adapters of runs on their backbone, and the backbone by itself."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tcpa
from tcpa import vit
from tcpa.adapter import CONFIG_FILE

from ...cli import UsageError
from ..backbones import ALIASES, load_backbone
from ..demo import backbone as demo
from ..engine.checkpoint import CURRENT, PREVIOUS, read_checkpoint
from ..engine.rundir import ADAPTER, CONFIG
from ..report.runs import SIGNS, finished_result, read_runs
from ..storage import read_json

BARE = "no prompt"
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierModel:
    """The model of a subject at another time."""

    epoch: float
    """Epochs trained."""
    model: tcpa.PromptedViT


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One model."""

    name: str
    """As on the page."""
    source: str
    """Where it comes from."""
    model: tcpa.PromptedViT
    """In float32, in evaluation mode."""
    states: Sequence[EarlierModel] = field(default=())
    """Earlier states, in order; the last may be the model itself."""
    accuracy: float | None = None
    """Percent, on images that were not trained on, where it is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundAdapter:
    """A folder with an adapter, and what its configuration says of the backbone."""

    folder: Path
    run: Path | None
    backbone: dict[str, Any]
    tuning: Any
    mapped: bool
    """Whether the backbone keeps its own head, whose logits are mapped."""

    @property
    def name(self) -> str:
        """Name of the backbone."""
        return str(self.backbone["name"])


def find_adapter(path: Path, option: str = "RUNS") -> FoundAdapter:
    """Find the adapter of a finished run, or the one that a folder holds, or raise UsageError."""
    if (path / CONFIG_FILE).is_file():
        return _read_adapter(path, None, option)
    inside = sorted(file.parent for file in path.glob(f"*/{CONFIG_FILE}"))
    if any((path / name).exists() for name in SIGNS) and path.name != "demo_output":
        if (path / ADAPTER / CONFIG_FILE).is_file() and finished_result(path) is not None:
            return _read_adapter(path / ADAPTER, path, option)
        if not inside or (path / ADAPTER) in inside:
            _, problems = read_runs([path])
            reason = problems[0].text if problems else f"it has no {ADAPTER}"
            raise UsageError(
                f"{option}: got {path}, expected a finished run; {reason}. Finish it first, or "
                "name an adapter that was saved from it"
            )
    hint = f"did you mean {inside[0]}?" if inside else "name such a folder"
    raise UsageError(
        f"{option}: got {path}, expected the folder of a finished run or of an adapter "
        f"({CONFIG_FILE}); {hint}"
    )


def _read_adapter(folder: Path, run: Path | None, option: str) -> FoundAdapter:
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        prompt = content.get("input_prompt") or {"config": {}}
        backbone = content["backbone"]
        parts = {"name", "image_size", "settings", "fingerprint"}
        if not parts <= backbone.keys() or backbone["dtype"] not in DTYPES:
            raise KeyError("backbone")
        mapped = prompt["config"].get("mapping", "head") != "head"
        tuning = content.get("tuning")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{option}: {folder / CONFIG_FILE} is not what tcpa saves ({error}); save the adapter "
            "again"
        ) from None
    return FoundAdapter(folder=folder, run=run, backbone=backbone, tuning=tuning, mapped=mapped)


def require_one_backbone(adapters: Sequence[FoundAdapter]) -> None:
    """Refuse adapters of different backbones with a UsageError that names both."""
    first = adapters[0]
    for other in adapters[1:]:
        same = other.name == first.name and all(
            other.backbone[part] == first.backbone[part] for part in ("image_size", "settings")
        )
        # The fingerprint covers what is frozen, in the precision in which it is stored.
        comparable = other.backbone["dtype"] == first.backbone["dtype"]
        if comparable and other.tuning == first.tuning:
            same = same and other.backbone["fingerprint"] == first.backbone["fingerprint"]
        if not same:
            raise UsageError(
                f"RUNS: got {other.folder}, an adapter for {_described(other)}, expected one for "
                f"{_described(first)}, as {first.folder}; inspect it by itself"
            )


def _described(adapter: FoundAdapter) -> str:
    size = "x".join(map(str, adapter.backbone["image_size"])) or "any size"
    return f"{adapter.name} at {size} (weights {str(adapter.backbone['fingerprint'])[:12]})"


class Backbones:
    """Creates fresh copies of the one backbone of an inspection."""

    def __init__(
        self, name: str | None, weights: str | None, adapters: Sequence[FoundAdapter]
    ) -> None:
        adapter = adapters[0]
        self.name = name or adapter.name
        size = adapter.backbone["image_size"]
        if name == "demo" or (name is None and _is_demo(adapter)):
            self.name, self._model = "the demo's ViT", demo.load_backbone()
            return
        try:
            options: dict[str, Any] = {"image_size": int(size[0])} if size else {}
            options["head"] = any(adapter.mapped for adapter in adapters)
            weights, seed = (weights, None) if weights else _weights_of(adapter)
            if seed is not None:
                torch.manual_seed(seed)
            self._model, _ = load_backbone(self.name, weights, **options)
        except UsageError as error:
            raise UsageError(f"{error} (the adapter is for {_described(adapter)})") from None
        self.name = ALIASES.get(self.name, self.name)

    def fresh(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a copy that nobody has taken over."""
        return copy.deepcopy(self._model).to(dtype)

    def load(self, adapter: FoundAdapter, option: str = "RUNS") -> tcpa.PromptedViT:
        """Put an adapter on a copy that computes in float32, or raise UsageError."""
        dtype = getattr(torch, adapter.backbone["dtype"])
        try:
            model = tcpa.from_pretrained(adapter.folder, backbone=self.fresh(dtype))
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            text = str(error)
            if text.startswith("backbone"):
                raise UsageError(
                    f"{option}: got {adapter.folder}, an adapter for {_described(adapter)}, "
                    f"expected one for {self.name}, which was loaded ({text.partition(';')[0]}); "
                    "name its own with --backbone and --weights"
                ) from None
            raise UsageError(f"{option}: {text}") from None
        return model.float().eval()


def _weights_of(adapter: FoundAdapter) -> tuple[str, int | None]:
    """Return the weights with which a run was trained, and the seed of random ones."""
    config = read_json(adapter.run / CONFIG) if adapter.run else None
    if not isinstance(config, dict):
        return "pretrained", None
    weights, seed = config["options"]["weights"], config["recipe"]["seed"]
    if weights not in ("pretrained", "none"):
        raise UsageError(f"--weights: got none, expected the file {weights} of the run; pass it")
    return weights, seed if weights == "none" else None


def _is_demo(adapter: FoundAdapter) -> bool:
    own = demo.load_backbone()
    settings = json.loads(json.dumps(vit.settings(own)))
    return adapter.name == type(own).__name__ and adapter.backbone["settings"] == settings


def load_subjects(
    runs: Sequence[Path], checkpoints: Sequence[Path], backbone: str | None, weights: str | None
) -> tuple[list[Subject], str]:
    """Load runs and adapters, and the bare backbone after them; return its name, too.

    Raises:
        UsageError: one cannot be had, or they are of different backbones.
    """
    adapters = [find_adapter(path) for path in runs]
    earlier = [find_adapter(path, "--checkpoints") for path in checkpoints]
    require_one_backbone([*adapters, *earlier])
    backbones = Backbones(backbone, weights, [*adapters, *earlier])
    models = [backbones.load(adapter) for adapter in adapters]
    states = [
        EarlierModel(epoch=number, model=backbones.load(found, "--checkpoints"))
        for number, found in enumerate(earlier, 1)
    ] or _kept(adapters[0], backbones)
    subjects = []
    for name, adapter, model in zip(_names(adapters, models), adapters, models, strict=True):
        result = finished_result(adapter.run) if adapter.run else None
        subjects.append(
            Subject(
                name=name,
                source=str(adapter.run or adapter.folder),
                model=model,
                states=() if subjects else states,
                accuracy=None if result is None else result["accuracy"],
            )
        )
    mean, std = models[0].normalization
    bare = tcpa.wrap(backbones.fresh(), None, normalization=(mean, std)).eval()
    return [*subjects, Subject(name=BARE, source="the backbone", model=bare)], backbones.name


def _kept(adapter: FoundAdapter, backbones: Backbones) -> list[EarlierModel]:
    """Return the states that a run kept as checkpoints, oldest first."""
    found = []
    for name in (PREVIOUS, CURRENT) if adapter.run else ():
        path = Path(adapter.run or "") / name
        checkpoint = read_checkpoint(path) if path.exists() else ""
        if isinstance(checkpoint, str):
            continue
        model = backbones.load(adapter)
        values = {
            key.removeprefix("model/"): value
            for key, value in checkpoint.tensors.items()
            if key.startswith("model/")
        }
        named = model.trainable_named_parameters()
        if any(n not in values or values[n].shape != p.shape for n, p in named.items()):
            continue
        with torch.no_grad():
            for key, parameter in named.items():
                parameter.copy_(values[key])
        found.append(EarlierModel(epoch=float(checkpoint.state["epoch"]), model=model))
    # Equal epochs: the run was saved in the middle of one, and once more.
    return list({state.epoch: state for state in reversed(found)}.values())[::-1]


def _names(adapters: Sequence[FoundAdapter], models: Sequence[tcpa.PromptedViT]) -> list[str]:
    """Name models by their method, and by their folder too where two have the same."""
    methods = [method_name(model) for model in models]
    named = []
    for adapter, method in zip(adapters, methods, strict=True):
        folder = adapter.run or adapter.folder
        repeated = methods.count(method) > 1
        named.append(f"{method} ({folder.name})" if repeated else method)
    if len(set(named)) < len(named):
        named = [f"{name}, no. {place}" for place, name in enumerate(named, start=1)]
    return named


def method_name(model: tcpa.PromptedViT) -> str:
    """Return a short name of what was put on the backbone."""
    others = (model.input_config, model.tuning)
    extra = [part.label for part in others if part is not None and part.name != "head"]
    if extra and model.config is None:
        return " + ".join(extra)
    return " + ".join([model.config.label if model.config else "linear probe", *extra])
