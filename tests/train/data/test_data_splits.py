"""Splits: the official rules with their faults under `official`, disjoint ones elsewhere."""

import random

import numpy as np
import pytest
from dataset_trees import write_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpa import HTA_DATASETS
from tcpa.cli import UsageError
from tcpa.train.data.registry import HTA
from tcpa.train.data.splits import open_split
from tcpa.train.data.stratify import held_out


@pytest.fixture(scope="module", params=HTA_DATASETS)
def tree(request, tmp_path_factory):
    name = request.param
    # Ten training images of a class, so that 80 % is a whole number; GTSRB: 10 tracks of three.
    count = 30 if name == "gtsrb" else 10
    root = tmp_path_factory.mktemp(name)
    return name, write_tree(name, root, classes=3, per_class=count, size=(12, 12))


def rows(name, root, split, protocol):
    return open_split(name, root, split, protocol=protocol).rows


def test_disjoint_splits_share_nothing(tree) -> None:
    name, root = tree
    train, val, both = (rows(name, root, split, "val") for split in ("train", "val", "trainval"))
    assert not set(train) & set(val)
    assert sorted([*train, *val]) == both.tolist()
    opened = open_split(name, root, "val", protocol="val")
    counts = np.bincount(opened.labels, minlength=3)[:3]
    assert counts.min() == counts.max(), "not stratified"
    share = {"given": 0.5, "vpt": 0.1, "first": 0.2, "shuffle": 0.2}[HTA[name].rule]
    assert len(val) == share * len(both)
    assert open_split(name, root, "train", protocol="last").rows.tolist() == train.tolist()


def test_official_splits(tree) -> None:
    name, root = tree
    train, val = (rows(name, root, split, "official") for split in ("train", "val"))
    count, rule = len(rows(name, root, "trainval", "val")), HTA[name].rule
    if rule == "first":
        assert train.tolist() == list(range(24))
        assert val.tolist() == list(range(24, 30))
    elif rule == "shuffle":
        # As the official code does it: seed once, shuffle the list for train, then for val.
        random.seed(3407)
        first, second = list(range(count)), list(range(count))
        random.shuffle(first)
        random.shuffle(second)
        kept = int(0.8 * count)
        assert train.tolist() == first[:kept]
        assert val.tolist() == second[kept:]
        assert set(train) & set(val), "the official code's leak"
    else:
        assert not set(train) & set(val)
    with pytest.raises(UsageError, match="split: got trainval with protocol official, expected"):
        open_split(name, root, "trainval")


def test_test_images_do_not_depend_on_the_protocol(tree) -> None:
    name, root = tree
    official, disjoint = (open_split(name, root, "test", protocol=p) for p in ("official", "val"))
    assert official.rows.tolist() == disjoint.rows.tolist()
    assert official.labels.tolist() == disjoint.labels.tolist()
    assert len(official.rows) == len(official.pool)


def test_records_tell_the_rule(tree) -> None:
    name, root = tree
    record = open_split(name, root, "train").record
    assert record["expected_images"] == HTA[name].official["train"]
    assert record["complete"] is False, "a small tree is not the dataset"
    assert record["images"] == len(rows(name, root, "train", "official"))
    if HTA[name].rule == "vpt":
        assert "this split is ours, not the authors'" in record["rule"]


def test_tracks_stay_whole(tmp_path) -> None:
    root = write_tree("gtsrb", tmp_path, classes=3, per_class=30, size=(12, 12))
    split = open_split("gtsrb", root, "val", protocol="val")
    keys = [split.pool.key(int(row)).rpartition("_")[0] for row in split.rows]
    assert sorted(keys.count(key) for key in set(keys)) == [3] * 6
    assert "tracks stay whole" in split.record["rule"]
    official = open_split("gtsrb", root, "val")
    leaked = [official.pool.key(int(row)).rpartition("_")[0] for row in official.rows]
    assert any(leaked.count(key) < 3 for key in leaked), "the official rule tears tracks apart"


REAL = [
    ("cub", [30] * 194 + [29] * 6),
    ("nabirds", [43] * 554 + [107]),
    ("stanford_dogs", [100] * 120),
    ("food101", [750] * 101),
    ("cifar10", [5000] * 10),
    ("cifar100", [500] * 100),
    ("svhn", HTA["svhn"].train_per_class),
]


@pytest.mark.parametrize(("name", "sizes"), REAL, ids=[name for name, _ in REAL])
def test_our_splits_have_the_official_counts(name, sizes) -> None:
    """With classes of about the real sizes (for NABirds and CUB only the sum is exact)."""
    counts = HTA[name].disjoint
    assert sum(sizes) == counts["train"] + counts["val"]
    labels = np.repeat(np.arange(len(sizes)), sizes)
    share = 0.1 if HTA[name].rule == "vpt" else 0.2
    val = held_out(labels, [str(row) for row in range(len(labels))], share)
    assert len(val) == counts["val"]
    if name == "gtsrb":
        return
    of_class = np.bincount(labels[val], minlength=len(sizes))
    assert np.abs(of_class - share * np.array(sizes)).max() < 1


def test_gtsrb_counts() -> None:
    # 888 tracks of 30 images over 43 classes, 26,640 images.
    tracks = np.repeat(np.arange(43), [20] * 28 + [22] * 14 + [20])
    assert len(tracks) == 888
    keys = [f"{label}/{track}" for track, label in enumerate(tracks) for _ in range(30)]
    val = held_out(np.repeat(tracks, 30), keys, 0.2)
    assert len(val) == HTA["gtsrb"].disjoint["val"] == 5340


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=8),
    share=st.floats(0.05, 0.5),
    seed=st.integers(0, 3),
)
def test_held_out(sizes, share, seed) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    keys = [f"image {row}" for row in range(len(labels))]
    val = held_out(labels, keys, share, seed)
    assert len(set(val)) == len(val) <= np.ceil(share * len(labels))
    left = np.bincount(np.delete(labels, val), minlength=len(sizes))
    assert left.min() >= 1, "a class lost all its training images"
    # Neither the order of the files nor that of the classes changes which images are taken.
    turned = held_out(labels[::-1].copy(), keys[::-1], share, seed)
    assert {keys[row] for row in val} == {keys[::-1][row] for row in turned}


def test_another_seed_holds_out_others() -> None:
    labels, keys = np.zeros(100, np.int64), [str(row) for row in range(100)]
    assert held_out(labels, keys, 0.2, 0).tolist() != held_out(labels, keys, 0.2, 1).tolist()
