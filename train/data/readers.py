"""Read each dataset in the format its authors publish it in.

torchvision has classes for seven of the ten. They keep file names to themselves, so that no error
could name a file; CIFAR's unpickles what was downloaded; CIFAR, SVHN and Flowers accept no folder
but the published one. Tests compare these readers with them.
"""

import csv
from collections.abc import Callable, Iterable
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
from .listing import Labelled, Listing, index_labels, list_files, train_then_val
from .pools import ArrayPool, Pool, inside


def _with_folders(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return images whose class is the folder that they are in."""
    return [(name, name.split("/")[-2]) for name in names]


def read_dtd(folder: Path) -> Listing:
    """DTD, partition 1: labels/train1.txt, val1.txt, test1.txt; images/CLASS/NAME.jpg."""
    names = {}
    for split in ("train", "val", "test"):
        path = folder / "labels" / f"{split}1.txt"
        lines = read_lines(path, "a list of image names")
        names[split] = _with_folders(inside(folder, f"images/{line}", path) for line in lines)
    images = {"train": names["train"] + names["val"], "test": names["test"]}
    given = train_then_val(len(names["train"]), len(images["train"]))
    return list_files(folder, images, folder / "labels", given=given)


def read_food101(folder: Path) -> Listing:
    """Food-101: meta/train.json and test.json, class -> names; images/CLASS/NAME.jpg."""
    images: Labelled = {}
    for part in ("train", "test"):
        path = folder / "meta" / f"{part}.json"
        members = read_json(path, "class names, each with its image names")
        if not all(isinstance(of_class, list) for of_class in members.values()):
            raise unusable(path, "something else", "class names, each with its image names")
        images[part] = [
            (inside(folder, f"images/{name}.jpg", path), title)
            for title, of_class in members.items()
            for name in of_class
        ]
    return list_files(folder, images, folder / "meta" / "test.json")


def read_gtsrb(folder: Path) -> Listing:
    """GTSRB: GTSRB/Training/CLASS/TRACK_NUMBER.ppm; GT-final_test.csv for the test images."""
    training, testing = "GTSRB/Training", "GTSRB/Final_Test/Images"
    require_folder(folder / training, "a folder for every class")
    require_folder(folder / testing, "the test images")
    class_names = sorted(path.name for path in (folder / training).iterdir() if path.is_dir())
    classes = {name: _number(name, folder / training) for name in class_names}
    train = [
        (f"{training}/{name}/{path.name}", classes[name])
        for name in class_names
        for path in sorted((folder / training / name).glob("*.ppm"))
    ]
    table = folder / "GT-final_test.csv"
    lines = read_lines(table, "a table with the columns Filename and ClassId")
    rows = list(csv.DictReader(lines, delimiter=";", skipinitialspace=True))
    if not rows or not {"Filename", "ClassId"} <= rows[0].keys():
        raise unusable(table, "other columns", "a table with the columns Filename and ClassId")
    test = [
        (inside(folder, f"{testing}/{row['Filename']}", table), _number(row["ClassId"], table))
        for row in rows
    ]
    # 00012_00003.ppm is picture 3 of sign 12 of its class.
    groups = [name.rpartition("_")[0] for name, _ in train]
    titles = {number: name for name, number in classes.items()}
    images: Labelled = {"train": train, "test": test}
    return list_files(folder, images, table, titles=titles.__getitem__, groups=groups)


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
    images: Labelled = {
        part: sorted(
            (inside(folder, f"images/{files[number]}", folder / "images.txt"), ids[number])
            for number in files
            if training[number] == flag
        )
        for part, flag in (("train", "1"), ("test", "0"))
    }
    return list_files(
        folder,
        images,
        folder / "image_class_labels.txt",
        key=partial(_number, path=folder / "classes.txt"),
        titles=lambda value: titles.get(value, str(value)),
    )


def read_dogs(folder: Path) -> Listing:
    """Stanford Dogs: train_list.mat and test_list.mat with file_list and labels."""
    images: Labelled = {}
    for part in ("train", "test"):
        path = folder / f"{part}_list.mat"
        listed, labels = read_mat(path, "file_list", "labels")
        found = [str(cell.item()) for cell in listed.ravel()]
        if len(found) != labels.size:
            got = f"{len(found)} files and {labels.size} labels"
            raise unusable(path, got, "as many of one as of the other")
        images[part] = sorted(
            (inside(folder, f"Images/{name}", path), int(label))
            for name, label in zip(found, labels.ravel(), strict=True)
        )
    titles = {value: name.split("/")[-2] for name, value in images["train"]}
    return list_files(folder, images, folder / "test_list.mat", titles=titles.__getitem__)


def read_flowers(folder: Path) -> Listing:
    """Flowers-102: setid.mat numbers the images of each split, imagelabels.mat has 1..C."""
    # The archive does not have the names of the classes.
    from torchvision.datasets import Flowers102

    path = folder / "setid.mat"
    train, val, test = (
        ids.ravel().astype(int) for ids in read_mat(path, "trnid", "valid", "tstid")
    )
    (labels,) = read_mat(folder / "imagelabels.mat", "labels")
    labels = labels.ravel().astype(int)
    images: Labelled = {}
    for part, numbers in (("train", np.concatenate([train, val])), ("test", test)):
        if numbers.min() < 1 or numbers.max() > len(labels):
            got = f"image numbers from {numbers.min()} to {numbers.max()}"
            raise unusable(path, got, f"1 to {len(labels)}, as imagelabels.mat has labels")
        images[part] = [(f"jpg/image_{n:05d}.jpg", int(labels[n - 1])) for n in numbers]
    return list_files(
        folder,
        images,
        folder / "imagelabels.mat",
        titles=lambda value: Flowers102.classes[value - 1],
        given=train_then_val(len(train), len(train) + len(val)),
    )


def _number(text: str | None, path: Path) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise unusable(path, f"the class {text!r}", "a number for every class") from None


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
