"""Opening the images of a run: splits under the protocol, their cache, batches on the device."""

from typing import Any

from rich.console import Console
from rich.progress import Progress

from ...cli import UsageError
from ..data.batches import Batches
from ..data.cached import CachedSplit, open_cached
from ..data.crops import Transform
from ..data.splits import SplitName, training_split
from ..options.run import RunConfig
from ..recipes.recipe import Recipe
from .distributed import World
from .inputs import Splits
from .objective import mixes

EVALUATED: dict[str, tuple[SplitName, ...]] = {
    "official": ("test",),
    "val": ("val", "test"),
    "last": ("test",),
    "tune": ("val",),
}
"""Protocol -> splits that it reads besides the training images."""


def load_splits(config: RunConfig, settings: Recipe, world: World) -> Splits:
    """Open the splits that a run needs; images are decoded into the cache the first time.

    Raises:
        UsageError: data are missing or broken, or settings do not fit them.
    """
    train = _open(config, settings, world, training_split(config.dataset, config.protocol))
    shared: dict[str, Any] = {
        "device": world.device,
        "seed": settings.seed,
        "rank": world.rank,
        "world": world.size,
        "resident": config.resident,
    }
    mean, std = config.normalization
    colours: dict[str, Any] = {"crop": settings.crop, "mean": mean, "std": std}
    source = Batches(
        train,
        batch_size=settings.batch_size,
        transform=Transform(train=settings.augment, **colours),
        shuffle=True,
        even=mixes(settings),
        **shared,
    )
    evaluation, record, absent = {}, {"train": train.record}, {}
    for name in EVALUATED[config.protocol]:
        split = _open(config, settings, world, name)
        if len(split.rows) == 0:
            raise UsageError(
                f"DATASET {config.dataset}: got no {name} images, expected some for --protocol "
                f"{config.protocol}; add them, or choose another protocol"
            )
        record[name] = split.record
        if missing := sorted(set(range(split.num_classes)) - set(split.labels.tolist())):
            absent[name] = [split.class_names[label] for label in missing]
        evaluation[name] = Batches(
            split,
            batch_size=config.eval_batch_size or settings.batch_size,
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


def _open(config: RunConfig, settings: Recipe, world: World, split: SplitName) -> CachedSplit:
    """Open a split; a bar shows how far its images are decoded."""
    console = Console(stderr=True)
    hidden = not (world.is_main and console.is_terminal)
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(f"decoding {config.dataset}", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return open_cached(
            config.dataset,
            config.data,
            split,
            protocol=config.protocol,
            source=config.vtab_source,
            cache=config.cache,
            resize=settings.resize,
            progress=show,
        )
