"""A split of a dataset together with the cache of its images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .building import build_cache
from .cache import RESIZE, Cache
from .pools import FilePool, ImagesProgress, Pool
from .splits import FOLDER, SplitName, open_split
from .vtab import Stated
from .vtab_tasks import VTAB

RECORDED = ("format", "resize", "small", "interpolation", "key", "images", "bytes", "index_sha256")
"""What a run records of its cache."""


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
    if name != FOLDER:
        return root / "cache"
    return root.resolve().with_name(f"{root.resolve().name}.cache")


def cache_label(name: str, root: Path, part: str) -> str:
    """Return what the names of caches of the training or test images begin with."""
    return f"{root.resolve().name if name == FOLDER else name}-{part}"


def cached_pool(name: str, pool: Pool, resize: int) -> Pool:
    """Return the images as they go into a cache."""
    return pool.squashed(resize) if name in VTAB and isinstance(pool, FilePool) else pool


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
    progress: ImagesProgress | None = None,
) -> CachedSplit:
    """Open a split and the cache of its images, building that if need be.

    train, val and trainval share one cache, whatever the protocol.

    Args:
        name, root, split, protocol, source: as `open_split`.
        cache: folder for caches; None: `default_cache`.
        resize, workers, progress: as `build_cache`; images of VTAB-1k become squares of that side.
    """
    opened = open_split(name, root, split, protocol=protocol, source=source)
    folder = default_cache(name, root) if cache is None else cache
    label, pool = cache_label(name, root, opened.pool_name), cached_pool(name, opened.pool, resize)
    built = build_cache(pool, folder, label, resize=resize, workers=workers, progress=progress)
    record = opened.record | {"cache": {key: built.about[key] for key in RECORDED}}
    return CachedSplit(built, opened.rows, opened.labels, opened.class_names, record)
