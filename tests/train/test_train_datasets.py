"""Promise: every HTA dataset trains, from its real on-disk format, with the real loaders."""

import json
import shutil

import pytest
import torch
from dataset_trees import write_tree
from train_runs import make_config

import tcpa
from tcpa.cli import UsageError
from tcpa.train.engine.data import load_splits
from tcpa.train.engine.distributed import World
from tcpa.train.jobs.run import run
from tcpa.train.recipes.runspec import resolve

OPTIONS = {"resize": 40, "image_size": 32, "batch_size": 8}


@pytest.mark.parametrize("name", [*tcpa.HTA_DATASETS, "folder"])
def test_two_epochs_of_every_dataset(name, tmp_path):
    root = write_tree(name, tmp_path / "data", classes=3, per_class=6)
    cache = tmp_path / "cache"
    config = make_config(tmp_path / "runs", dataset=name, data=root, cache=cache, **OPTIONS)
    result = run(config)
    assert result.dataset == name and result.epochs == 2 and 0 <= result.accuracy <= 100
    (folder,) = (tmp_path / "runs").glob("*/*/*")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("epoch") == 2
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    (start,) = json.loads((folder / "environment.json").read_text())
    data = start["data"]
    assert data.keys() == {"train", "test"}
    assert data["train"]["images"] == result.train_images
    assert data["train"]["cache"] and data["test"]["cache"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pool_size": 4, "top_k": 5},
            "--top-k: got 5, expected at most the cls pool's 4 entries; ",
        ),
        (
            {"pool_size": 4, "top_k": None},
            "--pool-size: got 4, expected 10 or more, which a token ",
        ),
        (
            {"pool_size": None, "top_k": 1000},
            "--top-k: got 1000, expected at most the cls pool's 18",
        ),
    ],
)
def test_more_entries_than_there_are_name_the_option(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        resolve(make_config(tmp_path, **options))


def test_each_protocol_reads_its_splits(tmp_path):
    root = write_tree("dtd", tmp_path / "data", classes=3, per_class=10)
    world = World(torch.device("cpu"))
    for protocol, expected in (
        ("official", {"test"}),
        ("val", {"val", "test"}),
        ("last", {"test"}),
    ):
        config = make_config(tmp_path, dataset="dtd", data=root, protocol=protocol, **OPTIONS)
        splits = load_splits(resolve(config), world)
        assert splits.evaluation.keys() == expected
        assert splits.num_classes == 3
        assert splits.record.keys() == {"train"} | expected


def test_processes_share_out_a_batch_that_mixes(tmp_path):
    root = write_tree("dtd", tmp_path / "data", classes=3, per_class=7)
    parts = []
    for rank in range(2):
        config = make_config(tmp_path, dataset="dtd", data=root, **OPTIONS)
        world = World(torch.device("cpu"), rank, 2)
        splits = load_splits(resolve(config), world)
        parts.append([len(batch.images) for batch in splits.train.epoch(0)])
        tested = sum(len(batch.images) for batch in splits.evaluation["test"].epoch(0))
        assert 0 < tested < splits.evaluation["test"].num_images
    # 21 images: 8, 8 and, without the odd one, 4.
    assert [a + b for a, b in zip(*parts, strict=True)] == [8, 8, 4]


def test_missing_data_name_the_command_that_fetches_them(tmp_path):
    config = make_config(tmp_path / "runs", dataset="cub", data=tmp_path / "data")
    with pytest.raises(UsageError, match="tcpa-train data prepare cub"):
        run(config)


def test_an_unknown_dataset_is_named(tmp_path):
    config = make_config(tmp_path / "runs", dataset="cube", data=tmp_path)
    with pytest.raises(UsageError, match=r"DATASET: got 'cube', expected dtd, .*mean 'cub'\?"):
        run(config)
    assert not (tmp_path / "runs").exists()


def test_a_class_without_test_images_and_held_out_images_are_told(tmp_path, capsys):
    root = write_tree("folder", tmp_path / "mine", classes=3, per_class=10)
    shutil.rmtree(root / "test" / "class 1")
    options = OPTIONS | {"epochs": 1, "protocol": "val", "cache": tmp_path / "cache"}
    run(make_config(tmp_path / "runs", dataset="folder", data=root, **options))
    printed = " ".join(capsys.readouterr().out.split())
    assert "27 training, 3 validation, 20 test images, 3 classes" in printed
    assert "to train on: 10% of the training images held out" in printed
    assert "note: no test images of 1 of 3 classes: class 1" in printed
