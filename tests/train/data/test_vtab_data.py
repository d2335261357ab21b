"""Promise: a VTAB-1k task is a dataset like the others: prepared, verified, split and squashed."""

import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vtab_trees import ONE_PER_GROUP, write_task

from tcpa.cli import UsageError
from tcpa.train.__main__ import main
from tcpa.train.data.cached import open_cached
from tcpa.train.data.pools import squash
from tcpa.train.data.prepare import prepare
from tcpa.train.data.splits import open_split, training_split
from tcpa.train.data.verify import verify
from tcpa.train.data.vtab_tasks import LISTS, TASKS

WHOLE = "vtab-kitti"
"""The smallest test split, 711 images."""


def test_splits_are_those_of_the_lists_under_every_protocol(tmp_path) -> None:
    write_task("vtab-pets", tmp_path)
    for protocol in ("official", "val", "last"):
        counts = {
            split: len(open_split("vtab-pets", tmp_path, split, protocol=protocol).rows)
            for split in LISTS
        }
        assert counts == {"train": 16, "val": 8, "trainval": 24, "test": 12}
    record = open_split("vtab-pets", tmp_path, "val").record
    assert record["rule"] == "val200.txt" and record["source"]["kind"] == "original"
    assert (record["expected_images"], record["complete"]) == (200, False)
    assert training_split("vtab-pets", "val") == "train" == training_split("dtd", "last")
    assert (
        training_split("vtab-pets", "last") == "trainval" == training_split("vtab-pets", "official")
    )


def test_verify_finds_a_whole_task_in_order_and_names_what_differs(tmp_path, capsys) -> None:
    folder = write_task(WHOLE, tmp_path, counts=(800, 200, 711), size=(6, 4))
    assert main(["data", "verify", WHOLE, "--data", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for count in ("every    train     800", "val       200", "trainval   1,000", "test      711"):
        assert count in printed
    assert "vtab-kitti source: original: none of 64 files looked at is lossy" in printed
    (folder / "images/test/001000.png").write_bytes(b"broken")
    (folder / "images/test/001001.png").unlink()
    lines = (folder / "test.txt").read_text().splitlines()
    (folder / "test.txt").write_text("\n".join(lines[:-1]))
    assert main(["data", "verify", WHOLE, "--data", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "test (every): got 710 images, expected 711" in told
    assert re.search(r"001000.png: got a file that cannot be decoded", told)
    assert re.search(r"001001.png: got no such file", told)


@pytest.mark.parametrize("name", ONE_PER_GROUP)
def test_wrong_counts_are_named(name, tmp_path) -> None:
    write_task(name, tmp_path, counts=(4, 2, 3), size=(8, 8))
    assert verify(name, tmp_path).problems == [
        "train (every): got 4 images, expected 800",
        "val (every): got 2 images, expected 200",
        f"test (every): got 3 images, expected {TASKS[name].test:,}",
        "trainval (every): got 6 images, expected 1,000",
    ]


def test_all_tasks_are_verified_together(tmp_path, capsys) -> None:
    write_task(WHOLE, tmp_path, counts=(800, 200, 711), size=(6, 4))
    write_task("vtab-dtd", tmp_path, counts=(4, 2, 3), size=(8, 8))
    assert main(["data", "verify", "vtab", "--data", str(tmp_path), "--no-images"]) == 2
    printed = capsys.readouterr()
    assert "vtab-kitti: each of 1,711 images of 4 classes is there" in printed.out
    assert "got vtab-dtd with 4 differences" in printed.err
    assert printed.err.count("got no such folder") == 17, "every other task is named"


def test_a_broken_list_is_the_only_problem(tmp_path) -> None:
    folder = write_task("vtab-dmlab", tmp_path)
    (folder / "val200.txt").unlink()
    (problem,) = verify("vtab-dmlab", tmp_path).problems
    assert "val200.txt: got no such file, expected lines of an image's path" in problem


def test_all_tasks_are_unpacked_from_one_archive(tmp_path) -> None:
    for name in ("vtab-pets", "vtab-svhn"):
        write_task(name, tmp_path / "made", counts=(4, 2, 3))
    archives = tmp_path / "data/archives/vtab-1k"
    archives.mkdir(parents=True)
    with pytest.raises(UsageError, match=r"put it at .*archives/vtab-1k/vtab-1k.zip \(4.7 GB"):
        prepare("vtab-pets", tmp_path / "data", offline=True)
    shutil.make_archive(str(archives / "vtab-1k"), "zip", tmp_path / "made")
    said: list[str] = []
    for name in ("vtab-pets", "vtab-svhn", "vtab-pets"):
        prepare(name, tmp_path / "data", offline=True, report=said.append)
        assert len(open_split(name, tmp_path / "data", "test").rows) == 3
    assert ["its content is there" in line for line in said] == [False, False, True]
    with pytest.raises(UsageError, match=r"without vtab-1k/dtd/images"):
        prepare("vtab-dtd", tmp_path / "data", offline=True)


def test_a_task_that_is_not_there_names_the_command(tmp_path) -> None:
    with pytest.raises(UsageError, match="run `tcpa-train data prepare vtab-dtd --data"):
        open_split("vtab-dtd", tmp_path, "train")


# Preparation of the images.


def reference(picture: Image.Image, side: int) -> np.ndarray:
    """Resize as TensorFlow's image.resize does: half-pixel centres, two neighbours an axis."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double()
    size = (side, side)
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False)[0].numpy()


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    side=st.integers(1, 40),
    seed=st.integers(0),
)
@settings(max_examples=60, deadline=None)
def test_squashing_is_bilinear_interpolation_to_a_square(width, height, side, seed) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    picture = Image.fromarray(pixels)
    found = np.array(squash(picture, side)).transpose(2, 0, 1)
    assert found.shape == (3, side, side) and found.dtype == np.uint8
    assert np.abs(found - reference(picture, side)).max() <= 0.501


SHAPES = {"large": (48, 40), "small squares": (16, 16), "small, oblong": (10, 24)}


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
def test_the_cache_hands_out_squares(size, tmp_path) -> None:
    write_task("vtab-eurosat", tmp_path, counts=(4, 2, 3), size=size)
    found = open_cached("vtab-eurosat", tmp_path, "trainval", protocol="last", resize=32)
    other = open_cached("vtab-eurosat", tmp_path, "trainval", protocol="last", resize=24)
    assert other.cache.resize == 24 and other.cache.folder != found.cache.folder
    assert found.cache.small is (size == (16, 16)), "squares are enlarged when they are needed"
    opened = open_split("vtab-eurosat", tmp_path, "trainval", protocol="last")
    for row in found.rows:
        image = found.cache.image(row)
        expected = reference(opened.pool.load(row), 32)
        assert image.shape == (3, 32, 32)
        # Enlarging rounds twice, rows and columns.
        assert np.abs(image - expected).max() <= (1.01 if found.cache.small else 0.501)
