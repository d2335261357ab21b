"""VPT's split files train.json, val.json and test.json: image name -> class id.

The official code numbers the classes of each file by itself (sorted unique ids of that file); the
disjoint rule numbers them once, by the ids of train.json.
"""

from pathlib import Path

import numpy as np

from .annotations import read_json, unusable
from .listing import Listing, index_labels
from .pools import FilePool, inside

SPLITS = ("train", "val", "test")
IMAGES = {"cub": "images/", "nabirds": "images/", "stanford_dogs": "Images/", "flower102": ""}
"""Dataset -> what comes before the names in its split files."""


def find_splits(folder: Path) -> bool:
    """Tell whether a folder has VPT's split files.

    Raises:
        UsageError: only some of the three are there.
    """
    found = [(folder / f"{split}.json").is_file() for split in SPLITS]
    if any(found) and not all(found):
        missing = folder / f"{SPLITS[found.index(False)]}.json"
        there = folder / f"{SPLITS[found.index(True)]}.json"
        raise unusable(
            missing,
            f"no such file, although {there.name} is there",
            "all of train.json, val.json and test.json, or none",
            "add it, or move the others away to use a split of our own",
        )
    return all(found)


def read_splits(folder: Path, images: str, class_names: list[str]) -> Listing:
    """Read the split files of a dataset.

    Args:
        folder: where they are.
        images: what comes before their names.
        class_names: of the classes in the order of their ids, as the archive has them.

    Raises:
        UsageError: an image in two of the files, or a class that train.json does not have.
    """
    names: dict[str, list[str]] = {}
    values: dict[str, list[str | int]] = {}
    for split in SPLITS:
        path = folder / f"{split}.json"
        found = read_json(path, "image names, each with its class")
        names[split] = [inside(folder, f"{images}{name}", path) for name in found]
        values[split] = list(found.values())
        if not found or not all(isinstance(value, str | int) for value in values[split]):
            raise unusable(path, "something else", "image names, each with its class")
    train, val, test = (set(names[split]) for split in SPLITS)
    if shared := train & val | test & (train | val):
        raise unusable(folder, f"{min(shared)} in two of the split files", "each image in one")
    classes = {value: label for label, value in enumerate(_in_order(folder, values["train"]))}
    if len(classes) != len(class_names):
        class_names = [str(value) for value in classes]
    pooled = {"train": sorted(names["train"] + names["val"]), "test": sorted(names["test"])}
    where = {part: {name: row for row, name in enumerate(pooled[part])} for part in pooled}
    given, official = {}, {}
    labels = {part: np.empty(len(pooled[part]), np.int64) for part in pooled}
    for split in SPLITS:
        part = "test" if split == "test" else "train"
        given[split] = np.array([where[part][name] for name in names[split]])
        path = folder / f"{split}.json"
        labels[part][given[split]] = index_labels(
            values[split], classes, names[split].__getitem__, path
        )
        own = {value: label for label, value in enumerate(_in_order(folder, values[split]))}
        official[split] = np.array([own[value] for value in values[split]])
    return Listing(
        pools={part: FilePool(folder, pooled[part]) for part in pooled},
        labels=labels,
        class_names=class_names,
        given=given,
        official_labels=official,
        from_vpt=True,
    )


def _in_order(folder: Path, values: list) -> list:
    try:
        return sorted(set(values))
    except TypeError:
        raise unusable(folder, "class ids of mixed kinds in a split file", "one kind") from None
