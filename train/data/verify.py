"""Compare what is on disk of a dataset with the registry, and decode every image."""

import glob
import itertools
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from ...cli import UsageError
from ..options.data import VerifyConfig
from .building import cache_key
from .cache import DamagedCache, open_cache
from .cached import cache_label, cached_pool, default_cache
from .listing import Listing
from .pools import FilePool, ImagesProgress, Pool
from .prepare import progress_bar
from .registry import HTA, Dataset
from .splits import (
    DATASETS,
    NAMES,
    SplitName,
    expected_images,
    open_split,
    read_listing,
    require_dataset,
)
from .vtab_tasks import VTAB, tasks_of

SHOWN = 20
"""Problems of a kind that are listed; further ones are counted."""


def run_verify(config: VerifyConfig) -> None:
    """Carry out `tcpa-train data verify`.

    Raises:
        UsageError: something differs; lists what.
    """
    told = []
    for name in tasks_of(config.name):
        try:
            _verify(replace(config, name=name))
        except UsageError as error:
            told.append(str(error))
    if told:
        raise UsageError("\n".join(told))


def _verify(config: VerifyConfig) -> None:
    with progress_bar("images") as show:
        found = verify(
            config.name, config.data, images=config.images, cache=config.cache, progress=show
        )
    for (protocol, split), count in found.counts.items():
        print(f"{config.name} {protocol:8} {split:5} {count:7,} images")
    if found.source:
        print(f"{config.name} source: {found.source}")
    if any(protocol == "disjoint" for protocol, _ in found.counts):
        print(
            "official: train and val as the official code takes them. disjoint: without overlap, "
            "as every other --protocol takes them"
        )
    for line in found.caches:
        print(line)
    told = []
    if found.problems:
        told.append(_listed(_difference(config, len(found.problems)), found.problems))
    if found.damaged:
        count = len(found.damaged)
        told.append(_listed(f"got {count} damaged cache{'s' * (count != 1)}", found.damaged))
    if told:
        raise UsageError("\n".join(told))
    state = "can be decoded" if config.images else "is there"
    known = "" if config.name == "folder" else ", the counts are those of the published dataset"
    print(
        f"{config.name}: each of {found.images:,} images of {found.classes} classes {state}{known}"
    )


def _difference(config: VerifyConfig, count: int) -> str:
    """Say what the problems of a dataset mean, and what to do about them."""
    if config.name == "folder":
        problems = f"{count} problem{'s' * (count != 1)}"
        return (
            f"{config.data}: got {problems}, expected whole images, a folder for every class; mend "
            "or remove what is listed"
        )
    again = shlex.join(["tcpa-train", "data", "prepare", config.name, "--data", f"{config.data}"])
    differences = f"{count} difference{'s' * (count != 1)}"
    return (
        f"{config.data}: got {config.name} with {differences}, expected the published dataset; "
        f"remove what differs and run `{again}`"
    )


def _listed(title: str, lines: list[str]) -> str:
    return "\n  ".join([f"{title}:", *lines])


@dataclass(slots=True)
class Verification:
    """What was found."""

    name: str
    counts: dict[tuple[str, SplitName], int] = field(default_factory=dict)
    """(protocol, split) -> images; the protocols are official and disjoint, and "every" where they
    do not differ."""

    source: str = ""
    """Of VTAB-1k, what the images are and how that is known."""

    problems: list[str] = field(default_factory=list)
    """One line each; none means that all is well."""

    images: int = 0
    classes: int = 0
    caches: list[str] = field(default_factory=list)
    """What is decoded of it, and whether that is still of use: a line for each cache."""

    damaged: list[str] = field(default_factory=list)
    """Caches that are not as they were built: a line each."""


def verify(
    name: str,
    root: Path,
    *,
    images: bool = True,
    cache: Path | None = None,
    progress: ImagesProgress | None = None,
) -> Verification:
    """Compare a dataset with the registry, and its caches with their checksums.

    Args:
        name: one of `splits.NAMES`; a folder of one's own has no expected counts.
        root: as for `open_split`.
        images: decode every image; else only see that its file is there.
        cache: folder for caches; None: `default_cache`.
        progress: gets images done and all images.

    Returns:
        Counts and problems: splits or classes with another number of images, missing files,
        unreadable images by name. A list that cannot be read is the only problem then.

    Raises:
        UsageError: no such dataset.
    """
    require_dataset(name, NAMES)
    expected = DATASETS.get(name)
    found = Verification(name)
    try:
        listing = read_listing(name, root)
        protocols = ("official", "disjoint") if name in HTA else ("every",)
        splits: tuple[SplitName, ...] = ("train", "val", "test")
        if name in VTAB:
            splits += ("trainval",)
        for protocol, split in itertools.product(protocols, splits):
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
    found.images = sum(map(len, listing.pools.values()))
    found.classes = len(listing.class_names)
    found.problems += _limited(_other_images(listing, images, progress))
    folder = default_cache(name, root) if cache is None else cache
    for part, pool in listing.pools.items():
        _look_at_caches(found, folder, cache_label(name, root, part), pool)
    return found


def _look_at_caches(found: Verification, folder: Path, label: str, pool: Pool) -> None:
    """Read the caches of a pool whole; tell those of earlier states of the images."""
    for path in sorted(folder.glob(f"{glob.escape(label)}-*-*")):
        resize, key = path.name.removeprefix(f"{label}-").split("-")[:2]
        if not resize.isdecimal() or not path.is_dir():
            continue
        try:
            opened = open_cache(path)
            opened.check()
        except DamagedCache as error:
            found.damaged.append(f"{error.what}; the next run mends it")
            continue
        size = sum(file.stat().st_size for file in path.glob("*")) / 1e9
        try:
            stamps = cached_pool(found.name, pool, int(resize)).stamps()
        except UsageError:
            # An image is missing, and listed as a problem.
            stamps = []
        state = "as it was built"
        if key != cache_key(stamps, int(resize)):
            remove = shlex.join(["rm", "-r", str(path)])
            state = f"of another state of the images; unless a run still reads it: {remove}"
        found.caches.append(f"{path}: {size:.2f} GB, {state}")


def _other_counts(found: Verification, expected: Dataset) -> list[str]:
    problems = []
    for (protocol, split), got in found.counts.items():
        count = expected_images(expected, split, protocol)
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


def _other_images(listing: Listing, decode: bool, progress: ImagesProgress | None) -> list[str]:
    total = sum(map(len, listing.pools.values()))
    with ThreadPoolExecutor() as threads:
        faults = itertools.chain.from_iterable(
            threads.map(partial(_fault, pool, decode), range(len(pool)))
            for pool in listing.pools.values()
        )
        problems = []
        for done, problem in enumerate(faults, start=1):
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
