"""What the registry says of a dataset: classes, counts, sources, how its labels are read."""

from dataclasses import dataclass
from typing import Literal

GB = 10**9

Rule = Literal["given", "vpt", "first", "shuffle"]
"""How the official code makes train and val out of the official training images.

given    the dataset's own train and val.
vpt      VPT's JSON files, 90 % and 10 %; without them our own seeded, stratified split.
first    the first 80 % in the order of the file, then the rest.
shuffle  Python's `random`, seed 3407, shuffles; the first 80 %. Val is shuffled anew and overlaps.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file to fetch."""

    file: str
    """Its name; it is kept as DATA/archives/DATASET/`file` if it is an archive."""

    urls: tuple[str, ...] = ()
    """Where it is, in the order to try. Empty: it has to be fetched by hand, see `terms`."""

    md5: str | None = None
    """Checksum of the file, where the publisher or long use has fixed one."""

    size: int | None = None
    """Bytes, about; only to tell how much there is to fetch."""

    folder: str = ""
    """Where it is unpacked or put, relative to DATA."""

    provides: tuple[str, ...]
    """What it brings, relative to `folder`; when all of that is there, nothing is fetched."""

    terms: str = ""
    """Page with terms of use that a person has to accept first."""

    optional: bool = False
    """Whether the dataset can be used without it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """One dataset of the registry."""

    name: str
    title: str
    classes: int
    folder: str
    """Its folder, relative to DATA."""

    rule: Rule
    official: dict[str, int]
    """Images of train, val and test under the official protocol."""

    honest: dict[str, int]
    """The same under every other protocol."""

    train_per_class: tuple[int, ...] | None = None
    """Official training images (train and val) of each class, one number if all are equal."""

    test_per_class: tuple[int, ...] | None = None
    sources: tuple[Source, ...]
    labels: str
    """How labels are read."""

    caution: str = ""
    """What a reader of results should know."""
