"""A dataset of the user's own: a folder for every class, in train/ val/ test/ or in one tree."""

from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from ...checks import did_you_mean
from .annotations import require_folder, unusable
from .pools import FilePool, Listing, index_labels
from .stratify import held_out

SPLITS = ("train", "val", "test")
TEST_SHARE = 0.2
"""Share of the images of one tree that become test images."""


def read_own(root: Path) -> Listing:
    """List the images of `root`.

    With train/ and test/ inside, those are the official splits and val/ too if it is there. Else
    the folders of `root` are classes, and a fifth of each is held out as test images, always the
    same ones, chosen by a hash of the file name.

    Raises:
        UsageError: no folders, a class without images, or a class that train/ does not have.
    """
    require_folder(root, "a folder with a folder for every class", "check --data")
    if (root / "train").is_dir():
        return _of_splits(root)
    class_names = _class_names(root)
    names = [name for title in class_names for name in _images(root, title)]
    labels = _labels(names, class_names, root)
    test = held_out(labels, names, TEST_SHARE)
    keep = np.ones(len(names), bool)
    keep[test] = False
    rows = {"train": np.flatnonzero(keep), "test": test}
    return Listing(
        pools={part: FilePool(root, [names[row] for row in rows[part]], own=True) for part in rows},
        labels={part: labels[rows[part]] for part in rows},
        class_names=class_names,
    )


def _of_splits(root: Path) -> Listing:
    require_folder(root / "test", "the test images, as there is a folder train/", "add it")
    class_names = _class_names(root / "train")
    names = {"val": []}
    for split in SPLITS:
        if (root / split).is_dir():
            of_split = class_names if split == "train" else _class_names(root / split)
            _require_known(root, split, of_split, class_names)
            names[split] = [n for title in of_split for n in _images(root, f"{split}/{title}")]
    pooled = {"train": names["train"] + names["val"], "test": names["test"]}
    count, total = len(names["train"]), len(pooled["train"])
    given = {"train": np.arange(count), "val": np.arange(count, total)} if names["val"] else {}
    return Listing(
        pools={part: FilePool(root, pooled[part], own=True) for part in pooled},
        labels={part: _labels(pooled[part], class_names, root) for part in pooled},
        class_names=class_names,
        given=given,
    )


def _require_known(root: Path, split: str, found: list[str], class_names: list[str]) -> None:
    unknown = [name for name in found if name not in class_names]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        hint = did_you_mean(unknown[0], class_names)
        raise unusable(
            root / split / unknown[0],
            f"a class{more} that train/ does not have{hint and f' ({hint})'}",
            f"the {len(class_names)} classes of {root / 'train'}",
            "rename or remove it, or add training images of it",
        )


def _class_names(folder: Path) -> list[str]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if len(found) < 2:
        got = f"the only folder {found[0]!r}" if found else "no folder"
        expected = "a folder for every class, two or more"
        if folder.name not in SPLITS:
            expected += ", or train/ and test/ with such folders"
        raise unusable(folder, got, expected, "check --data")
    return found


def _images(root: Path, folder: str) -> list[str]:
    """Return the images of a class, also those in folders below, sorted by name."""
    found = sorted(
        path.relative_to(root).as_posix()
        for path in (root / folder).rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS and path.is_file()
    )
    if not found:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise unusable(root / folder, "no image", f"files that end in {kinds}", "check the folder")
    return found


def _labels(names: list[str], class_names: list[str], root: Path) -> np.ndarray:
    splits = SPLITS if (root / "train").is_dir() else ()
    values = [name.split("/")[1 if name.split("/")[0] in splits else 0] for name in names]
    classes = {name: label for label, name in enumerate(class_names)}
    return index_labels(values, classes, names.__getitem__, root)
