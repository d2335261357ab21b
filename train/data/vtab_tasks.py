"""The nineteen tasks of VTAB-1k as data: groups, classes, counts, and where the images come from.

The benchmark takes 800 training and 200 validation images of each task and its whole test split
(Zhai et al., "A Large-scale Study of Representation Learning with the Visual VTABTask Adaptation
Benchmark", 2019). The folder read here is the copy that circulates without TensorFlow:
`vtab-1k/TASK/` with `images/` and four lists of `path label`.
"""

from dataclasses import dataclass
from typing import Literal

from ..options.run import VTAB_PREFIX
from .registry import Dataset, SourceFile

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


@dataclass(frozen=True, slots=True)
class VTABTask:
    """What is particular to one task."""

    title: str
    group: GroupName
    folder: str
    """Its folder in `ROOT`."""

    classes: int
    test: int
    """Test images."""

    lossless: bool = False
    """Whether the originals are stored without loss (TensorFlow Datasets' format), so that a JPEG
    file cannot be one of them."""


TASKS: dict[str, VTABTask] = {
    f"{VTAB_PREFIX}{name}": task
    for name, task in {
        "cifar100": VTABTask("CIFAR-100", "natural", "cifar", 100, 10_000, lossless=True),
        "caltech101": VTABTask("Caltech101", "natural", "caltech101", 102, 6084),
        "dtd": VTABTask("DTD", "natural", "dtd", 47, 1880),
        "flowers102": VTABTask("Flowers102", "natural", "oxford_flowers102", 102, 6149),
        "pets": VTABTask("Pets", "natural", "oxford_iiit_pet", 37, 3669),
        "svhn": VTABTask("SVHN", "natural", "svhn", 10, 26_032, lossless=True),
        "sun397": VTABTask("Sun397", "natural", "sun397", 397, 21_750),
        "camelyon": VTABTask("Camelyon", "specialized", "patch_camelyon", 2, 32_768, lossless=True),
        "eurosat": VTABTask("EuroSAT", "specialized", "eurosat", 10, 5400),
        "resisc45": VTABTask("Resisc45", "specialized", "resisc45", 45, 6300),
        "retinopathy": VTABTask("Retinopathy", "specialized", "diabetic_retinopathy", 5, 42_670),
        "clevr-count": VTABTask(
            "Clevr-Count", "structured", "clevr_count", 8, 15_000, lossless=True
        ),
        "clevr-distance": VTABTask(
            "Clevr-Dist", "structured", "clevr_dist", 6, 15_000, lossless=True
        ),
        "dmlab": VTABTask("DMLab", "structured", "dmlab", 6, 22_735),
        "kitti": VTABTask("KITTI-Dist", "structured", "kitti", 4, 711, lossless=True),
        "dsprites-location": VTABTask(
            "dSpr-Loc", "structured", "dsprites_loc", 16, 73_728, lossless=True
        ),
        "dsprites-orientation": VTABTask(
            "dSpr-Ori", "structured", "dsprites_ori", 16, 73_728, lossless=True
        ),
        "smallnorb-azimuth": VTABTask(
            "sNORB-Azi", "structured", "smallnorb_azi", 18, 12_150, lossless=True
        ),
        "smallnorb-elevation": VTABTask(
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


def _dataset(name: str, task: VTABTask) -> Dataset:
    counts = {"train": 800, "val": 200, "test": task.test}
    provides = tuple(f"{ROOT}/{task.folder}/{part}" for part in ("images", *LISTS.values()))
    return Dataset(
        name=name,
        title=f"VTAB-1k {task.title}",
        classes=task.classes,
        folder=f"{ROOT}/{task.folder}",
        rule="given",
        official=counts,
        disjoint=counts,
        sources=(SourceFile(file=ARCHIVE, urls=(_COPY,), size=4_700_000_000, provides=provides),),
    )


VTAB: dict[str, Dataset] = {name: _dataset(name, task) for name, task in TASKS.items()}
"""Name -> dataset. All of them come in one archive."""


def tasks_of(name: str) -> tuple[str, ...]:
    """Return the datasets that a name stands for: all tasks, or one dataset."""
    return tuple(TASKS) if name == ALL_TASKS else (name,)
