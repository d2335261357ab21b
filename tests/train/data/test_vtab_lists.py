"""Promise: a VTAB-1k task is read from its lists; a wrong list is named with its line."""

import csv
import re
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from vtab_trees import ONE_PER_GROUP, write_task

from tcpa.cli import UsageError
from tcpa.train.data.vtab import read_vtab, source_kind
from tcpa.train.data.vtab_tasks import GROUPS, SEEDS, TASKS, VTAB

PUBLISHED = """
Caltech101,102,6084 CIFAR-100,100,10000 DTD,47,1880 Flowers102,102,6149 Pets,37,3669
SVHN,10,26032 Sun397,397,21750 Camelyon,2,32768 EuroSAT,10,5400 Resisc45,45,6300
Retinopathy,5,42670 Clevr-Count,8,15000 Clevr-Dist,6,15000 DMLab,6,22735 KITTI-Dist,4,711
dSpr-Loc,16,73728 dSpr-Ori,16,73728 sNORB-Azi,18,12150 sNORB-Ele,9,12150
"""
"""Task, classes, test images: VPT's and the benchmark's papers."""


def test_the_tasks_are_those_of_the_benchmark() -> None:
    published = {
        title: (int(classes), int(test)) for title, classes, test in csv.reader(PUBLISHED.split())
    }
    assert {t.title: (t.classes, t.test) for t in TASKS.values()} == published
    assert {group: len(names) for group, names in GROUPS.items()} == {
        "natural": 7,
        "specialized": 4,
        "structured": 8,
    }
    assert {TASKS[name].group for name in ONE_PER_GROUP} == set(GROUPS)
    assert len({task.folder for task in TASKS.values()}) == 19
    assert SEEDS == (42, 44, 82, 100, 800)
    for name, dataset in VTAB.items():
        assert dataset.official == dataset.disjoint
        assert dataset.official == {"train": 800, "val": 200, "test": TASKS[name].test}


@pytest.mark.parametrize("name", ONE_PER_GROUP)
def test_a_task_is_read(name, tmp_path) -> None:
    folder = write_task(name, tmp_path)
    found = read_vtab(folder, TASKS[name])
    assert found.class_names == [str(label) for label in range(TASKS[name].classes)]
    train, test = found.pools["train"], found.pools["test"]
    assert (len(train), len(test)) == (24, 12)
    lines = (folder / "train800val200.txt").read_text().split("\n")[:-1]
    keys = [train.key(row) for row in range(24)]
    assert [f"{k} {label}" for k, label in zip(keys, found.labels["train"], strict=True)] == lines
    assert found.given["train"].tolist() == list(range(16))
    assert found.given["val"].tolist() == list(range(16, 24))
    image = np.asarray(train.load(1), float).mean((0, 1))
    expected = np.array([83, 151, 29])
    assert np.abs(image - expected).max() < 12, "the image of the label's colour"


def test_the_order_of_the_whole_list_may_differ_and_paths_may_have_spaces(tmp_path) -> None:
    folder = write_task("vtab-dtd", tmp_path, counts=(4, 2, 2))
    (folder / "images/train/000005.png").rename(folder / "images/train/a b.png")
    for file in ("val200.txt", "train800val200.txt"):
        text = (folder / file).read_text().replace("000005.png 1", "a b.png\t1")
        (folder / file).write_text("\n".join(reversed(text.split("\n"))) + "\n")
    found = read_vtab(folder, TASKS["vtab-dtd"])
    assert found.given["val"].tolist() == [0, 1] and found.pools["train"].key(0).endswith("a b.png")
    assert [found.pools["train"].key(r)[-5] for r in found.given["train"]] == ["0", "1", "2", "3"]
    found.pools["train"].load(0)


def edit(folder, file: str, before: str, after: str) -> None:
    text = (folder / file).read_text()
    assert before in text
    (folder / file).write_text(text.replace(before, after, 1))


FIRST = "images/train/000000.png"
BAD = {
    "outside": ("test.txt", "images/test/000024.png", "../../etc/passwd", "test.txt: got the file "
                "name '../../etc/passwd', expected a name inside"),
    "absolute": ("test.txt", "images/test/000024.png", "/etc/passwd", "'/etc/passwd', expected"),
    "drive": ("test.txt", "images/test/000024.png", "C:\\x.png", "expected a name inside"),
    "class": ("train800.txt", f"{FIRST} 0", f"{FIRST} 8",
              "train800.txt: got line 1: .* 8', expected a class from 0 to 7 at its end, as "
              "Clevr-Count has 8"),
    "negative": ("train800.txt", f"{FIRST} 0", f"{FIRST} -1", "expected a class from 0 to 7"),
    "word": ("test.txt", "000024.png 0", "000024.png cat", "line 1: .*cat', expected a class"),
    "other digits": ("test.txt", "000024.png 0", "000024.png \u0663", "expected a class"),
    "no class": ("val200.txt", "images/train/000016.png 0", "images/train/000016.png",
                 "val200.txt: got line 1: .*, expected lines of an image's path and its class"),
    "twice": ("test.txt", "000025", "000024", "line 2: .*, an image that is listed above"),
    "in both": ("val200.txt", "000016.png 0", "000000.png 0",
                f"val200.txt: got '{FIRST}', which is in train800.txt too"),
    "test in train": ("test.txt", "images/test/000024.png", FIRST,
                      f"test.txt: got '{FIRST}', which is in train800val200.txt too"),
    "not the parts": ("train800val200.txt", "000003.png 0", "000003.png 1",
                      r"train800val200.txt: got 'images/train/000003.png' with class 0 in "
                      r"train800.txt or val200.txt but not in train800val200.txt"),
    "more": ("train800val200.txt", "", "images/train/0.png 2\n", "class 2 in train800val200.txt "
             "but not in train800.txt and val200.txt"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "before", "after", "message"), BAD.values(), ids=BAD)
def test_a_wrong_line_is_named(file, before, after, message, tmp_path) -> None:
    folder = write_task("vtab-clevr-count", tmp_path)
    edit(folder, file, before, after)
    with pytest.raises(UsageError, match=message):
        read_vtab(folder, TASKS["vtab-clevr-count"])


@pytest.mark.parametrize("file", ["train800.txt", "val200.txt", "train800val200.txt", "test.txt"])
def test_a_missing_or_empty_list_is_named(file, tmp_path) -> None:
    folder = write_task("vtab-kitti", tmp_path)
    (folder / file).write_text("\n")
    with pytest.raises(UsageError, match=rf"{re.escape(file)}: got no line"):
        read_vtab(folder, TASKS["vtab-kitti"])
    (folder / file).unlink()
    with pytest.raises(UsageError, match=rf"{re.escape(file)}: got no such file, expected lines"):
        read_vtab(folder, TASKS["vtab-kitti"])


# Which images they are.


def kind_of(name: str, folder, stated="auto") -> str:
    task = TASKS[name]
    return source_kind(read_vtab(folder, task).pools["train"], task, stated).kind


def test_lossless_files_are_taken_for_the_originals(tmp_path) -> None:
    for name in ("vtab-svhn", "vtab-pets"):
        assert kind_of(name, write_task(name, tmp_path)) == "original"


def test_jpeg_files_of_lossless_originals_are_copies(tmp_path) -> None:
    folder = write_task("vtab-svhn", tmp_path, kind="jpg")
    found = source_kind(read_vtab(folder, TASKS["vtab-svhn"]).pools["test"], TASKS["vtab-svhn"])
    assert asdict(found) == {
        "kind": "jpeg",
        "reason": "12 of 12 files looked at are lossy, the originals are not",
    }
    assert kind_of("vtab-svhn", folder, "jpeg") == "jpeg"
    with pytest.raises(
        UsageError,
        match=r"--vtab-source: got original, expected jpeg or auto, as "
        r".*jpg is a lossy file and the originals of SVHN are lossless",
    ):
        kind_of("vtab-svhn", folder, "original")


@pytest.mark.parametrize(
    ("qualities", "kind"),
    [((75,), "jpeg"), ((90,), "unclear"), ((60, 75, 95), "original")],
    ids=["as Pillow by default", "one other setting", "several settings"],
)
def test_jpeg_files_of_jpeg_originals_are_told_by_their_settings(qualities, kind, tmp_path) -> None:
    folder = write_task("vtab-pets", tmp_path, kind="jpg")
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        with Image.open(path) as picture:
            picture.save(path, quality=qualities[number % len(qualities)])
    assert kind_of("vtab-pets", folder) == kind
    assert kind_of("vtab-pets", folder, "original") == "original"


def test_files_that_cannot_be_opened_decide_nothing(tmp_path) -> None:
    folder = write_task("vtab-svhn", tmp_path)
    (folder / FIRST).write_text("no image")
    assert kind_of("vtab-svhn", folder) == "original"
    for path in folder.rglob("*.png"):
        path.unlink()
    assert kind_of("vtab-svhn", folder) == "unclear"
