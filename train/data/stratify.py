"""Hold a share of the images out, the same share of every class, the same images everywhere."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np


def held_out(labels: np.ndarray, keys: Sequence[str], share: float, seed: int = 0) -> np.ndarray:
    """Return the rows to hold out, sorted, int64.

    Within a class the images with the smallest SHA-256 of "seed/key" are taken: no random number
    generator and no order of files has a hand in it. Images with one key stay together. The number
    held out is `share` of all, rounded up; classes get theirs by the largest remainder, and every
    class keeps at least one key.

    Args:
        labels: classes, int64 `[N]`.
        keys: a name for each image that is the same on every machine.
        share: between 0 and 1.
        seed: another one gives another choice.
    """
    members: list[dict[str, list[int]]] = []
    for label in range(int(labels.max()) + 1):
        of_class: dict[str, list[int]] = {}
        for row in np.flatnonzero(labels == label).tolist():
            of_class.setdefault(keys[row], []).append(row)
        members.append(of_class)
    sizes = [len(of_class) for of_class in members]
    # The small step down: 0.2 * 50_000 must not become 10_001.
    total = math.ceil(share * sum(sizes) - 1e-9)
    chosen = [
        row
        for of_class, count in zip(members, _quotas(sizes, share, total), strict=True)
        for key in sorted(of_class, key=lambda key: _rank(key, seed))[:count]
        for row in of_class[key]
    ]
    return np.array(sorted(chosen), np.int64)


def _quotas(sizes: list[int], share: float, total: int) -> list[int]:
    """Distribute `total` over classes by the largest remainder; none is emptied."""
    quotas = [min(math.floor(share * size + 1e-9), max(size - 1, 0)) for size in sizes]
    order = sorted(range(len(sizes)), key=lambda c: (quotas[c] - share * sizes[c], c))
    for label in order:
        if sum(quotas) >= total:
            break
        quotas[label] += quotas[label] < sizes[label] - 1
    return quotas


def _rank(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()
