"""What is known of a dataset, and the ten of HTA: classes, counts, sources.

Official counts are those of the code of arXiv 2505.02406: VPT's split files for the fine-grained
sets, the dataset's own splits for DTD and Flowers, 80 % of the training images elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Rule = Literal["given", "vpt", "first", "shuffle"]
"""How the official code makes train and val out of the official training images.

given    the dataset's own train and val.
vpt      VPT's JSON files, 90 % and 10 %; without them our own seeded, stratified split.
first    the first 80 % in the order of the file, then the rest.
shuffle  Python's `random`, seed 3407, shuffles; the first 80 %. Val is shuffled anew and overlaps.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
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

    disjoint: dict[str, int]
    """The same under every other protocol."""

    train_per_class: tuple[int, ...] | None = None
    """Official training images (train and val) of each class, one number if all are equal."""

    test_per_class: tuple[int, ...] | None = None
    sources: tuple[SourceFile, ...]
    caution: str = ""
    """What a reader of results should know."""


_VGG = ("https://www.robots.ox.ac.uk/~vgg/data", "https://thor.robots.ox.ac.uk")
_GTSRB = ("https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370",)
_SVHN = ("http://ufldl.stanford.edu/housenumbers",)
_DOGS = ("http://vision.stanford.edu/aditya86/ImageNetDogs",)
_DOG_LISTS = ("train_list.mat", "test_list.mat")
_CIFAR = ("https://www.cs.toronto.edu/~kriz", "https://www.cs.utoronto.ca/~kriz")
_BIRD_FILES = ("images", "images.txt", "image_class_labels.txt", "train_test_split.txt")
_VPT_SPLITS = (
    "https://raw.githubusercontent.com/zhoujiahuan1991/ICML2025-TCPA/"
    "63c986f518e5c9502e02c6f73dbd0ecc8d0d7423/utils/data_json"
)
"""VPT's split files as the official code ships them, pinned to a commit."""


def _dataset(
    name: str, title: str, classes: int, counts: tuple[int, int, int], **settings: Any
) -> Dataset:
    """Return an entry; `counts` are of train, val and test, `disjoint` where those differ."""
    splits: list[str] = ["train", "val", "test"]
    official = dict(zip(splits, counts, strict=True))
    disjoint = dict(zip(splits, settings.pop("disjoint", counts), strict=True))
    return Dataset(
        name=name, title=title, classes=classes, official=official, disjoint=disjoint, **settings
    )


def _source(
    hosts: Sequence[str], file: str, md5: str, size: int, folder: str, *provides: str
) -> SourceFile:
    """Return a file that has the same address on several hosts."""
    name = file.rpartition("/")[2]
    urls = tuple(f"{host}/{file}" for host in hosts)
    return SourceFile(file=name, urls=urls, md5=md5, size=size, folder=folder, provides=provides)


def _vpt_splits(theirs: str, folder: str) -> tuple[SourceFile, ...]:
    return tuple(
        SourceFile(
            file=f"{split}.json",
            urls=(f"{_VPT_SPLITS}/{theirs}/{split}.json",),
            folder=folder,
            provides=(f"{split}.json",),
            optional=True,
        )
        for split in ("train", "val", "test")
    )


def _cifar(classes: int, file: str, md5: str, size: int, inner: str) -> Dataset:
    folder = f"Cifar{classes}"
    return _dataset(
        f"cifar{classes}",
        f"CIFAR-{classes}",
        classes,
        (40_000, 10_000, 10_000),
        folder=folder,
        rule="first",
        train_per_class=(50_000 // classes,),
        test_per_class=(10_000 // classes,),
        sources=(_source(_CIFAR, file, md5, size, folder, inner),),
    )


_ALL = (
    _dataset(
        "dtd",
        "DTD",
        47,
        (1880, 1880, 1880),
        folder="DTD/dtd/dtd",
        rule="given",
        train_per_class=(80,),
        test_per_class=(40,),
        sources=(
            SourceFile(
                file="dtd-r1.0.1.tar.gz",
                urls=(
                    f"{_VGG[0]}/dtd/download/dtd-r1.0.1.tar.gz",
                    f"{_VGG[1]}/dtd/dtd-r1.0.1.tar.gz",
                ),
                md5="fff73e5086ae6bdbea199a49dfb8a4c1",
                size=625_239_812,
                folder="DTD/dtd",
                provides=("dtd/images", "dtd/labels"),
            ),
        ),
    ),
    _dataset(
        "cub",
        "CUB-200-2011",
        200,
        (5394, 600, 5794),
        folder="CUB_200_2011",
        rule="vpt",
        sources=(
            _source(
                ("https://data.caltech.edu/records/65de6-vp158/files",),
                "CUB_200_2011.tgz",
                "97eceeb196236b17998738112f37df78",
                1_150_585_339,
                "",
                *(f"CUB_200_2011/{file}" for file in (*_BIRD_FILES, "classes.txt")),
            ),
            *_vpt_splits("cub", "CUB_200_2011"),
        ),
    ),
    _dataset(
        "nabirds",
        "NABirds",
        555,
        (21_536, 2393, 24_633),
        folder="nabirds",
        rule="vpt",
        sources=(
            SourceFile(
                file="nabirds.tar.gz",
                md5="df21a9e4db349a14e2b08adfd45873bd",
                size=9 * 10**9,
                provides=tuple(f"nabirds/{file}" for file in (*_BIRD_FILES, "classes.txt")),
                terms="https://dl.allaboutbirds.org/nabirds",
            ),
            *_vpt_splits("nabirds", "nabirds"),
        ),
        caution="Under the official protocol the labels of val are shifted: it lacks two classes.",
    ),
    _dataset(
        "stanford_dogs",
        "Stanford Dogs",
        120,
        (10_800, 1200, 8580),
        folder="stanford_dogs",
        rule="vpt",
        train_per_class=(100,),
        sources=(
            *(
                _source(_DOGS, file, md5, size, "stanford_dogs", *provides)
                for file, md5, size, provides in (
                    ("images.tar", "1bb1f2a596ae7057f99d7d75860002ef", 793_579_520, ("Images",)),
                    ("lists.tar", "edbb9f16854ec66506b5f09b583e0656", 481_280, _DOG_LISTS),
                )
            ),
            *_vpt_splits("stanforddogs", "stanford_dogs"),
        ),
        caution="The images are part of ImageNet: a backbone pretrained there has seen them.",
    ),
    _dataset(
        "flower102",
        "Oxford Flowers-102",
        102,
        (1020, 1020, 6149),
        folder="102flowers",
        rule="given",
        train_per_class=(20,),
        sources=tuple(
            _source(_VGG, f"flowers/102/{file}", md5, size, "102flowers", inner)
            for file, inner, md5, size in (
                ("102flowers.tgz", "jpg", "52808999861908f626f3c1f4e79d11fa", 344_862_509),
                ("imagelabels.mat", "imagelabels.mat", "e0620be6f572b9609742df49c70aed4d", 502),
                ("setid.mat", "setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c", 14_989),
            )
        ),
    ),
    _dataset(
        "food101",
        "Food-101",
        101,
        (60_600, 15_150, 25_250),
        folder="Food101/food-101",
        rule="shuffle",
        train_per_class=(750,),
        test_per_class=(250,),
        sources=(
            _source(
                ("http://data.vision.ee.ethz.ch/cvl",),
                "food-101.tar.gz",
                "85eeb15f3717b99a5da872d97d918f87",
                4_996_278_331,
                "Food101",
                "food-101/images",
                "food-101/meta",
            ),
        ),
    ),
    _cifar(
        100,
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        169_001_437,
        "cifar-100-python",
    ),
    _cifar(
        10,
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        170_498_071,
        "cifar-10-batches-py",
    ),
    _dataset(
        "gtsrb",
        "GTSRB",
        43,
        (21_312, 5328, 12_630),
        # 178 of the 888 tracks of 30 images.
        disjoint=(21_300, 5340, 12_630),
        folder="GTSRB/gtsrb",
        rule="shuffle",
        sources=tuple(
            _source(_GTSRB, f"GTSRB{file}.zip", md5, size, "GTSRB/gtsrb", inner)
            for file, md5, size, inner in (
                (
                    "-Training_fixed",
                    "513f3c79a4c5141765e10e952eaa2478",
                    187_490_228,
                    "GTSRB/Training",
                ),
                (
                    "_Final_Test_Images",
                    "c7e4e6327067d32654124b0fe9e82185",
                    88_978_620,
                    "GTSRB/Final_Test/Images",
                ),
                ("_Final_Test_GT", "fe31e9c9270bbcd7b84b7f21a9d9d9e5", 99_620, "GT-final_test.csv"),
            )
        ),
        caution="Images of one physical sign (a track) are in train and in val of the official "
        "protocol; the disjoint split keeps tracks whole.",
    ),
    _dataset(
        "svhn",
        "SVHN",
        10,
        (58_605, 14_652, 26_032),
        folder="SVHN",
        rule="first",
        train_per_class=(4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
        test_per_class=(1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595),
        sources=tuple(
            _source(_SVHN, file, md5, size, "SVHN", file)
            for file, md5, size in (
                ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", 182_040_794),
                ("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", 64_275_384),
            )
        ),
    ),
)

HTA: dict[str, Dataset] = {dataset.name: dataset for dataset in _ALL}
"""Name -> dataset, in the order of the paper's Table 1."""
