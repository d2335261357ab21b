"""What `data prepare` and `data verify` can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .run import Positional


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
