"""Bring a dataset to the disk: fetch its archives, check them, unpack them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from ...cli import UsageError
from ..storage import disk_errors
from .archives import BytesProgress, Unreachable, fetch, is_archive, md5_of, unpack
from .registry import Dataset, SourceFile
from .splits import DATASETS, FOLDER, NAMES, require_dataset
from .vtab_tasks import ROOT, VTAB

Report = Callable[[str], None]


def archive_path(name: str, root: Path, source: SourceFile) -> Path:
    """Return where a fetched file is kept, and where a person may put it."""
    # All tasks of VTAB-1k come in one archive.
    return root / "archives" / (ROOT if name in VTAB else name) / source.file


def is_there(root: Path, source: SourceFile) -> bool:
    """Tell whether all that a source brings is unpacked."""
    return all((root / source.folder / name).exists() for name in source.provides)


def prepare(
    name: str,
    root: Path,
    *,
    mirror: str | None = None,
    offline: bool = False,
    report: Report = print,
    progress: BytesProgress | None = None,
) -> None:
    """Fetch and unpack what is missing of a dataset.

    Args:
        name: one of the registry.
        root: the folder of all datasets.
        mirror: address tried before the publishers', as MIRROR/DATASET/FILE; the checksums stay.
        offline: only use archives that are in ROOT/archives/DATASET.
        report: gets a line for each step.
        progress: gets the bytes of each download.

    Raises:
        UsageError: something could not be fetched; lists all of that, with its address, checksum
            and where to put it. Or an archive is broken or has a wrong checksum.
    """
    dataset = _dataset(name)
    archives = archive_path(name, root, dataset.sources[0]).parent
    with disk_errors(archives, "the archives"):
        archives.mkdir(parents=True, exist_ok=True)
        lock = FileLock(archives / ".lock")
        # Another `prepare` of this dataset goes first.
        lock.acquire()
    try:
        _prepare_sources(dataset, root, mirror, offline, report, progress)
        _prepare_splits(dataset, root, mirror, offline, report, progress)
    finally:
        lock.release()


def _prepare_sources(
    dataset: Dataset,
    root: Path,
    mirror: str | None,
    offline: bool,
    report: Report,
    progress: BytesProgress | None,
) -> None:
    missing: list[tuple[SourceFile, str]] = []
    for source in (source for source in dataset.sources if not source.optional):
        if is_there(root, source):
            report(f"{source.file}: its content is there")
            continue
        path = archive_path(dataset.name, root, source)
        if path.exists():
            _require_checksum(path, source)
        else:
            reason = _fetch(dataset, source, path, mirror, offline, report, progress)
            if reason:
                missing.append((source, reason))
                continue
        _put(path, root, source)
        report(f"{source.file}: unpacked to {root / source.folder}")
    if missing:
        raise UsageError(_to_fetch(dataset, root, missing))


def _dataset(name: str) -> Dataset:
    if name == FOLDER:
        raise UsageError(
            "dataset: got 'folder', expected one that has to be fetched; a folder of your own is "
            "used as it is: give it as --data"
        )
    require_dataset(name, [name for name in NAMES if name != FOLDER])
    return DATASETS[name]


def _fetch(
    dataset: Dataset,
    source: SourceFile,
    path: Path,
    mirror: str | None,
    offline: bool,
    report: Report,
    progress: BytesProgress | None,
) -> str:
    """Fetch one file; return why that failed, or nothing."""
    if offline:
        return "offline"
    own = (f"{mirror.rstrip('/')}/{dataset.name}/{source.file}",) if mirror else ()
    urls = (*own, *source.urls)
    if not urls:
        return f"a person has to accept its terms first: {source.terms}"
    report(f"{source.file}: fetching {_amount(source)}")
    try:
        report(f"{source.file}: came from {fetch(urls, path, source.md5, progress)}")
    except Unreachable as error:
        return str(error)
    return ""


def _require_checksum(path: Path, source: SourceFile) -> None:
    if source.md5 and (found := md5_of(path)) != source.md5:
        raise UsageError(
            f"{path}: got MD5 {found}, expected {source.md5}; it is cut off or another file: "
            "remove it and fetch it again"
        )


def _put(path: Path, root: Path, source: SourceFile) -> None:
    """Unpack an archive, or copy a plain file to its place."""
    if is_archive(source.file):
        unpack(path, root / source.folder, source.provides)
        return
    target = root / source.folder / source.provides[0]
    temporary = target.with_name(f".{target.name}.part")
    with disk_errors(target, f"a copy of {path}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, temporary)
        os.replace(temporary, target)


def _to_fetch(dataset: Dataset, root: Path, missing: list[tuple[SourceFile, str]]) -> str:
    """Say what a person has to fetch, from where, and where to put it."""
    lines = [
        f"{dataset.title}: {len(missing)} of its files could not be fetched, expected a connection "
        "or the files themselves; fetch by hand and run the command again:"
    ]
    for source, reason in missing:
        path = archive_path(dataset.name, root, source)
        origin = " or ".join(source.urls) or f"{source.terms} (accept the terms there)"
        checksum = f", MD5 {source.md5}" if source.md5 else ""
        lines.append(f"  {origin}")
        lines.append(f"    put it at {path} ({_amount(source)}{checksum})")
        lines.append(f"    tried: {reason}")
    return "\n".join(lines)


def _amount(source: SourceFile) -> str:
    size = source.size or 0
    if not size:
        return "of unknown size"
    for unit, bytes_of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= bytes_of:
            return f"{size / bytes_of:.1f} {unit}"
    return f"{size} bytes"


def _prepare_splits(
    dataset: Dataset,
    root: Path,
    mirror: str | None,
    offline: bool,
    report: Report,
    progress: BytesProgress | None,
) -> None:
    """Fetch VPT's split files, all of them or none; without them a split of our own serves."""
    sources = [source for source in dataset.sources if source.optional]
    if not sources or all(is_there(root, source) for source in sources):
        return
    paths = [archive_path(dataset.name, root, source) for source in sources]
    for source, path in zip(sources, paths, strict=True):
        reason = ""
        if not path.exists():
            reason = _fetch(dataset, source, path, mirror, offline, report, progress)
        reason = reason or _wrong_split(path, dataset)
        if reason:
            report(
                f"{source.file}: {reason}. VPT's split files are not used; train and val are then "
                f"a split of our own with the same counts. To add them, put them at {path.parent}"
            )
            return
    for source, path in zip(sources, paths, strict=True):
        if not is_there(root, source):
            _put(path, root, source)
    report(f"VPT's split files: copied to {root / dataset.folder}")


def _wrong_split(path: Path, dataset: Dataset) -> str:
    """Say what is wrong with a split file; nobody publishes a checksum of them."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        return f"{path} is not JSON ({error})"
    expected = dataset.official[path.stem]
    if not isinstance(found, dict) or len(found) != expected:
        return f"{path} has {len(found):,} entries instead of {expected:,}"
    return ""
