"""Every dataset is read from its real on-disk format; what is wrong there is told by name."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torchvision.datasets as tv
from dataset_trees import write_tree, write_vpt_splits
from PIL import Image
from scipy.io import savemat

from tcpa import HTA_DATASETS
from tcpa.cli import UsageError
from tcpa.train.data.annotations import read_pickled
from tcpa.train.data.registry import HTA
from tcpa.train.data.splits import open_split, read_listing

CLASSES, PER_CLASS = 4, 6


@pytest.fixture(scope="module", params=HTA_DATASETS)
def tree(request, tmp_path_factory):
    """A dataset's name and a folder with a small tree of it."""
    name = request.param
    root = write_tree(name, tmp_path_factory.mktemp(name), classes=CLASSES, per_class=PER_CLASS)
    return name, root


@pytest.fixture
def copy(tmp_path):
    """Write a tree that a test may damage: copy(name) -> (root, the dataset's folder)."""

    def make(name: str, **settings):
        root = write_tree(name, tmp_path / "data", **settings)
        return root, root / HTA[name].folder

    return make


def pixels(split, number: int) -> np.ndarray:
    return np.asarray(split.pool.load(int(split.rows[number])))


def test_registry_covers_the_ten() -> None:
    assert tuple(HTA) == HTA_DATASETS
    for dataset in HTA.values():
        given = dataset.rule == "given"
        for counts, per_class in (
            (dataset.official["train"] + dataset.official["val"], dataset.train_per_class),
            (dataset.official["test"], dataset.test_per_class),
        ):
            if per_class:
                total = sum(per_class) if len(per_class) > 1 else per_class[0] * dataset.classes
                assert total == counts, (dataset.name, given)
        assert sum(dataset.official.values()) == sum(dataset.disjoint.values())


def test_counts_and_labels(tree) -> None:
    name, root = tree
    listing = read_listing(name, root)
    own_val = name in ("dtd", "flower102")
    assert len(listing.pools["train"]) == CLASSES * PER_CLASS * (2 if own_val else 1)
    assert len(listing.pools["test"]) == CLASSES * PER_CLASS
    assert len(set(listing.class_names)) == (10 if name == "svhn" else CLASSES)
    for part, pool in listing.pools.items():
        counts = np.bincount(listing.labels[part], minlength=CLASSES)
        assert set(counts[:CLASSES]) == {len(pool) // CLASSES}
        # Generated colours tell the class; Food-101's classes are written in another order.
        for row in range(0, len(pool), 5):
            mean = np.asarray(pool.load(row)).reshape(-1, 3).mean(0)
            drawn = [(k * 83 % 256, k * 151 % 256, k * 29 % 256) for k in range(CLASSES)]
            nearest = np.abs(np.array(drawn) - mean).sum(1).argmin()
            label = listing.labels[part][row]
            expected = CLASSES - 1 - label if name == "food101" else label
            assert nearest == expected, pool.name(row)


def reference(name, root, split, monkeypatch):
    """Open a dataset with torchvision's class, which demands the published checksums."""
    train = split == "train"
    if name == "dtd":
        return tv.DTD(root / "DTD", split)
    if name == "food101":
        return tv.Food101(root / "Food101", split)
    if name == "gtsrb":
        return tv.GTSRB(root / "GTSRB", split)
    if name == "svhn":
        monkeypatch.setattr(tv.SVHN, "_check_integrity", lambda self: True)
        return tv.SVHN(root / "SVHN", split)
    if name == "flower102":
        monkeypatch.setattr(tv.Flowers102, "_check_integrity", lambda self: True)
        (root / "flowers-102").symlink_to(root / "102flowers")
        return tv.Flowers102(root, split)
    kind, folder = {
        "cifar10": (tv.CIFAR10, "Cifar10"),
        "cifar100": (tv.CIFAR100, "Cifar100"),
    }[name]
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setitem(kind.meta, "md5", None)
    return kind(root / folder, train)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "name", ["dtd", "food101", "gtsrb", "svhn", "flower102", "cifar10", "cifar100"]
)
def test_equal_to_torchvision(name, split, tmp_path, monkeypatch) -> None:
    root = write_tree(name, tmp_path, classes=CLASSES, per_class=2)
    theirs = reference(name, root, split, monkeypatch)
    protocol, ours_split = ("val", "trainval") if split == "train" else ("official", "test")
    if name in ("dtd", "flower102"):
        ours_split = split
    ours = open_split(name, root, ours_split, protocol=protocol)
    assert len(ours.rows) == len(theirs)
    for number in range(len(theirs)):
        image, label = theirs[number]
        assert label == ours.labels[number]
        assert np.array_equal(np.asarray(image), pixels(ours, number))


@pytest.mark.parametrize("name", ["cub", "nabirds", "stanford_dogs", "flower102"])
def test_vpt_split_files(name, tmp_path) -> None:
    root = write_tree(name, tmp_path, classes=CLASSES, per_class=PER_CLASS)
    before = {split: open_split(name, root, split, protocol="val") for split in ("train", "test")}
    folder = write_vpt_splits(name, root)
    opened = {split: open_split(name, root, split) for split in ("train", "val", "test")}
    for split, ours in opened.items():
        listed = json.loads((folder / f"{split}.json").read_text())
        found = [ours.pool.key(int(row)) for row in ours.rows]
        assert [key.endswith(name) for key, name in zip(found, listed, strict=True)]
        # The official code numbers the classes of each file by itself.
        ids = sorted(set(listed.values()))
        assert ours.labels.tolist() == [ids.index(value) for value in listed.values()]
        assert "VPT's split files" in ours.record["rule"] or split == "test"
    assert len(opened["val"].rows) == CLASSES - 1
    disjoint = open_split(name, root, "val", protocol="val")
    # Val lacks the first class: the official labels are all one too small, the disjoint ones right.
    assert (disjoint.labels == opened["val"].labels + 1).all()
    assert disjoint.class_names == before["train"].class_names
    # The same images in the same pool, so that one cache serves with and without the files.
    assert [before["test"].pool.key(i) for i in range(5)] == [
        opened["test"].pool.key(i) for i in range(5)
    ]


def test_vpt_split_files_alone_are_enough(tmp_path) -> None:
    root = write_tree("stanford_dogs", tmp_path)
    folder = write_vpt_splits("stanford_dogs", root)
    for part in ("train", "test"):
        (folder / f"{part}_list.mat").unlink()
    split = open_split("stanford_dogs", root, "train")
    assert split.class_names == ["1", "2", "3"]


def replaced(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_missing_dataset_says_what_to_run(tmp_path) -> None:
    with pytest.raises(UsageError) as caught:
        read_listing("cub", tmp_path)
    told = f"run `tcpa-train data prepare cub --data {tmp_path}`"
    assert str(caught.value) == (
        f"{tmp_path}/CUB_200_2011: got no such folder, expected CUB-200-2011; {told}"
    )
    with pytest.raises(UsageError, match=r"dataset: got 'cab', expected one of dtd, cub, .*folder"):
        read_listing("cab", tmp_path)


MISSING = [
    ("dtd", "labels/val1.txt"),
    ("cub", "train_test_split.txt"),
    ("nabirds", "image_class_labels.txt"),
    ("stanford_dogs", "test_list.mat"),
    ("flower102", "setid.mat"),
    ("food101", "meta/test.json"),
    ("cifar100", "cifar-100-python/meta"),
    ("cifar10", "cifar-10-batches-py/data_batch_3"),
    ("gtsrb", "GT-final_test.csv"),
    ("svhn", "test_32x32.mat"),
]


@pytest.mark.parametrize(("name", "file"), MISSING, ids=[name for name, _ in MISSING])
def test_a_broken_or_missing_list_is_named(name, file, copy) -> None:
    root, folder = copy(name, per_class=2)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(b"\xff\x00" + content[: len(content) // 3])
    with pytest.raises(UsageError, match="expected") as caught:
        read_listing(name, root)
    assert str(folder) in str(caught.value)
    (folder / file).unlink()
    with pytest.raises(UsageError, match="tcpa-train data prepare") as caught:
        read_listing(name, root)
    assert str(caught.value).startswith(f"{folder / file}: got no such file, expected ")


UNKNOWN = {
    "gtsrb": ("GT-final_test.csv", ";0\n", ";9\n", "9 for GTSRB/Final_Test/Images/00000.ppm, exp"),
    "food101": ("meta/test.json", '"food_z0"', '"soup"', "'soup' for images/food_z0/6"),
    "cub": ("test.json", '"003"', '"201"', r"'201' for images/003\."),
    "svhn": ("train_32x32.mat", None, [[1], [11]], "11 for image 1, expected one"),
    "cifar10": ("cifar-10-batches-py/test_batch", None, [0, 3], "3 for image 1, expected one"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_labels_are_named(name, copy) -> None:
    root, folder = copy(name)
    file, old, new, told = UNKNOWN[name]
    if name == "cub":
        write_vpt_splits(name, root)
    if name == "svhn":
        savemat(folder / file, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array(new)})
    elif name == "cifar10":
        content = {"labels": new, "data": np.zeros((2, 3072), np.uint8)}
        (folder / file).write_bytes(pickle.dumps(content, 2))
    else:
        replaced(folder / file, old, new)
    with pytest.raises(UsageError, match=f"{file}: got the label {told}"):
        read_listing(name, root)


def test_images_and_labels_must_be_as_many(tmp_path) -> None:
    root = write_tree("cifar10", tmp_path)
    content = (root / "Cifar10/cifar-10-batches-py/data_batch_1").read_bytes()
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content and b"_codecs" not in content
    path = root / "Cifar10/cifar-10-batches-py/test_batch"
    path.write_bytes(pickle.dumps({"labels": [0] * 3, "data": np.zeros((2, 3072), np.uint8)}, 2))
    pool = read_listing("cifar10", root).pools["test"]
    with pytest.raises(
        UsageError, match=r"test_batch: got 2 images and 3 labels, expected as many"
    ):
        pool.load(0)
    root = write_tree("nabirds", tmp_path)
    replaced(root / "nabirds/image_class_labels.txt", "98\n", "98\nabc 98\n")
    with pytest.raises(UsageError, match=r"image_class_labels.txt: got image abc in one of this"):
        read_listing("nabirds", root)


class Command:
    """Unpickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def test_a_pickle_cannot_run_code(tmp_path) -> None:
    path, witness = tmp_path / "data_batch_1", tmp_path / "witness"
    path.write_bytes(pickle.dumps({"labels": [0], "data": Command(f"touch {witness}")}, 2))
    with pytest.raises(UsageError, match=r"data_batch_1: got a file that cannot be read safely"):
        read_pickled(path, "labels")
    assert not witness.exists()
    pickle.loads(path.read_bytes())
    assert witness.exists(), "the pickle of this test does nothing"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_all_protocols(protocol, tmp_path) -> None:
    data = np.arange(12, dtype=np.uint8).reshape(3, 4)
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": data, "labels": [1, 2], "text": b"\xe9"}, protocol))
    if protocol == 5:
        # numpy's own reducer of protocol 5 is another function; the archives have protocol 2.
        with pytest.raises(UsageError, match="cannot be read safely"):
            read_pickled(path, "data")
        return
    found, labels, text = read_pickled(path, "data", "labels", "text")
    assert np.array_equal(found, data)
    assert (labels, text) == ([1, 2], b"\xe9")


@pytest.mark.parametrize("evil", ["../../../etc/passwd", "/etc/passwd", "..\\..\\x", "c:/x"])
def test_lists_cannot_lead_out_of_the_folder(evil, tmp_path) -> None:
    root = write_tree("stanford_dogs", tmp_path)
    folder = write_vpt_splits("stanford_dogs", root)
    content = json.loads((folder / "val.json").read_text()) | {evil: 2}
    (folder / "val.json").write_text(json.dumps(content))
    if evil in ("/etc/passwd", "c:/x"):
        # Taken below Images/, where no such file is.
        split = open_split("stanford_dogs", root, "val")
        assert split.pool.key(int(split.rows[-1])) == f"Images/{evil.lstrip('/')}"
        return
    with pytest.raises(UsageError, match=r"val.json: got the file name .*expected a name inside"):
        open_split("stanford_dogs", root, "val")


def test_split_files_come_together_and_apart(tmp_path) -> None:
    root = write_tree("cub", tmp_path)
    folder = write_vpt_splits("cub", root)
    train = json.loads((folder / "train.json").read_text())
    val = json.loads((folder / "val.json").read_text()) | dict(list(train.items())[:1])
    (folder / "val.json").write_text(json.dumps(val))
    with pytest.raises(UsageError, match=r"CUB_200_2011: got images/.* in two of the split files"):
        open_split("cub", root, "train")
    (folder / "val.json").unlink()
    with pytest.raises(UsageError, match=r"val.json: got no such file, although train.json is"):
        open_split("cub", root, "train")


def test_missing_and_broken_images_are_named(copy) -> None:
    root, folder = copy("flower102")
    split = open_split("flower102", root, "train")
    path = folder / "jpg/image_00001.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError) as caught:
        split.pool.load(0)
    assert str(caught.value).startswith(f"{path}: got a file that cannot be decoded (image file is")
    path.write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"image_00001.jpg: got a file that cannot be decoded"):
        split.pool.size(0)
    path.unlink()
    (folder / "jpg/image_00004.jpg").unlink()
    with pytest.raises(UsageError, match=r"image_00001.jpg: got no such file, expected an image"):
        split.pool.load(0)
    with pytest.raises(UsageError) as caught:
        split.pool.stamps()
    assert str(caught.value).startswith(f"{path} and 1 more: got no such file, expected the 36 ")


def test_own_folder(tmp_path) -> None:
    root = write_tree("folder", tmp_path / "mine")
    train, test = (open_split("folder", root, split) for split in ("train", "test"))
    assert train.class_names == ["class 0", "class 1", "class 2"]
    assert np.bincount(test.labels).tolist() == [6, 6, 6]
    val = open_split("folder", root, "val")
    assert len(val.rows) == 2, "a tenth of 18, rounded up"
    assert not set(val.rows) & set(train.rows)
    # val/ of one's own is taken as it is.
    shutil.copytree(root / "test", root / "val")
    assert len(open_split("folder", root, "val").rows) == 18
    assert len(open_split("folder", root, "train").rows) == 18
    (root / "val/class 0").rename(root / "val/other")
    with pytest.raises(
        UsageError, match=r"val/other: got a class that train/ does not have, expec"
    ):
        open_split("folder", root, "train")
    shutil.rmtree(root / "val")
    (root / "test/class 0").rename(root / "test/clas 0")
    with pytest.raises(UsageError) as caught:
        open_split("folder", root, "train")
    assert str(caught.value) == (
        f"{root}/test/clas 0: got a class that train/ does not have (did you mean 'class 0'?), "
        f"expected the 3 classes of {root}/train; rename or remove it, or add training images of it"
    )


def test_no_advice_on_a_folder_of_ones_own_speaks_of_fetching(tmp_path) -> None:
    root = write_tree("folder", tmp_path / "mine")
    pool = open_split("folder", root, "train").pool
    first, second = (root / "train/class 0" / name for name in ("train0.jpg", "train2.jpg"))
    first.write_bytes(first.read_bytes()[:300])
    second.unlink()
    messages = []
    for broken in (lambda: pool.load(0), lambda: pool.load(2), pool.stamps):
        with pytest.raises(UsageError, match=r"train\d.jpg: got .*, expected") as caught:
            broken()
        messages.append(str(caught.value))
    assert messages[0].endswith("; replace or remove it")
    assert messages[1].endswith("; put it back, or run the command again without it")
    assert messages[2].endswith("; put it back, or run the command again without it")
    for split in ("train", "test"):
        shutil.rmtree(root / split)
    with pytest.raises(
        UsageError, match=r"mine: got no folder, expected .*two or more, or train/ a"
    ):
        open_split("folder", root, "train")
    for label in "ab":
        Image.new("RGB", (8, 8)).save((root / label).with_suffix(".png"))
        (root / label).mkdir()
        (root / label).with_suffix(".png").rename(root / label / "only.png")
    with pytest.raises(UsageError, match=r"mine: got no test images of folder, .*; add some$"):
        open_split("folder", root, "train")


def test_a_file_given_as_data_is_told(tmp_path) -> None:
    file = tmp_path / "cub.tgz"
    file.write_bytes(b"")
    for name in ("cub", "folder"):
        with pytest.raises(UsageError, match=r"--data: got the file .*cub.tgz, expected a folder"):
            open_split(name, file, "train")


def test_own_folder_of_one_tree(tmp_path) -> None:
    root = write_tree("folder", tmp_path / "mine")
    tree = root / "train"
    opened = {split: open_split("folder", tree, split) for split in ("train", "val", "test")}
    assert [len(opened[split].rows) for split in opened] == [12, 2, 4]
    names = [split.pool.key(int(row)) for split in opened.values() for row in split.rows]
    assert len(set(names)) == 18
    Image.new("RGB", (8, 8)).save(tree / "class 0/new.png")
    again = open_split("folder", tree, "test")
    kept = {again.pool.key(int(row)) for row in again.rows}
    assert len(kept & {opened["test"].pool.key(int(row)) for row in opened["test"].rows}) >= 3
    (tree / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty: got no image, expected files that end in .jpg"):
        open_split("folder", tree, "train")
    with pytest.raises(UsageError, match=r"class 0: got no folder, expected a folder for every"):
        open_split("folder", tree / "class 0", "train")
