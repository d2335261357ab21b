"""A dataset of the user's own: a folder for every class, in train/ val/ test/ or in one tree."""

from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from ...checks import did_you_mean
from .annotations import require_folder, unusable
from .listing import Labelled, Listing, list_files, train_then_val
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
    images = [pair for title in _class_names(root) for pair in _images(root, title)]
    names = [name for name, _ in images]
    _, labels = np.unique([title for _, title in images], return_inverse=True)
    test = set(held_out(labels, names, TEST_SHARE).tolist())
    pooled: Labelled = {
        part: [pair for row, pair in enumerate(images) if (row in test) == (part == "test")]
        for part in ("train", "test")
    }
    return list_files(root, pooled, root, own=True)


def _of_splits(root: Path) -> Listing:
    require_folder(root / "test", "the test images, as there is a folder train/", "add it")
    class_names = _class_names(root / "train")
    images: Labelled = {"val": []}
    for split in SPLITS:
        if (root / split).is_dir():
            of_split = class_names if split == "train" else _class_names(root / split)
            _require_known(root, split, of_split, class_names)
            images[split] = [pair for title in of_split for pair in _images(root, title, split)]
    pooled: Labelled = {"train": images["train"] + images["val"], "test": images["test"]}
    count, total = len(images["train"]), len(pooled["train"])
    given = train_then_val(count, total) if images["val"] else {}
    return list_files(root, pooled, root, own=True, given=given)


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


def _images(root: Path, title: str, split: str = "") -> list[tuple[str, str]]:
    """Return the images of a class, also those in folders below, sorted by name."""
    folder = root / split / title
    found = sorted(
        path.relative_to(root).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS and path.is_file()
    )
    if not found:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise unusable(folder, "no image", f"files that end in {kinds}", "check the folder")
    return [(name, title) for name in found]
