"""Small datasets in the real on-disk format of each HTA dataset, with generated images."""

import io
import json
import pickle
import struct
import uuid
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from scipy.io import savemat

PARTS = ("train", "val", "test")


def write_tree(
    name: str,
    root: Path,
    *,
    classes: int = 3,
    per_class: int = 6,
    size: tuple[int, int] = (48, 40),
    seed: int = 0,
) -> Path:
    """Write a small tree of a dataset where its archive would be unpacked.

    Args:
        name: one of `tcpa.HTA_DATASETS`, or "folder".
        root: what `--data` names.
        classes: C. CIFAR and SVHN take at most 10 (CIFAR-100: 100).
        per_class: official training images of a class (DTD and Flowers: as many val images again),
            and as many test images.
        size: width and height of an image, pixels; CIFAR and SVHN have 32 x 32.
        seed: of the pixels.

    Returns:
        `root`.
    """
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)

    def draw(path: Path, label: int, number: int) -> tuple[int, int]:
        """Photos have many shapes: lying, standing, and a little larger."""
        width, height = size
        shape = (width, height) if number % 3 else (height, width + number % 5)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(rng, label, shape).save(path, quality=95)
        return shape

    _WRITERS[name](root, classes, per_class, draw, rng)
    return root


def picture(rng: np.random.Generator, label: int, size: tuple[int, int]) -> Image.Image:
    """Draw an image whose mean colour tells its class: colours that a small model can learn."""
    width, height = size
    base = np.array([label * 83 % 256, label * 151 % 256, label * 29 % 256])
    noise = rng.integers(-40, 41, (height, width, 3))
    return Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))


def _dtd(root, classes, per_class, draw, rng) -> None:
    folder = root / "DTD/dtd/dtd"
    (folder / "labels").mkdir(parents=True)
    titles = [f"texture{label}" for label in range(classes)]
    for number, split in enumerate(PARTS):
        lines = []
        for label, title in enumerate(titles):
            for count in range(per_class):
                name = f"{title}/{title}_{number * per_class + count:04d}.jpg"
                draw(folder / "images" / name, label, count)
                lines.append(name)
        (folder / f"labels/{split}1.txt").write_text("\n".join(lines) + "\n")


def _birds(folder, classes, per_class, draw, rng, ids, titles, number_images) -> None:
    """CUB and NABirds differ in how images and classes are numbered."""
    folder.mkdir(parents=True)
    images, labels, training = [], [], []
    for label in range(classes):
        for count in range(2 * per_class):
            key, name = number_images(label, count, len(images))
            draw(folder / "images" / name, label, count)
            images.append(f"{key} {name}")
            labels.append(f"{key} {ids[label]}")
            training.append(f"{key} {int(count < per_class)}")
    (folder / "images.txt").write_text("\n".join(images) + "\n")
    (folder / "image_class_labels.txt").write_text("\n".join(labels) + "\n")
    (folder / "train_test_split.txt").write_text("\n".join(training) + "\n")
    lines = [f"{ids[label]} {titles[label]}" for label in range(classes)]
    (folder / "classes.txt").write_text("\n".join(lines) + "\n")


def _cub(root, classes, per_class, draw, rng) -> None:
    titles = [f"{label + 1:03d}.Bird_{chr(122 - label % 26)}" for label in range(classes)]

    def number_images(label: int, count: int, images: int) -> tuple[str, str]:
        return str(images + 1), f"{titles[label]}/{titles[label][4:]}_{count:04d}_{images}.jpg"

    ids = [str(label + 1) for label in range(classes)]
    _birds(root / "CUB_200_2011", classes, per_class, draw, rng, ids, titles, number_images)


def _nabirds(root, classes, per_class, draw, rng) -> None:
    # Ids with gaps, and not of one length: sorted as text they would be in another order.
    ids = [str(98 + 3 * label) for label in range(classes)]

    def number_images(label: int, count: int, images: int) -> tuple[str, str]:
        key = str(uuid.UUID(bytes=rng.bytes(16)))
        return key, f"{int(ids[label]):04d}/{key.replace('-', '')}.jpg"

    titles = [f"Common Bird {label}" for label in range(classes)]
    _birds(root / "nabirds", classes, per_class, draw, rng, ids, titles, number_images)


def _cells(texts: list[str]) -> np.ndarray:
    cells = np.empty((len(texts), 1), object)
    cells[:, 0] = texts
    return cells


def _dogs(root, classes, per_class, draw, rng) -> None:
    folder = root / "stanford_dogs"
    folder.mkdir()
    names: dict[str, list[str]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for label in range(classes):
        kind = f"n0{2085620 + label}"
        for count in range(2 * per_class):
            part = "train" if count < per_class else "test"
            name = f"{kind}-Dog_{label}/{kind}_{count}.jpg"
            draw(folder / "Images" / name, label, count)
            names[part].append(name)
            labels[part].append(label + 1)
    for part in names:
        content = {
            "file_list": _cells(names[part]),
            "annotation_list": _cells([name[:-4] for name in names[part]]),
            "labels": np.array(labels[part], float)[:, None],
        }
        savemat(folder / f"{part}_list.mat", content)


def _flowers(root, classes, per_class, draw, rng) -> None:
    folder = root / "102flowers"
    folder.mkdir()
    parts, labels = [], []
    for label in range(classes):
        for count in range(3 * per_class):
            labels.append(label + 1)
            parts.append(count % 3)
            draw(folder / f"jpg/image_{len(labels):05d}.jpg", label, count)
    ids = np.arange(1, len(labels) + 1)[None]
    part = np.array(parts)[None]
    sets = {"trnid": ids[part == 0], "valid": ids[part == 1], "tstid": ids[part == 2]}
    savemat(folder / "setid.mat", {name: of_set[None] for name, of_set in sets.items()})
    savemat(folder / "imagelabels.mat", {"labels": np.array(labels, np.uint8)[None]})


def _food(root, classes, per_class, draw, rng) -> None:
    folder = root / "Food101/food-101"
    (folder / "meta").mkdir(parents=True)
    # Not in the order of the alphabet, as nothing promises that.
    titles = [f"food_{chr(122 - label % 26)}{label}" for label in range(classes)]
    for part in ("train", "test"):
        members = {}
        for label, title in enumerate(titles):
            offset = 0 if part == "train" else per_class
            members[title] = [f"{title}/{offset + count}" for count in range(per_class)]
            for count, name in enumerate(members[title]):
                draw(folder / f"images/{name}.jpg", label, count)
        (folder / f"meta/{part}.json").write_text(json.dumps(members))


def _gtsrb(root, classes, per_class, draw, rng) -> None:
    folder = root / "GTSRB/gtsrb"
    for label in range(classes):
        of_class = folder / f"GTSRB/Training/{label:05d}"
        rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
        for count in range(per_class):
            # Three pictures of each physical sign.
            name = f"{count // 3:05d}_{count % 3:05d}.ppm"
            width, height = draw(of_class / name, label, count)
            rows.append(f"{name};{width};{height};5;5;{width - 5};{height - 5};{label}")
        (of_class / f"GT-{label:05d}.csv").write_text("\n".join(rows) + "\n")
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number in range(classes * per_class):
        label = number * 7 % classes
        path = folder / f"GTSRB/Final_Test/Images/{number:05d}.ppm"
        width, height = draw(path, label, number)
        rows.append(f"{number:05d}.ppm;{width};{height};5;5;{width - 5};{height - 5};{label}")
    (folder / "GT-final_test.csv").write_text("\n".join(rows) + "\n")


def _small(rng, labels: list[int]) -> np.ndarray:
    return np.stack([np.asarray(picture(rng, label, (32, 32))) for label in labels])


def _mixed(rng, classes: int, per_class: int) -> list[int]:
    return rng.permutation(np.repeat(np.arange(classes), per_class)).tolist()


def _svhn(root, classes, per_class, draw, rng) -> None:
    folder = root / "SVHN"
    folder.mkdir()
    for part in ("train", "test"):
        labels = _mixed(rng, classes, per_class)
        numbers = np.array([label or 10 for label in labels], np.uint8)[:, None]
        content = {"X": _small(rng, labels).transpose(1, 2, 3, 0), "y": numbers}
        savemat(folder / f"{part}_32x32.mat", content, do_compression=True)


class _Python2Pickler(pickle._Pickler):
    """Writes text, bytes and arrays as Python 2 did, which made the published files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def _save_string(self, value: bytes | str) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = _save_string


def _pickled(content: dict) -> bytes:
    stream = io.BytesIO()
    _Python2Pickler(stream, protocol=2).dump(content)
    # numpy's module had another name then.
    return stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def _write_cifar(path: Path, rng, labels: list[int], key: str) -> None:
    rows = _small(rng, labels).transpose(0, 3, 1, 2).reshape(len(labels), -1)
    names = [f"image_{number}.png" for number in range(len(labels))]
    content = {"batch_label": path.name, key: labels, "data": rows, "filenames": names}
    if key == "fine_labels":
        content["coarse_labels"] = [label // 5 for label in labels]
    path.write_bytes(_pickled(content))


def _cifar10(root, classes, per_class, draw, rng) -> None:
    folder = root / "Cifar10/cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship"]
    meta = {"num_cases_per_batch": per_class, "label_names": [*names, "truck"][:classes]}
    (folder / "batches.meta").write_bytes(_pickled({**meta, "num_vis": 3072}))
    labels = _mixed(rng, classes, per_class)
    for number, part in enumerate(np.array_split(labels, 5), start=1):
        _write_cifar(folder / f"data_batch_{number}", rng, part.tolist(), "labels")
    _write_cifar(folder / "test_batch", rng, _mixed(rng, classes, per_class), "labels")


def _cifar100(root, classes, per_class, draw, rng) -> None:
    folder = root / "Cifar100/cifar-100-python"
    folder.mkdir(parents=True)
    meta = {"fine_label_names": [f"thing_{n:02d}" for n in range(classes)]}
    meta["coarse_label_names"] = [f"kind_{n}" for n in range(-(-classes // 5))]
    (folder / "meta").write_bytes(_pickled(meta))
    for part in ("train", "test"):
        _write_cifar(folder / part, rng, _mixed(rng, classes, per_class), "fine_labels")


def _folder(root, classes, per_class, draw, rng) -> None:
    for part in ("train", "test"):
        for label in range(classes):
            for count in range(per_class):
                kind = "png" if count % 2 else "jpg"
                path = root / part / f"class {label}" / f"{part}{count}.{kind}"
                draw(path, label, count)


def write_vpt_splits(name: str, root: Path, val: int = 1) -> Path:
    """Add VPT's train.json, val.json and test.json to a tree of `write_tree`.

    The last `val` training images of every class become val, but the first class has none: as in
    NABirds, val lacks a class. Returns the dataset's folder.
    """
    from tcpa.train.data.readers import READERS
    from tcpa.train.data.registry import HTA

    folder = root / HTA[name].folder
    listing = READERS[name](folder)
    ids = {
        "cub": lambda label: f"{label + 1:03d}",
        "nabirds": lambda label: 98 + 3 * label,
        "stanford_dogs": lambda label: label + 1,
        "flower102": lambda label: label + 1,
    }[name]
    strip = "jpg/" if name == "flower102" else ""
    found: dict[str, dict] = {split: {} for split in PARTS}
    for part, pool in listing.pools.items():
        labels = listing.labels[part]
        for row in reversed(range(len(pool))):
            key, label = pool.key(row).partition("/")[2], int(labels[row])
            held = int((labels[row + 1 :] == label).sum()) < val and label > 0
            split = "val" if part == "train" and held else part
            found[split][strip + key] = ids(label)
    for split, content in found.items():
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


_WRITERS = {
    "dtd": _dtd,
    "cub": _cub,
    "nabirds": _nabirds,
    "stanford_dogs": _dogs,
    "flower102": _flowers,
    "food101": _food,
    "cifar100": _cifar100,
    "cifar10": _cifar10,
    "gtsrb": _gtsrb,
    "svhn": _svhn,
    "folder": _folder,
}
