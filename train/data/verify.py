"""Compare what is on disk of a dataset with the registry, and decode every image."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ...cli import UsageError
from .pools import FilePool, Pool
from .readers import Listing
from .registry import Dataset
from .splits import DATASETS, NAMES, SplitName, open_split, read_listing
from .vtab_tasks import VTAB

SHOWN = 20
"""Problems of a kind that are listed; further ones are counted."""

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Verification:
    """What was found."""

    name: str
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    """(protocol, split) -> images; the protocols are official and honest, and "every" where they
    do not differ."""

    source: str = ""
    """Of VTAB-1k, what the images are and how that is known."""

    problems: list[str] = field(default_factory=list)
    """One line each; none means that all is well."""


def verify(
    name: str,
    root: Path,
    *,
    images: bool = True,
    expected: Dataset | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare a dataset with the registry.

    Args:
        name: one of `splits.NAMES`; a folder of one's own has no expected counts.
        root: as for `open_split`.
        images: decode every image; else only see that its file is there.
        expected: what to compare with; None: the registry.
        progress: gets images done and all images.

    Returns:
        Counts and problems: splits or classes with another number of images, missing files,
        unreadable images by name. A list that cannot be read is the only problem then.

    Raises:
        UsageError: no such dataset.
    """
    if name not in NAMES:
        raise UsageError(
            f"dataset: got {name!r}, expected one of {', '.join(NAMES)}; check the spelling"
        )
    expected = expected or DATASETS.get(name)
    found = Verification(name)
    try:
        listing = read_listing(name, root)
        for protocol, split in _splits(name):
            opened = open_split(name, root, split, protocol=protocol)
            found.counts[protocol, split] = len(opened.rows)
            if "source" in opened.record:
                found.source = "{kind}: {reason}".format(**opened.record["source"])
    except UsageError as error:
        found.problems.append(str(error))
        return found
    if expected:
        found.problems += _other_counts(found, expected)
    if expected and name not in VTAB:
        # A thousand images need not show every class; labels that are none were refused above.
        found.problems += _other_classes(listing, expected)
    found.problems += _limited(_other_images(listing, images, progress))
    return found


def _splits(name: str) -> list[tuple[str, SplitName]]:
    splits: tuple[SplitName, ...] = ("train", "val", "test")
    if name in VTAB:
        return [("every", split) for split in (*splits, "trainval")]
    return [(protocol, split) for protocol in ("official", "honest") for split in splits]


def _other_counts(found: Verification, expected: Dataset) -> list[str]:
    problems = []
    for (protocol, split), got in found.counts.items():
        counts = expected.official if protocol == "official" else expected.honest
        count = counts["train"] + counts["val"] if split == "trainval" else counts[split]
        if got != count:
            problems.append(f"{split} ({protocol}): got {got:,} images, expected {count:,}")
    return problems


def _other_classes(listing: Listing, expected: Dataset) -> list[str]:
    if len(listing.class_names) != expected.classes:
        return [f"classes: got {len(listing.class_names)}, expected {expected.classes}"]
    problems = []
    for part, per_class in (
        ("train", expected.train_per_class),
        ("test", expected.test_per_class),
    ):
        counts = np.bincount(listing.labels[part], minlength=expected.classes)
        wanted = np.broadcast_to(per_class if per_class else counts, counts.shape)
        for label, (got, count) in enumerate(zip(counts, wanted, strict=True)):
            title = f"class {label} ({listing.class_names[label]})"
            if got != count:
                problems.append(f"{title}: got {got:,} {part} images, expected {count:,}")
            elif not got:
                problems.append(f"{title}: got no {part} images, expected some")
    return _limited(problems)


def _other_images(listing: Listing, decode: bool, progress: Progress | None) -> list[str]:
    total = sum(len(pool) for pool in listing.pools.values())
    problems: list[str] = []
    done = 0
    with ThreadPoolExecutor() as threads:
        for pool in listing.pools.values():
            for problem in threads.map(partial(_fault, pool, decode), range(len(pool))):
                done += 1
                if problem:
                    problems.append(problem)
                if progress:
                    progress(done, total)
    return problems


def _fault(pool: Pool, decode: bool, index: int) -> str:
    """Say what is wrong with an image, or nothing."""
    try:
        if decode:
            pool.load(index)
        elif isinstance(pool, FilePool) and not (pool.folder / pool.names[index]).is_file():
            return f"{pool.name(index)}: got no such file, expected an image"
    except UsageError as error:
        return str(error)
    return ""


def _limited(problems: list[str]) -> list[str]:
    if len(problems) <= SHOWN:
        return problems
    return [*problems[:SHOWN], f"... and {len(problems) - SHOWN:,} more of this kind"]
