"""What is known of a dataset, and the ten of HTA: classes, counts, sources, how labels are read.

Official counts are those of the code of arXiv 2505.02406: VPT's split files for the fine-grained
sets, the dataset's own splits for DTD and Flowers, 80 % of the training images elsewhere.
"""

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


OFFICIAL_REPOSITORY = (
    "https://raw.githubusercontent.com/zhoujiahuan1991/ICML2025-TCPA/"
    "63c986f518e5c9502e02c6f73dbd0ecc8d0d7423/utils/data_json"
)
"""VPT's split files as the official code ships them, pinned to a commit."""


def _vpt_splits(theirs: str, folder: str) -> tuple[Source, ...]:
    return tuple(
        Source(
            file=f"{split}.json",
            urls=(f"{OFFICIAL_REPOSITORY}/{theirs}/{split}.json",),
            folder=folder,
            provides=(f"{split}.json",),
            optional=True,
        )
        for split in ("train", "val", "test")
    )


def _counts(train: int, val: int, test: int) -> dict[str, int]:
    return {"train": train, "val": val, "test": test}


_VGG = ("https://www.robots.ox.ac.uk/~vgg/data", "https://thor.robots.ox.ac.uk")
_GTSRB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
_SVHN = "http://ufldl.stanford.edu/housenumbers"
_DOGS = "http://vision.stanford.edu/aditya86/ImageNetDogs"
_BIRD_FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def _cifar(classes: int, folder: str, archive: str, md5: str, size: int, inner: str) -> Dataset:
    return Dataset(
        name=f"cifar{classes}",
        title=f"CIFAR-{classes}",
        classes=classes,
        folder=folder,
        rule="first",
        official=_counts(40_000, 10_000, 10_000),
        honest=_counts(40_000, 10_000, 10_000),
        train_per_class=(50_000 // classes,),
        test_per_class=(10_000 // classes,),
        sources=(
            Source(
                file=archive,
                urls=(
                    f"https://www.cs.toronto.edu/~kriz/{archive}",
                    f"https://www.cs.utoronto.ca/~kriz/{archive}",
                ),
                md5=md5,
                size=size,
                folder=folder,
                provides=(inner,),
            ),
        ),
        labels="labels" if classes == 10 else "fine_labels",
    )


_ALL = (
    Dataset(
        name="dtd",
        title="DTD",
        classes=47,
        folder="DTD/dtd/dtd",
        rule="given",
        official=_counts(1880, 1880, 1880),
        honest=_counts(1880, 1880, 1880),
        train_per_class=(80,),
        test_per_class=(40,),
        sources=(
            Source(
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
        labels="folder names of partition 1, sorted",
    ),
    Dataset(
        name="cub",
        title="CUB-200-2011",
        classes=200,
        folder="CUB_200_2011",
        rule="vpt",
        official=_counts(5394, 600, 5794),
        honest=_counts(5394, 600, 5794),
        sources=(
            Source(
                file="CUB_200_2011.tgz",
                urls=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",),
                md5="97eceeb196236b17998738112f37df78",
                size=1_150_585_339,
                provides=tuple(f"CUB_200_2011/{file}" for file in ("images", *_BIRD_FILES)),
            ),
            *_vpt_splits("cub", "CUB_200_2011"),
        ),
        labels="image_class_labels.txt, or the values of VPT's JSON files",
    ),
    Dataset(
        name="nabirds",
        title="NABirds",
        classes=555,
        folder="nabirds",
        rule="vpt",
        official=_counts(21_536, 2393, 24_633),
        honest=_counts(21_536, 2393, 24_633),
        sources=(
            Source(
                file="nabirds.tar.gz",
                md5="df21a9e4db349a14e2b08adfd45873bd",
                size=9 * GB,
                provides=tuple(f"nabirds/{file}" for file in ("images", *_BIRD_FILES)),
                terms="https://dl.allaboutbirds.org/nabirds",
            ),
            *_vpt_splits("nabirds", "nabirds"),
        ),
        labels="image_class_labels.txt, or the values of VPT's JSON files; ids are not contiguous",
        caution="Under the official protocol the labels of val are shifted: it lacks two classes.",
    ),
    Dataset(
        name="stanford_dogs",
        title="Stanford Dogs",
        classes=120,
        folder="stanford_dogs",
        rule="vpt",
        official=_counts(10_800, 1200, 8580),
        honest=_counts(10_800, 1200, 8580),
        train_per_class=(100,),
        sources=(
            Source(
                file="images.tar",
                urls=(f"{_DOGS}/images.tar",),
                md5="1bb1f2a596ae7057f99d7d75860002ef",
                size=793_579_520,
                folder="stanford_dogs",
                provides=("Images",),
            ),
            Source(
                file="lists.tar",
                urls=(f"{_DOGS}/lists.tar",),
                md5="edbb9f16854ec66506b5f09b583e0656",
                size=481_280,
                folder="stanford_dogs",
                provides=("train_list.mat", "test_list.mat"),
            ),
            *_vpt_splits("stanforddogs", "stanford_dogs"),
        ),
        labels="train_list.mat and test_list.mat, or the values of VPT's JSON files",
        caution="The images are part of ImageNet: a backbone pretrained there has seen them.",
    ),
    Dataset(
        name="flower102",
        title="Oxford Flowers-102",
        classes=102,
        folder="102flowers",
        rule="given",
        official=_counts(1020, 1020, 6149),
        honest=_counts(1020, 1020, 6149),
        train_per_class=(20,),
        sources=(
            Source(
                file="102flowers.tgz",
                urls=tuple(f"{host}/flowers/102/102flowers.tgz" for host in _VGG),
                md5="52808999861908f626f3c1f4e79d11fa",
                size=344_862_509,
                folder="102flowers",
                provides=("jpg",),
            ),
            Source(
                file="imagelabels.mat",
                urls=tuple(f"{host}/flowers/102/imagelabels.mat" for host in _VGG),
                md5="e0620be6f572b9609742df49c70aed4d",
                size=502,
                folder="102flowers",
                provides=("imagelabels.mat",),
            ),
            Source(
                file="setid.mat",
                urls=tuple(f"{host}/flowers/102/setid.mat" for host in _VGG),
                md5="a5357ecc9cb78c4bef273ce3793fc85c",
                size=14_989,
                folder="102flowers",
                provides=("setid.mat",),
            ),
        ),
        labels="imagelabels.mat and setid.mat",
    ),
    Dataset(
        name="food101",
        title="Food-101",
        classes=101,
        folder="Food101/food-101",
        rule="shuffle",
        official=_counts(60_600, 15_150, 25_250),
        honest=_counts(60_600, 15_150, 25_250),
        train_per_class=(750,),
        test_per_class=(250,),
        sources=(
            Source(
                file="food-101.tar.gz",
                urls=("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",),
                md5="85eeb15f3717b99a5da872d97d918f87",
                size=4_996_278_331,
                folder="Food101",
                provides=("food-101/images", "food-101/meta"),
            ),
        ),
        labels="classes of meta/train.json, sorted",
    ),
    _cifar(
        100,
        "Cifar100",
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        169_001_437,
        "cifar-100-python",
    ),
    _cifar(
        10,
        "Cifar10",
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        170_498_071,
        "cifar-10-batches-py",
    ),
    Dataset(
        name="gtsrb",
        title="GTSRB",
        classes=43,
        folder="GTSRB/gtsrb",
        rule="shuffle",
        official=_counts(21_312, 5328, 12_630),
        # 178 of the 888 tracks of 30 images.
        honest=_counts(21_300, 5340, 12_630),
        sources=(
            Source(
                file="GTSRB-Training_fixed.zip",
                urls=(f"{_GTSRB}/GTSRB-Training_fixed.zip",),
                md5="513f3c79a4c5141765e10e952eaa2478",
                size=187_490_228,
                folder="GTSRB/gtsrb",
                provides=("GTSRB/Training",),
            ),
            Source(
                file="GTSRB_Final_Test_Images.zip",
                urls=(f"{_GTSRB}/GTSRB_Final_Test_Images.zip",),
                md5="c7e4e6327067d32654124b0fe9e82185",
                size=88_978_620,
                folder="GTSRB/gtsrb",
                provides=("GTSRB/Final_Test/Images",),
            ),
            Source(
                file="GTSRB_Final_Test_GT.zip",
                urls=(f"{_GTSRB}/GTSRB_Final_Test_GT.zip",),
                md5="fe31e9c9270bbcd7b84b7f21a9d9d9e5",
                size=99_620,
                folder="GTSRB/gtsrb",
                provides=("GT-final_test.csv",),
            ),
        ),
        labels="folder names; GT-final_test.csv",
        caution="Images of one physical sign (a track) are in train and in val of the official "
        "protocol; the honest split keeps tracks whole.",
    ),
    Dataset(
        name="svhn",
        title="SVHN",
        classes=10,
        folder="SVHN",
        rule="first",
        official=_counts(58_605, 14_652, 26_032),
        honest=_counts(58_605, 14_652, 26_032),
        train_per_class=(4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
        test_per_class=(1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595),
        sources=tuple(
            Source(
                file=file,
                urls=(f"{_SVHN}/{file}",),
                md5=md5,
                size=size,
                folder="SVHN",
                provides=(file,),
            )
            for file, md5, size in (
                ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", 182_040_794),
                ("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", 64_275_384),
            )
        ),
        labels="y of the .mat files, 10 means digit 0",
    ),
)

HTA: dict[str, Dataset] = {dataset.name: dataset for dataset in _ALL}
"""Name -> dataset, in the order of the paper's Table 1."""
