"""A split of a dataset together with the cache of its images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .building import build_cache, describe
from .cache import RESIZE, Cache
from .pools import Pool
from .splits import FOLDER, Split, SplitName, open_split
from .squash import SquashedPool
from .unfinished import Progress
from .vtab_source import Stated
from .vtab_tasks import VTAB


@dataclass(frozen=True, slots=True)
class CachedSplit:
    """What `Batches` takes: images decoded once, and which of them with which labels."""

    cache: Cache
    rows: np.ndarray
    """Places in the cache, int64 `[N]`."""

    labels: np.ndarray
    """Classes, int64 `[N]`."""

    class_names: list[str]
    record: dict[str, Any]
    """Rule of the split, counts, checksums: for the record of a run."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def default_cache(name: str, root: Path) -> Path:
    """Return the folder for caches: ROOT/cache, beside and not inside a folder of one's own."""
    return (
        root.resolve().with_name(f"{root.resolve().name}.cache")
        if name == FOLDER
        else root / "cache"
    )


def cache_label(name: str, root: Path, part: str) -> str:
    """Return what the names of caches of the training or test images begin with."""
    return f"{root.resolve().name if name == FOLDER else name}-{part}"


def cached_pool(name: str, pool: Pool, resize: int) -> Pool:
    """Return the images as they go into a cache."""
    return SquashedPool(pool, resize) if name in VTAB else pool


def open_cached(
    name: str,
    root: Path,
    split: SplitName,
    *,
    protocol: str = "official",
    source: Stated = "auto",
    cache: Path | None = None,
    resize: int = RESIZE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CachedSplit:
    """Open a split and the cache of its images, building that if need be.

    train, val and trainval share one cache, whatever the protocol.

    Args:
        name, root, split, protocol, source: as `open_split`.
        cache: folder for caches; None: `default_cache`.
        resize, workers, progress: as `build_cache`; images of VTAB-1k become squares of that side.
    """
    opened: Split = open_split(name, root, split, protocol=protocol, source=source)
    folder = default_cache(name, root) if cache is None else cache
    label, pool = cache_label(name, root, opened.pool_name), cached_pool(name, opened.pool, resize)
    built = build_cache(pool, folder, label, resize=resize, workers=workers, progress=progress)
    record = opened.record | {"cache": describe(built)}
    return CachedSplit(built, opened.rows, opened.labels, opened.class_names, record)
