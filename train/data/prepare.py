"""Bring a dataset to the disk: fetch its archives, check them, unpack them."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ...cli import UsageError
from ..options.data import PrepareConfig
from ..storage import disk_errors
from .archives import BytesProgress, Unreachable, fetch, is_archive, md5_of, unpack
from .registry import Dataset, SourceFile
from .splits import DATASETS, FOLDER, NAMES, require_dataset
from .vtab_tasks import ROOT, VTAB, tasks_of


def run_prepare(config: PrepareConfig) -> None:
    """Carry out `tcpa-train data prepare`.

    Raises:
        UsageError: something could not be fetched or unpacked; says what to do.
    """
    for name in tasks_of(config.name):
        with progress_bar("bytes", transfer=True) as show:
            mirror, offline = config.mirror, config.offline
            prepare(name, config.data, mirror=mirror, offline=offline, progress=show)
    check = shlex.join(["tcpa-train", "data", "verify", config.name, "--data", str(config.data)])
    print(f"{config.name} is in {config.data}; to check it: {check}")


def prepare(
    name: str,
    root: Path,
    *,
    mirror: str | None = None,
    offline: bool = False,
    report: Callable[[str], None] = print,
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
    if name == FOLDER:
        raise UsageError(
            "dataset: got 'folder', expected one that has to be fetched; a folder of your own is "
            "used as it is: give it as --data"
        )
    require_dataset(name, [name for name in NAMES if name != FOLDER])
    # All tasks of VTAB-1k come in one archive.
    archives = root / "archives" / (ROOT if name in VTAB else name)
    with disk_errors(archives, "the archives"):
        archives.mkdir(parents=True, exist_ok=True)
        lock = FileLock(archives / ".lock")
        # Another `prepare` of this dataset goes first.
        lock.acquire()
    try:
        preparation = _Preparation(
            DATASETS[name], root, archives, mirror, offline, report, progress
        )
        preparation.add_required()
        preparation.add_vpt_splits()
    finally:
        lock.release()


@dataclass(frozen=True, slots=True)
class _Preparation:
    dataset: Dataset
    root: Path
    archives: Path
    """Where fetched files are kept, and where a person may put them."""

    mirror: str | None
    offline: bool
    report: Callable[[str], None]
    progress: BytesProgress | None

    def add_required(self) -> None:
        missing: list[tuple[SourceFile, str]] = []
        for source in (source for source in self.dataset.sources if not source.optional):
            if self._is_there(source):
                self.report(f"{source.file}: its content is there")
                continue
            path = self.archives / source.file
            if path.exists():
                _require_checksum(path, source)
            elif reason := self._fetch(source):
                missing.append((source, reason))
                continue
            self._put(source)
            self.report(f"{source.file}: unpacked to {self.root / source.folder}")
        if missing:
            raise UsageError(self._to_fetch(missing))

    def add_vpt_splits(self) -> None:
        """Fetch VPT's split files, all of them or none; without them a split of our own serves."""
        sources = [source for source in self.dataset.sources if source.optional]
        if all(map(self._is_there, sources)):
            return
        for source in sources:
            path = self.archives / source.file
            reason = "" if path.exists() else self._fetch(source)
            if reason := reason or _wrong_split(path, self.dataset):
                self.report(
                    f"{source.file}: {reason}. VPT's split files are not used; train and val are "
                    "then a split of our own with the same counts. To add them, put them at "
                    f"{self.archives}"
                )
                return
        for source in sources:
            if not self._is_there(source):
                self._put(source)
        self.report(f"VPT's split files: copied to {self.root / self.dataset.folder}")

    def _is_there(self, source: SourceFile) -> bool:
        return all((self.root / source.folder / name).exists() for name in source.provides)

    def _fetch(self, source: SourceFile) -> str:
        """Fetch one file; return why that failed, or nothing."""
        if self.offline:
            return "offline"
        mirror = self.mirror and f"{self.mirror.rstrip('/')}/{self.dataset.name}/{source.file}"
        urls = (*((mirror,) if mirror else ()), *source.urls)
        if not urls:
            return f"a person has to accept its terms first: {source.terms}"
        self.report(f"{source.file}: fetching {_amount(source)}")
        try:
            found = fetch(urls, self.archives / source.file, source.md5, self.progress)
        except Unreachable as error:
            return str(error)
        self.report(f"{source.file}: came from {found}")
        return ""

    def _put(self, source: SourceFile) -> None:
        """Unpack an archive, or copy a plain file to its place."""
        path = self.archives / source.file
        if is_archive(source.file):
            unpack(path, self.root / source.folder, source.provides)
            return
        target = self.root / source.folder / source.provides[0]
        temporary = target.with_name(f".{target.name}.part")
        with disk_errors(target, f"a copy of {path}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary)
            os.replace(temporary, target)

    def _to_fetch(self, missing: list[tuple[SourceFile, str]]) -> str:
        """Say what a person has to fetch, from where, and where to put it."""
        lines = [
            f"{self.dataset.title}: {len(missing)} of its files could not be fetched, expected a "
            "connection or the files themselves; fetch by hand and run the command again:"
        ]
        for source, reason in missing:
            origin = " or ".join(source.urls) or f"{source.terms} (accept the terms there)"
            checksum = f", MD5 {source.md5}" if source.md5 else ""
            lines += [
                f"  {origin}",
                f"    put it at {self.archives / source.file} ({_amount(source)}{checksum})",
                f"    tried: {reason}",
            ]
        return "\n".join(lines)


def _require_checksum(path: Path, source: SourceFile) -> None:
    if source.md5 and (found := md5_of(path)) != source.md5:
        raise UsageError(
            f"{path}: got MD5 {found}, expected {source.md5}; it is cut off or another file: "
            "remove it and fetch it again"
        )


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


def _amount(source: SourceFile) -> str:
    size = source.size or 0
    for unit, bytes_of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= bytes_of:
            return f"{size / bytes_of:.1f} {unit}"
    return f"{size} bytes" if size else "of unknown size"


@contextmanager
def progress_bar(title: str, transfer: bool = False) -> Iterator[BytesProgress]:
    """Show progress on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.MofNCompleteColumn(),)
    if transfer:
        columns = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    all_columns = (title, progress.BarColumn(), *columns, progress.TimeRemainingColumn())
    with progress.Progress(*all_columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
