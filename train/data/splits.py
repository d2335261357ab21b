"""Open a split of a dataset under a protocol: which images, which labels, and by what rule."""

import random
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...checks import did_you_mean
from ...cli import UsageError, require
from .listing import Listing
from .own_folder import read_own
from .pools import FilePool, Pool
from .readers import READERS
from .registry import HTA, Dataset, Rule
from .stratify import held_out
from .vpt import IMAGES, find_splits, read_splits
from .vtab import Stated, read_vtab, source_kind
from .vtab_tasks import LISTS, TASKS, VTAB

FOLDER = "folder"
"""Name of the dataset that is a folder of the user's own."""

DATASETS: Mapping[str, Dataset] = ChainMap(HTA, VTAB)
"""Name -> dataset, those of HTA and the tasks of VTAB-1k."""

NAMES = (*HTA, *VTAB, FOLDER)
SplitName = Literal["train", "val", "test", "trainval"]
OFFICIAL_SEED = 3407
"""Seed of the official code; Python's generator is fresh when it shuffles the training images."""

KEPT = 0.8
"""Share of the training images that the official code trains on, where it cuts them itself."""

VAL_SHARE: dict[Rule, float] = {"given": 0.1, "vpt": 0.1, "first": 0.2, "shuffle": 0.2}
"""Share of the official training images that our own rule holds out."""

OURS = "a hash of their names, stratified; this split is ours, not the authors'"


@dataclass(frozen=True, slots=True)
class OpenedSplit:
    """Images of a pool with labels."""

    dataset: str
    name: SplitName
    pool_name: Literal["train", "test"]
    pool: Pool
    rows: np.ndarray
    """Places in the pool, int64 `[N]`."""

    labels: np.ndarray
    """Classes 0..C - 1, int64 `[N]`."""

    class_names: list[str]
    record: dict[str, Any]
    """How the split was made and what to know about it, for the record of a run."""


def read_listing(name: str, root: Path) -> Listing:
    """Read what is on disk of a dataset.

    Args:
        name: one of `NAMES`.
        root: the folder that has all datasets (`--data`); for "folder" the dataset itself.

    Raises:
        UsageError: unknown name; a file is missing, broken, or has an unknown label.
    """
    require_dataset(name, NAMES)
    if root.exists() and not root.is_dir():
        raise UsageError(f"--data: got the file {root}, expected a folder; give the one it is in")
    if name == FOLDER:
        listing = read_own(root)
    else:
        folder = root / DATASETS[name].folder
        if not folder.is_dir():
            raise UsageError(
                f"{folder}: got no such folder, expected {DATASETS[name].title}; "
                f"run `tcpa-train data prepare {name} --data {root}`"
            )
        if name in TASKS:
            listing = read_vtab(folder, TASKS[name])
        elif name in IMAGES and find_splits(folder):
            listing = read_splits(folder, IMAGES[name], _archive_class_names(name, folder))
        else:
            listing = READERS[name](folder)
    for part, pool in listing.pools.items():
        if not len(pool):
            remedy = "add some" if name == FOLDER else "fetch it again"
            raise UsageError(f"{root}: got no {part} images of {name}, expected some; {remedy}")
    return listing


def require_dataset(name: str, names: Sequence[str]) -> None:
    """Raise UsageError, with the nearest name, unless it is one of `names`."""
    hint = did_you_mean(name, names, "check the spelling")
    require(name in names, "dataset", repr(name), f"one of {', '.join(names)}", hint)


def _archive_class_names(name: str, folder: Path) -> list[str]:
    """Return class names as the archive has them; VPT's files only have ids."""
    try:
        return READERS[name](folder).class_names
    except UsageError:
        # The split files are enough; the lists of the archive may have been left out.
        return []


def training_split(name: str, protocol: str) -> SplitName:
    """Return the split that a protocol trains on.

    A task of VTAB-1k is tuned on 800 images and validated on 200; its final runs see all 1,000.
    """
    return "trainval" if name in VTAB and protocol in ("official", "last") else "train"


def open_split(
    name: str,
    root: Path,
    split: SplitName,
    *,
    protocol: str = "official",
    source: Stated = "auto",
) -> OpenedSplit:
    """Open one split of a dataset.

    Args:
        name: one of `NAMES`.
        root: the folder that has all datasets (`--data`); for "folder" the dataset itself.
        split: "trainval" is all official training images.
        protocol: "official" follows the official code with its leaks and faults (`Rule`); any other
            makes train and val out of the official training images once, without overlap. The
            splits of VTAB-1k are the same under all.
        source: of VTAB-1k, what the images are; "auto" looks at them.

    Raises:
        UsageError: as `read_listing`; "trainval" of the official protocol of HTA, which has none;
            as `source_kind`.
    """
    listing = read_listing(name, root)
    dataset = DATASETS.get(name)
    rule: Rule = dataset.rule if dataset else "given"
    pool_name: Literal["train", "test"] = "test" if split == "test" else "train"
    pool, labels = listing.pools[pool_name], listing.labels[pool_name]
    if name in VTAB:
        rows, told = listing.given.get(split, np.arange(len(pool))), LISTS[split]
    elif split == "test":
        rows = listing.given.get("test", np.arange(len(pool)))
        told = "the official test images"
    elif split == "trainval":
        if protocol == "official":
            raise UsageError(
                "split: got trainval with protocol official, expected train, val or test: there, "
                "train and val may overlap; choose another protocol"
            )
        rows, told = np.arange(len(pool)), "all official training images"
    elif split in listing.given:
        rows = listing.given[split]
        told = "VPT's split files" if listing.from_vpt else "the dataset's own split"
    elif protocol == "official" and rule in ("first", "shuffle"):
        rows, told = _official_rows(len(pool), rule, split)
    else:
        rows, told = _held_out_rows(listing, rule, split)
    labels = labels[rows]
    if protocol == "official" and split in listing.official_labels:
        labels = listing.official_labels[split]
        told += "; labels numbered within this file"
    record = {
        "dataset": name,
        "split": split,
        "protocol": protocol,
        "rule": told,
        "images": len(rows),
        "classes": len(listing.class_names),
    }
    if name in TASKS and isinstance(pool, FilePool):
        record["source"] = asdict(source_kind(pool, TASKS[name], source))
    if dataset is not None:
        expected, classes = expected_images(dataset, split, protocol), len(listing.class_names)
        record["expected_images"] = expected
        record["complete"] = len(rows) == expected and classes == dataset.classes
        if dataset.caution:
            record["caution"] = dataset.caution
    return OpenedSplit(name, split, pool_name, pool, rows, labels, listing.class_names, record)


def _official_rows(count: int, rule: Rule, split: SplitName) -> tuple[np.ndarray, str]:
    """Cut the training images as the official code does."""
    kept = int(KEPT * count)
    part = slice(kept) if split == "train" else slice(kept, None)
    if rule == "first":
        where = "first 80 %" if split == "train" else "last 20 %"
        return np.arange(count)[part], f"{where} of the training images in the order of the file"
    generator = random.Random(OFFICIAL_SEED)
    order = list(range(count))
    generator.shuffle(order)
    if split == "val":
        # The official code reads the files again and lets the same generator go on.
        order = list(range(count))
        generator.shuffle(order)
    told = "first 80 %" if split == "train" else "last 20 % of another shuffle (leak)"
    return np.array(order[part]), f"training images shuffled by seed {OFFICIAL_SEED}, {told}"


def _held_out_rows(listing: Listing, rule: Rule, split: SplitName) -> tuple[np.ndarray, str]:
    """Hold validation images out once, without overlap."""
    pool, share = listing.pools["train"], VAL_SHARE[rule]
    keys = listing.groups or [pool.key(row) for row in range(len(pool))]
    val = held_out(listing.labels["train"], keys, share, OFFICIAL_SEED)
    told = f"{share:.0%} of the training images held out by {OURS}"
    if listing.groups:
        told += "; tracks stay whole"
    return val if split == "val" else np.setdiff1d(np.arange(len(pool)), val), told


def expected_images(dataset: Dataset, split: SplitName, protocol: str) -> int:
    """Return how many images the published dataset has in a split."""
    counts = dataset.official if protocol == "official" else dataset.disjoint
    return counts["train"] + counts["val"] if split == "trainval" else counts[split]
