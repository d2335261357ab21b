"""The nineteen tasks of VTAB-1k as data: groups, classes, counts, and where the images come from.

The benchmark takes 800 training and 200 validation images of each task and its whole test split
(Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation
Benchmark", 2019). The folder read here is the copy that circulates without TensorFlow:
`vtab-1k/TASK/` with `images/` and four lists of `path label`.
"""

from dataclasses import dataclass
from typing import Literal

from ..config import VTAB_PREFIX
from .registry import GB, Dataset, Source

GroupName = Literal["natural", "specialized", "structured"]

SEEDS = (42, 44, 82, 100, 800)
"""Seeds of VPT's five final runs of a task."""

ROOT = "vtab-1k"
"""Folder of all tasks, relative to DATA."""

ALL_TASKS = "vtab"
"""Name that stands for all tasks."""

LISTS = {
    "train": "train800.txt",
    "val": "val200.txt",
    "trainval": "train800val200.txt",
    "test": "test.txt",
}
"""Split -> its list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is particular to one task."""

    title: str
    group: GroupName
    folder: str
    """Its folder in `ROOT`."""

    classes: int
    test: int
    """Test images."""

    lossless: bool
    """Whether the originals are stored without loss (TensorFlow Datasets' format), so that a JPEG
    file cannot be one of them."""


def _task(
    title: str, group: GroupName, folder: str, classes: int, test: int, *, lossless: bool = False
) -> Task:
    return Task(
        title=title, group=group, folder=folder, classes=classes, test=test, lossless=lossless
    )


TASKS: dict[str, Task] = {
    f"{VTAB_PREFIX}{name}": task
    for name, task in {
        "cifar100": _task("CIFAR-100", "natural", "cifar", 100, 10_000, lossless=True),
        "caltech101": _task("Caltech101", "natural", "caltech101", 102, 6084),
        "dtd": _task("DTD", "natural", "dtd", 47, 1880),
        "flowers102": _task("Flowers102", "natural", "oxford_flowers102", 102, 6149),
        "pets": _task("Pets", "natural", "oxford_iiit_pet", 37, 3669),
        "svhn": _task("SVHN", "natural", "svhn", 10, 26_032, lossless=True),
        "sun397": _task("Sun397", "natural", "sun397", 397, 21_750),
        "camelyon": _task("Camelyon", "specialized", "patch_camelyon", 2, 32_768, lossless=True),
        "eurosat": _task("EuroSAT", "specialized", "eurosat", 10, 5400),
        "resisc45": _task("Resisc45", "specialized", "resisc45", 45, 6300),
        "retinopathy": _task("Retinopathy", "specialized", "diabetic_retinopathy", 5, 42_670),
        "clevr-count": _task("Clevr-Count", "structured", "clevr_count", 8, 15_000, lossless=True),
        "clevr-distance": _task("Clevr-Dist", "structured", "clevr_dist", 6, 15_000, lossless=True),
        "dmlab": _task("DMLab", "structured", "dmlab", 6, 22_735),
        "kitti": _task("KITTI-Dist", "structured", "kitti", 4, 711, lossless=True),
        "dsprites-location": _task(
            "dSpr-Loc", "structured", "dsprites_loc", 16, 73_728, lossless=True
        ),
        "dsprites-orientation": _task(
            "dSpr-Ori", "structured", "dsprites_ori", 16, 73_728, lossless=True
        ),
        "smallnorb-azimuth": _task(
            "sNORB-Azi", "structured", "smallnorb_azi", 18, 12_150, lossless=True
        ),
        "smallnorb-elevation": _task(
            "sNORB-Ele", "structured", "smallnorb_ele", 9, 12_150, lossless=True
        ),
    }.items()
}
"""Name -> task, group by group, in VPT's order."""

GROUPS: dict[GroupName, tuple[str, ...]] = {
    group: tuple(name for name, task in TASKS.items() if task.group == group)
    for group in ("natural", "specialized", "structured")
}
"""Group -> the names of its tasks."""

ARCHIVE = "vtab-1k.zip"
_COPY = f"https://huggingface.co/datasets/XiN0919/VTAB-1k/resolve/main/{ARCHIVE}"
_COUNTS = {"train": 800, "val": 200}


def _dataset(name: str, task: Task) -> Dataset:
    counts = _COUNTS | {"test": task.test}
    return Dataset(
        name=name,
        title=f"VTAB-1k {task.title}",
        classes=task.classes,
        folder=f"{ROOT}/{task.folder}",
        rule="given",
        official=counts,
        honest=counts,
        sources=(
            Source(
                file=ARCHIVE,
                urls=(_COPY,),
                size=47 * GB // 10,
                provides=tuple(
                    f"{ROOT}/{task.folder}/{part}" for part in ("images", *LISTS.values())
                ),
            ),
        ),
        labels=f"second word of each line of {', '.join(LISTS.values())}",
    )


VTAB: dict[str, Dataset] = {name: _dataset(name, task) for name, task in TASKS.items()}
"""Name -> dataset. All of them come in one archive."""
