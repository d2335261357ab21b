"""`tcpa-train data prepare` and `tcpa-train data verify`. Imports nothing heavy."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from ...cli import UsageError
from ..options.run import Positional
from .vtab_tasks import ALL_TASKS, TASKS


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Fetch a dataset, check it and unpack it; what is there already is not fetched again."""

    name: Annotated[str, Positional]
    """dtd, cub, nabirds, stanford_dogs, flower102, food101, cifar100, cifar10, gtsrb, svhn, a task
    of VTAB-1k (vtab-dtd for instance), or vtab for all tasks, which come in one archive."""

    data: Path = Path("data")
    """Folder of all datasets. Archives are kept in its folder archives/NAME; what you put there
    yourself is used."""

    mirror: str | None = None
    """Address to try first, as MIRROR/NAME/FILE; checksums are compared all the same."""

    offline: bool = False
    """Fetch nothing, only unpack what is in archives/NAME; tells what is missing there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Count a dataset's images per split and class, compare with the registry, decode each."""

    name: Annotated[str, Positional]
    """Name of the dataset, as for prepare; or folder, for a folder of your own."""

    data: Path = Path("data")
    """Folder of all datasets; for folder, that folder itself."""

    cache: Path | None = None
    """Folder for decoded images, which are compared with their checksums; as for `run`."""

    images: bool = True
    """Decode every image; without it only see that the files are there."""


def run_prepare(config: PrepareConfig) -> None:
    """Carry out `tcpa-train data prepare`.

    Raises:
        UsageError: something could not be fetched or unpacked; says what to do.
    """
    from .prepare import prepare

    for name in _names(config.name):
        with _bar("bytes", transfer=True) as show:
            prepare(
                name,
                config.data,
                mirror=config.mirror,
                offline=config.offline,
                progress=lambda done, total, show=show: show(done, total),
            )
    check = shlex.join(["tcpa-train", "data", "verify", config.name, "--data", str(config.data)])
    print(f"{config.name} is in {config.data}; to check it: {check}")


def run_verify(config: VerifyConfig) -> None:
    """Carry out `tcpa-train data verify`.

    Raises:
        UsageError: something differs; lists what.
    """
    told = []
    for name in _names(config.name):
        try:
            _verify(replace(config, name=name))
        except UsageError as error:
            told.append(str(error))
    if told:
        raise UsageError("\n".join(told))


def _names(name: str) -> tuple[str, ...]:
    """Return the datasets that a name stands for."""
    return tuple(TASKS) if name == ALL_TASKS else (name,)


def _verify(config: VerifyConfig) -> None:
    from .verify import verify

    with _bar("images") as show:
        found = verify(
            config.name, config.data, images=config.images, cache=config.cache, progress=show
        )
    for (protocol, split), count in found.counts.items():
        print(f"{config.name} {protocol:8} {split:5} {count:7,} images")
    if found.source:
        print(f"{config.name} source: {found.source}")
    if any(protocol == "honest" for protocol, _ in found.counts):
        print(
            "official: train and val as the official code takes them. honest: without overlap, as "
            "every other --protocol takes them"
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


@contextmanager
def _bar(title: str, transfer: bool = False) -> Iterator[Callable[[int, int | None], None]]:
    """Show progress on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (DownloadColumn(), TransferSpeedColumn()) if transfer else (MofNCompleteColumn(),)
    console = Console(stderr=True)
    with Progress(title, BarColumn(), *columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
