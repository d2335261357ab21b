"""Every number of an inspection, by `tcpa.inspect`; and as JSON."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from tcpa import inspect

from ...cli import UsageError
from ..options.inspect import InspectConfig
from .images import ImageSet
from .subjects import Subject

DIVERSITY_IMAGES = 32
"""Images whose attention matrices are decomposed."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class QueryToken:
    """A token whose attention is drawn."""

    name: str
    token: int
    place: tuple[int, int] | None
    """Row and column of a patch; None for the class token."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class ModelSelection:
    """What the tokens of one model select."""

    found: inspect.Selections
    image: inspect.Usage
    cls: inspect.Usage
    overlap: inspect.Overlap
    epochs: list[float]
    """Of the states that are compared, the last one included."""
    changes: list[inspect.Change]
    """Of each state but the last, against the last."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class ModelMeasures:
    """Everything about one model."""

    name: str
    selected: ModelSelection | None
    no_selection: str
    """Why there is none; "" where there is."""
    maps: inspect.AttentionMaps
    """Of the images that are shown, in one block."""
    shares: np.ndarray
    """`[N, 3]`: of the queries' first, over prefix tokens, patches, prompts; mean of images and
    heads."""
    features: np.ndarray
    map2d: np.ndarray | None
    separation: inspect.Separation | None
    diversity: inspect.Diversity


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Inspection:
    """What the page shows."""

    subjects: Sequence[Subject]
    measured: Sequence[ModelMeasures]
    images: ImageSet
    shown: list[int]
    """Images with maps."""
    queries: list[QueryToken]
    block: int
    """Whose attention is drawn, from 0."""
    head: int | None
    backbone: str
    seed: int
    diversity_images: int


def choose_shown(images: ImageSet, count: int) -> list[int]:
    """Choose images to look at: of different classes where there are some, spread evenly."""
    total = len(images.names)
    if images.labels is None:
        return sorted({round(place) for place in np.linspace(0, total - 1, min(count, total))})
    first = [int(np.flatnonzero(images.labels == kind)[0]) for kind in np.unique(images.labels)]
    spread = np.linspace(0, len(first) - 1, min(count, len(first)))
    chosen = [first[round(place)] for place in spread]
    others = [place for place in range(total) if place not in chosen]
    return chosen + others[: count - len(chosen)]


def choose_queries(
    subject: Subject, images: ImageSet, places: Sequence[tuple[int, int]]
) -> list[QueryToken]:
    """Choose tokens: the class token where there is one, and patches.

    Raises:
        UsageError: a patch is not there.
    """
    rows, columns = inspect.patch_grid(subject.model, images.images)
    found = []
    if getattr(subject.model.backbone, "cls_token", None) is not None:
        found.append(QueryToken(name="class token", token=0, place=None))
    for row, column in places or ((rows // 2, columns // 2), (rows // 4, columns // 4)):
        if row >= rows or column >= columns:
            raise UsageError(
                f"--patches: got {row},{column}, expected ROW,COLUMN up to {rows - 1},"
                f"{columns - 1}; images have {rows} x {columns} patches"
            )
        token = inspect.patch_token(subject.model, images.images, row, column)
        if token not in [query.token for query in found]:
            name = f"patch in row {row}, column {column}"
            found.append(QueryToken(name=name, token=token, place=(row, column)))
    return found


def _choose_numbers(subject: Subject, config: InspectConfig) -> tuple[int, int | None]:
    """Return block and head from 0.

    Raises:
        UsageError: the model does not have so many.
    """
    blocks: Any = subject.model.backbone.blocks
    block, head = config.block or len(blocks), config.head
    for option, value, most in (
        ("--block", block, len(blocks)),
        ("--head", head or 1, blocks[0].attn.num_heads),
    ):
        if value > most:
            raise UsageError(f"{option}: got {value}, expected 1 to {most}; choose another")
    return block - 1, None if head is None else head - 1


def measure(
    subjects: Sequence[Subject],
    images: ImageSet,
    config: InspectConfig,
    *,
    backbone: str,
    say: Callable[[str], None],
) -> Inspection:
    """Measure all models on the same images.

    Raises:
        UsageError: an option does not fit the models.
    """
    block, head = _choose_numbers(subjects[0], config)
    queries = choose_queries(subjects[0], images, config.patch_places())
    shown, few = choose_shown(images, config.show), choose_shown(images, DIVERSITY_IMAGES)
    options: dict[str, Any] = {"batch_size": config.batch_size}
    tokens = [query.token for query in queries]
    measured = []
    for subject in subjects:
        say(f"measuring {subject.name} on {len(images.names):,} images")
        model = subject.model
        maps = inspect.attention_maps(
            model, images.images[shown], queries=tokens, head=head, **options
        )
        features = inspect.features(model, images.images, **options)
        selected, reason = _select(subject, images, options)
        measured.append(
            ModelMeasures(
                name=subject.name,
                selected=selected,
                no_selection=reason,
                maps=maps,
                shares=maps.shares()[:, :, :, 0].mean(axis=(1, 2)),
                features=features,
                map2d=inspect.tsne(features, seed=config.seed) if len(features) >= 4 else None,
                separation=_separate(features, images.labels),
                diversity=inspect.diversity(model, images.images[few], **options),
            )
        )
    return Inspection(
        subjects=subjects,
        measured=measured,
        images=images,
        shown=shown,
        queries=queries,
        block=block,
        head=head,
        backbone=backbone,
        seed=config.seed,
        diversity_images=len(few),
    )


def _separate(features: np.ndarray, labels: np.ndarray | None) -> inspect.Separation | None:
    if labels is None or not 2 <= len(np.unique(labels)) < len(features):
        return None
    return inspect.separation(features, labels, neighbours=min(5, len(features) - 1))


def _select(
    subject: Subject, images: ImageSet, options: dict[str, int]
) -> tuple[ModelSelection | None, str]:
    """Return what tokens select, or why they select nothing."""
    reason = inspect.why_nothing_is_selected(subject.model)
    if reason is not None:
        return None, reason
    found = inspect.selections(subject.model, images.images, **options)
    if found.image.shape[-1] == 0 or found.image.shape[2] < 2:
        return None, "its patches choose among no prompts"
    states = list(subject.states)
    before = [inspect.selections(state.model, images.images, **options) for state in states]
    changes = [inspect.change(state, before[-1]) for state in before[:-1]]
    selected = ModelSelection(
        found=found,
        image=inspect.usage(found),
        cls=inspect.usage(found, "cls"),
        overlap=inspect.overlap(found),
        epochs=[state.epoch for state in states],
        changes=changes,
    )
    return selected, ""


def to_json(found: Inspection) -> dict[str, Any]:
    """Return all the numbers as JSON data; infinity becomes null."""
    images = found.images
    return {
        "backbone": found.backbone,
        "seed": found.seed,
        "images": {
            "origin": images.origin,
            "names": images.names,
            "labels": _plain(images.labels),
            "classes": images.class_names,
            "skipped": [{"name": name, "reason": reason} for name, reason in images.skipped],
            "left_out": images.left_out,
            "shown": [images.names[place] for place in found.shown],
        },
        "attention_of": {
            "block": found.block + 1,
            "head": None if found.head is None else found.head + 1,
            "queries": [query.name for query in found.queries],
        },
        "models": [
            _model_json(subject, of_model, found)
            for subject, of_model in zip(found.subjects, found.measured, strict=True)
        ],
    }


def _model_json(subject: Subject, of_model: ModelMeasures, found: Inspection) -> dict[str, Any]:
    maps = of_model.maps
    chosen = maps.weights[found.block]
    order = [maps.queries.index(query.token) for query in found.queries]
    selected = of_model.selected
    return {
        "name": subject.name,
        "source": subject.source,
        "accuracy_percent": subject.accuracy,
        "trained_values": subject.model.num_trainable,
        "selection": None
        if selected is None
        else {
            "image_pool": _plain(selected.image),
            "cls_pool": _plain(selected.cls),
            "overlap": _plain(selected.overlap),
            "epochs": selected.epochs,
            "change_to_the_last": _plain(selected.changes),
            "shown_images_top_k": _plain(selected.found.image[:, found.shown]),
        },
        "no_selection": of_model.no_selection or None,
        "attention_of_shown_images": _plain(chosen[:, :, order]),
        "attention_shares": {
            "columns": ["prefix tokens", "patches", "prompts"],
            "blocks": _plain(of_model.shares),
        },
        "tsne": _plain(of_model.map2d),
        "separation": _plain(of_model.separation),
        "diversity": {
            field.name: {"mean": _plain(values.mean(axis=1)), "std": _plain(values.std(axis=1))}
            for field in fields(of_model.diversity)
            for values in [getattr(of_model.diversity, field.name)]
        }
        | {"images": found.diversity_images},
    }


def _plain(value: Any) -> Any:
    """Turn records and arrays into JSON data; floats to seven digits."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.7g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
