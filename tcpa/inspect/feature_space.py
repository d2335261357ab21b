"""The feature space that the head reads: how well classes are separated, and a map of it."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import require, require_int, require_number
from ..model import PromptedViT
from .passes import batches, evaluating

MANY = 20_000
"""Points from which on scikit-learn's t-SNE takes too long."""

PERPLEXITY = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """How far apart the classes are."""

    silhouette: float
    """Mean silhouette with Euclidean distance, -1 to 1."""

    knn_accuracy: float
    """Percent of the points whose class most of their `neighbours` nearest other points have."""

    variance_ratio: float
    """Variance between the classes divided by that within them, traces of both scatters."""

    neighbours: int
    points: int
    classes: int


def features(model: PromptedViT, images: Tensor, *, batch_size: int = 64) -> np.ndarray:
    """Return what the classification head reads, float32 `[B, C]`: the class token, or the pool.

    Args:
        model: any model of ours.
        images: float `[B, channels, height, width]`, on any device.
        batch_size: images at once.
    """
    with evaluating(model):
        parts = [
            model.forward_head(model.forward_features(part), pre_logits=True).float().cpu()
            for part in batches(model, images, batch_size)
        ]
    return torch.cat(parts).numpy()


def separation(points: np.ndarray, labels: np.ndarray, *, neighbours: int = 5) -> Separation:
    """Measure how far apart classes are; needs scikit-learn.

    Args:
        points: float `[B, C]`.
        labels: int `[B]`, at least two classes, at least one of them with two points.
        neighbours: k of the k-NN vote, leave-one-out; ties go to the lower label.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    points, labels = _checked(points), np.asarray(labels)
    require(labels.shape == (len(points),), "labels", labels.shape, f"({len(points)},)", "fix it")
    kinds, index = np.unique(labels, return_inverse=True)
    usable, got = 2 <= len(kinds) < len(points), f"{len(kinds)} classes of {len(points)} points"
    require(usable, "labels", got, "two or more classes, fewer than points", "pass more images")
    require_int("neighbours", neighbours, 1, len(points) - 1)
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=neighbours).fit(points)
    # Without an argument: of the points themselves, each without itself.
    nearest = index[search.kneighbors(return_distance=False)]
    votes = np.stack([(nearest == kind).sum(axis=1) for kind in range(len(kinds))], axis=1)
    centres = np.stack([points[index == kind].mean(axis=0) for kind in range(len(kinds))])
    within = float(np.square(points - centres[index]).sum())
    between = float(np.square(centres[index] - points.mean(axis=0)).sum())
    return Separation(
        silhouette=float(silhouette_score(points, index)),
        knn_accuracy=100 * float((votes.argmax(axis=1) == index).mean()),
        variance_ratio=between / within if within > 0 else math.inf,
        neighbours=neighbours,
        points=len(points),
        classes=len(kinds),
    )


def tsne(points: np.ndarray, *, seed: int = 0, perplexity: float = PERPLEXITY) -> np.ndarray:
    """Map points to the plane with t-SNE: scikit-learn, above 20,000 points openTSNE.

    Args:
        points: float `[B, C]`, four or more.
        seed: of the random start.
        perplexity: about the number of neighbours that count; at most (B - 1) / 3 is used.

    Returns:
        float32 `[B, 2]`. Distances and sizes on the map mean little; neighbourhoods do.

    Raises:
        TypeError, ValueError: an argument does not fit.
        ModuleNotFoundError: scikit-learn or openTSNE is not installed.
    """
    points = _checked(points)
    require(len(points) >= 4, "points", len(points), "four or more", "pass more images")
    require_int("seed", seed, 0)
    require_number("perplexity", perplexity, 1.0)
    perplexity = min(perplexity, (len(points) - 1) / 3)
    options: dict[str, Any] = {"perplexity": perplexity, "random_state": seed}
    if len(points) > MANY:
        return np.asarray(_open_tsne(len(points))(**options).fit(points), np.float32)
    from sklearn.manifold import TSNE

    return TSNE(init="pca", **options).fit_transform(points).astype(np.float32)


def _open_tsne(count: int) -> Any:
    try:
        from openTSNE import TSNE  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"points: got {count:,}, more than the {MANY:,} that scikit-learn maps in reasonable "
            "time, and openTSNE is not installed; run: pip install openTSNE, or pass fewer images",
            name="openTSNE",
        ) from None
    return TSNE


def _checked(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points)
    shape, expected = f"shape {points.shape}", "[B, C]"
    require(points.ndim == 2 and points.size > 0, "points", shape, expected, "pass features(...)")
    finite = bool(np.isfinite(points).all())
    require(finite, "points", "NaN or infinity", "finite values", "look for their cause")
    return points.astype(np.float64)
