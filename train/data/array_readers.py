"""Read the datasets whose files hold arrays of small images: SVHN and CIFAR."""

from functools import partial
from pathlib import Path

import numpy as np

from .files import read_mat, read_pickled, unusable
from .listing import Listing, index_labels
from .pools import ArrayPool, Pool


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
