"""Read each dataset in the format its authors publish it in.

torchvision has classes for seven of the ten. They keep file names to themselves, so that no error
could name a file; CIFAR's unpickles what was downloaded; CIFAR, SVHN and Flowers accept no folder
but the published one. Tests compare these readers with them.
"""

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from .annotations import (
    read_json,
    read_lines,
    read_mat,
    read_pairs,
    read_pickled,
    require_folder,
    unusable,
)
from .pools import ArrayPool, FilePool, Listing, Pool, index_labels, inside


def read_svhn(folder: Path) -> Listing:
    """SVHN: X uint8 `[32, 32, 3, N]` and y `[N, 1]` in train_32x32.mat and test_32x32.mat."""
    pools: dict[str, Pool] = {}
    labels = {}
    for part in ("train", "test"):
        path = folder / f"{part}_32x32.mat"
        (values,) = read_mat(path, "y")
        digits = {value: value % 10 for value in range(1, 11)}
        found = values.ravel().astype(int).tolist()
        labels[part] = index_labels(found, digits, lambda index: f"image {index}", path)
        pools[part] = ArrayPool([path], partial(_svhn_pixels, path), len(found))
    return Listing(pools=pools, labels=labels, class_names=[str(digit) for digit in range(10)])


def _svhn_pixels(path: Path) -> np.ndarray:
    (pixels,) = read_mat(path, "X")
    if pixels.shape[:3] != (32, 32, 3) or pixels.dtype != np.uint8:
        raise unusable(path, f"X {pixels.dtype} {list(pixels.shape)}", "uint8 [32, 32, 3, N]")
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2))


def read_cifar10(folder: Path) -> Listing:
    """CIFAR-10: cifar-10-batches-py/data_batch_1..5 and test_batch."""
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    return _read_cifar(folder / "cifar-10-batches-py", batches, "test_batch", "batches.meta", "")


def read_cifar100(folder: Path) -> Listing:
    """CIFAR-100: cifar-100-python/train and test, with the 100 fine classes."""
    return _read_cifar(folder / "cifar-100-python", ["train"], "test", "meta", "fine_")


def _read_cifar(folder: Path, train: list[str], test: str, meta: str, kind: str) -> Listing:
    (class_names,) = read_pickled(folder / meta, f"{kind}label_names")
    classes = {label: label for label in range(len(class_names))}
    pools: dict[str, Pool] = {}
    labels = {}
    for part, files in (("train", train), ("test", [test])):
        paths = [folder / file for file in files]
        found = []
        for path in paths:
            (values,) = read_pickled(path, f"{kind}labels")
            found.append(index_labels(values, classes, lambda index: f"image {index}", path))
        labels[part] = np.concatenate(found)
        pools[part] = ArrayPool(paths, partial(_cifar_pixels, paths), len(labels[part]))
    return Listing(pools=pools, labels=labels, class_names=[str(name) for name in class_names])


def _cifar_pixels(paths: list[Path]) -> np.ndarray:
    parts = []
    for path in paths:
        (rows,) = read_pickled(path, "data")
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (3072,):
            raise unusable(path, "other data", "uint8 [N, 3072]")
        parts.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return np.ascontiguousarray(np.concatenate(parts))


def _listing(
    folder: Path, names: dict[str, list[str]], values: dict[str, list], classes: dict, source: Path
) -> dict:
    """Return pools and labels of image files, as arguments of Listing."""
    labels = {
        part: index_labels(values[part], classes, names[part].__getitem__, source) for part in names
    }
    return {"pools": {part: FilePool(folder, names[part]) for part in names}, "labels": labels}


def read_dtd(folder: Path) -> Listing:
    """DTD, partition 1: labels/train1.txt, val1.txt, test1.txt; images/CLASS/NAME.jpg."""
    names = {}
    for split in ("train", "val", "test"):
        path = folder / "labels" / f"{split}1.txt"
        lines = read_lines(path, "a list of image names")
        names[split] = [inside(folder, f"images/{line}", path) for line in lines]
    classes = {
        name: label for label, name in enumerate(sorted({_parent(n) for n in names["train"]}))
    }
    pooled = {"train": names["train"] + names["val"], "test": names["test"]}
    values = {part: [_parent(name) for name in pooled[part]] for part in pooled}
    count = len(names["train"])
    return Listing(
        **_listing(folder, pooled, values, classes, folder / "labels"),
        class_names=list(classes),
        given={"train": np.arange(count), "val": np.arange(count, len(pooled["train"]))},
    )


def read_food101(folder: Path) -> Listing:
    """Food-101: meta/train.json and test.json, class -> names; images/CLASS/NAME.jpg."""
    names, values = {}, {}
    for part in ("train", "test"):
        path = folder / "meta" / f"{part}.json"
        members = read_json(path, "class names, each with its image names")
        if not all(isinstance(of_class, list) for of_class in members.values()):
            raise unusable(path, "something else", "class names, each with its image names")
        names[part] = [
            inside(folder, f"images/{name}.jpg", path) for of in members.values() for name in of
        ]
        values[part] = [label for label, of in members.items() for _ in of]
    classes = {name: label for label, name in enumerate(sorted(set(values["train"])))}
    listed = _listing(folder, names, values, classes, folder / "meta" / "test.json")
    return Listing(**listed, class_names=list(classes))


def read_gtsrb(folder: Path) -> Listing:
    """GTSRB: GTSRB/Training/CLASS/TRACK_NUMBER.ppm; GT-final_test.csv for the test images."""
    training, testing = "GTSRB/Training", "GTSRB/Final_Test/Images"
    require_folder(folder / training, "a folder for every class")
    require_folder(folder / testing, "the test images")
    class_names = sorted(path.name for path in (folder / training).iterdir() if path.is_dir())
    names = {
        "train": [
            f"{training}/{name}/{path.name}"
            for name in class_names
            for path in sorted((folder / training / name).glob("*.ppm"))
        ]
    }
    table = folder / "GT-final_test.csv"
    lines = read_lines(table, "a table with the columns Filename and ClassId")
    rows = list(csv.DictReader(lines, delimiter=";", skipinitialspace=True))
    if not rows or not {"Filename", "ClassId"} <= rows[0].keys():
        raise unusable(table, "other columns", "a table with the columns Filename and ClassId")
    names["test"] = [inside(folder, f"{testing}/{row['Filename']}", table) for row in rows]
    classes = {_number(name, folder / training): n for n, name in enumerate(class_names)}
    values = {
        "train": [int(_parent(name)) for name in names["train"]],
        "test": [_number(row["ClassId"], table) for row in rows],
    }
    # 00012_00003.ppm is picture 3 of sign 12 of its class.
    groups = [name.rpartition("_")[0] for name in names["train"]]
    listed = _listing(folder, names, values, classes, table)
    return Listing(**listed, class_names=class_names, groups=groups)


def read_birds(folder: Path) -> Listing:
    """CUB-200-2011 and NABirds: images.txt, image_class_labels.txt, train_test_split.txt."""
    files = read_pairs(folder / "images.txt", "an image number and a name a line")
    ids = read_pairs(folder / "image_class_labels.txt", "an image number and a class a line")
    training = read_pairs(folder / "train_test_split.txt", "an image number and 1 or 0 a line")
    titles = read_pairs(folder / "classes.txt", "a class number and a name a line")
    for other, path in ((ids, "image_class_labels.txt"), (training, "train_test_split.txt")):
        if other.keys() != files.keys():
            number = min(other.keys() ^ files.keys())
            got = f"image {number} in one of this file and images.txt"
            raise unusable(folder / path, got, "the same images in both")
    names: dict[str, list[str]] = {}
    values: dict[str, list[str]] = {}
    for part, flag in (("train", "1"), ("test", "0")):
        chosen = sorted(
            (inside(folder, f"images/{files[number]}", folder / "images.txt"), ids[number])
            for number in files
            if training[number] == flag
        )
        names[part] = [name for name, _ in chosen]
        values[part] = [value for _, value in chosen]
    used = sorted(set(values["train"]), key=partial(_number, path=folder / "classes.txt"))
    classes = {value: label for label, value in enumerate(used)}
    listed = _listing(folder, names, values, classes, folder / "image_class_labels.txt")
    return Listing(**listed, class_names=[titles.get(value, value) for value in used])


def read_dogs(folder: Path) -> Listing:
    """Stanford Dogs: train_list.mat and test_list.mat with file_list and labels."""
    names, values = {}, {}
    for part in ("train", "test"):
        path = folder / f"{part}_list.mat"
        listed, labels = read_mat(path, "file_list", "labels")
        found = [str(cell.item()) for cell in listed.ravel()]
        if len(found) != labels.size:
            got = f"{len(found)} files and {labels.size} labels"
            raise unusable(path, got, "as many of one as of the other")
        chosen = sorted(
            (inside(folder, f"Images/{name}", path), int(label))
            for name, label in zip(found, labels.ravel(), strict=True)
        )
        names[part] = [name for name, _ in chosen]
        values[part] = [value for _, value in chosen]
    used = sorted(set(values["train"]))
    classes = {value: label for label, value in enumerate(used)}
    titles = dict(zip(values["train"], map(_parent, names["train"]), strict=True))
    arguments = _listing(folder, names, values, classes, folder / "test_list.mat")
    return Listing(**arguments, class_names=[titles[value] for value in used])


def read_flowers(folder: Path) -> Listing:
    """Flowers-102: setid.mat numbers the images of each split, imagelabels.mat has 1..C."""
    path = folder / "setid.mat"
    parts = [ids.ravel().astype(int) for ids in read_mat(path, "trnid", "valid", "tstid")]
    (labels,) = read_mat(folder / "imagelabels.mat", "labels")
    labels = labels.ravel().astype(int)
    numbers = {"train": np.concatenate(parts[:2]), "test": parts[2]}
    for of_part in numbers.values():
        if of_part.min() < 1 or of_part.max() > len(labels):
            got = f"image numbers from {of_part.min()} to {of_part.max()}"
            raise unusable(path, got, f"1 to {len(labels)}, as imagelabels.mat has labels")
    names = {part: [f"jpg/image_{n:05d}.jpg" for n in numbers[part]] for part in numbers}
    values = {part: labels[numbers[part] - 1].tolist() for part in numbers}
    used = sorted(set(values["train"]))
    classes = {value: label for label, value in enumerate(used)}
    count = len(parts[0])
    return Listing(
        **_listing(folder, names, values, classes, folder / "imagelabels.mat"),
        class_names=flower_names(used),
        given={"train": np.arange(count), "val": np.arange(count, len(names["train"]))},
    )


def flower_names(ids: Sequence[int]) -> list[str]:
    """Return the names of flower classes 1..102; the archive does not have them."""
    from torchvision.datasets import Flowers102

    return [Flowers102.classes[number - 1] for number in ids]


def _number(text: str | None, path: Path) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise unusable(path, f"the class {text!r}", "a number for every class") from None


def _parent(name: str) -> str:
    return name.split("/")[-2]


READERS: dict[str, Callable[[Path], Listing]] = {
    "dtd": read_dtd,
    "cub": read_birds,
    "nabirds": read_birds,
    "stanford_dogs": read_dogs,
    "flower102": read_flowers,
    "food101": read_food101,
    "cifar100": read_cifar100,
    "cifar10": read_cifar10,
    "gtsrb": read_gtsrb,
    "svhn": read_svhn,
}
"""Name of a dataset -> how to read its folder."""
