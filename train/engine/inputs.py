"""The images of a run: what the engine needs of the data side."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Source(Protocol):
    """Batches of one split; `tcpa.train.data.Batches` is one."""

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
