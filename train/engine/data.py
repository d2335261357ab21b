"""The images of a run: splits under the protocol, their cache, batches on the device."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress

from ...cli import UsageError
from ..data.batches import Batches
from ..data.cached import CachedSplit, open_cached
from ..data.crops import Transform
from ..data.splits import SplitName, training_split
from ..recipes.runspec import RunSpec
from .distributed import World


class Source(Protocol):
    """Batches of one split; `tcpa.train.data.batches.Batches` is one."""

    num_images: int

    def __len__(self) -> int:
        """Return the number of batches of an epoch, the same on every process."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch from number `start`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """The images of a run."""

    train: Source
    evaluation: Mapping[str, Source]
    """"test", and "val" where there is one."""
    num_classes: int
    record: Mapping[str, Any]
    """JSON: where the images come from, how they were split, checksums."""
    absent: Mapping[str, list[str]] = field(default_factory=dict)
    """Split -> classes of which it has no image, where there are any."""


EVALUATED: dict[str, tuple[SplitName, ...]] = {
    "official": ("test",),
    "val": ("val", "test"),
    "last": ("test",),
    "tune": ("val",),
}
"""Protocol -> splits that it reads besides the training images."""


def load_splits(spec: RunSpec, world: World) -> Splits:
    """Open the splits that a run needs; images are decoded into the cache the first time.

    Raises:
        UsageError: data are missing or broken, or settings do not fit them.
    """
    train = _open(spec, world, training_split(spec.dataset, spec.protocol))
    shared: dict[str, Any] = {
        "device": world.device,
        "seed": spec.seed,
        "rank": world.rank,
        "world": world.size,
        "resident": spec.resident,
    }
    mean, std = spec.normalization
    colours: dict[str, Any] = {"crop": spec.crop, "mean": mean, "std": std}
    source = Batches(
        train,
        batch_size=spec.batch_size,
        transform=Transform(train=spec.augment, **colours),
        shuffle=True,
        even=spec.mixes,
        **shared,
    )
    evaluation, record, absent = {}, {"train": train.record}, {}
    for name in EVALUATED[spec.protocol]:
        split = _open(spec, world, name)
        if len(split.rows) == 0:
            raise UsageError(
                f"DATASET {spec.dataset}: got no {name} images, expected some for --protocol "
                f"{spec.protocol}; add them, or choose another protocol"
            )
        record[name] = split.record
        if missing := sorted(set(range(split.num_classes)) - set(split.labels.tolist())):
            absent[name] = [split.class_names[label] for label in missing]
        evaluation[name] = Batches(
            split,
            batch_size=spec.eval_batch_size or spec.batch_size,
            transform=Transform(train=False, **colours),
            shuffle=False,
            **shared,
        )
    return Splits(
        train=source,
        evaluation=evaluation,
        num_classes=source.num_classes,
        record=record,
        absent=absent,
    )


def _open(spec: RunSpec, world: World, split: SplitName) -> CachedSplit:
    """Open a split; a bar shows how far its images are decoded."""
    console = Console(stderr=True)
    hidden = not (world.is_main and console.is_terminal)
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(f"decoding {spec.dataset}", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return open_cached(
            spec.dataset,
            spec.data,
            split,
            protocol=spec.protocol,
            source=spec.vtab_source,
            cache=spec.cache,
            resize=spec.resize,
            progress=show,
        )
