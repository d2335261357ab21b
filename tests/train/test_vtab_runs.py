"""Promise: one task of each group of VTAB-1k trains under VPT's protocol, and says what it read."""

import json

import pytest
import torch
from dataset_trees import write_tree
from train_runs import SIZE, make_config
from vtab_trees import ONE_PER_GROUP, write_task

from tcpa.cli import UsageError
from tcpa.train.engine.data import load_splits
from tcpa.train.engine.distributed import World
from tcpa.train.jobs.run import run
from tcpa.train.options.run import RunConfig
from tcpa.train.recipes.runspec import resolve


def config_of(name, root, **options) -> RunConfig:
    given = {"dataset": name, "data": root / "data", "protocol": "auto"} | options
    return make_config(root / "runs", **given)


@pytest.mark.parametrize("name", ONE_PER_GROUP)
def test_two_epochs_of_a_task_of_each_group(name, tmp_path) -> None:
    kind = "jpg" if name == "vtab-clevr-count" else "png"
    write_task(name, tmp_path / "data", kind=kind)
    result = run(config_of(name, tmp_path, method="linear"))
    assert (result.protocol, result.chosen_on, result.epoch) == ("last", None, 2)
    assert (result.train_images, result.test_images) == (24, 12), "800 and 200 together"
    assert result.source == ("jpeg" if kind == "jpg" else "original")
    (folder,) = (tmp_path / "runs").glob("*/*/*")
    (start,) = json.loads((folder / "environment.json").read_text())
    data = start["data"]
    assert data["train"]["rule"] == "train800val200.txt" and data["test"]["rule"] == "test.txt"
    for split in data.values():
        assert split["source"]["kind"] == ("jpeg" if kind == "jpg" else "original")
        assert split["cache"]["resize"] == SIZE
    saved = json.loads((folder / "config.json").read_text())
    assert saved["options"]["vtab_source"] == "auto" and saved["recipe"]["resize"] == SIZE


def test_tuning_trains_on_800_and_never_opens_the_test_images(tmp_path) -> None:
    folder = write_task("vtab-pets", tmp_path / "data")
    for path in (folder / "images/test").iterdir():
        path.unlink()
    result = run(config_of("vtab-pets", tmp_path, method="linear", protocol="tune"))
    assert (result.train_images, result.test_images, result.measured_on) == (16, 0, "val")
    assert result.accuracy == result.val_accuracy and result.last_accuracy is None
    with pytest.raises(UsageError, match=r"images/test/000024.png and 11 more: got no such file"):
        run(config_of("vtab-pets", tmp_path, method="linear", protocol="last"))


def test_tuning_on_hta_leaves_out_the_test_images(tmp_path) -> None:
    data = write_tree("dtd", tmp_path / "data", classes=3, per_class=4)
    for name in (data / "DTD/dtd/dtd/labels/test1.txt").read_text().split():
        (data / "DTD/dtd/dtd/images" / name).unlink()
    given = {"dataset": "dtd", "data": data, "method": "linear", "resize": 40}
    result = run(make_config(tmp_path / "runs", protocol="tune", **given))
    assert (result.measured_on, result.test_images, result.chosen_on) == ("val", 0, None)


def test_training_images_are_not_augmented(tmp_path) -> None:
    write_task("vtab-pets", tmp_path / "data")
    config = config_of("vtab-pets", tmp_path, method="linear", mixup_alpha=0.0, normalize="none")
    splits = load_splits(resolve(config), World(torch.device("cpu")))

    def images(epoch: int) -> torch.Tensor:
        found = torch.cat([batch.images for batch in splits.train.epoch(epoch)])
        assert found.shape == (24, 3, SIZE, SIZE) and found.min() >= 0 and found.max() <= 1
        return torch.tensor(sorted(found.sum((1, 2, 3)).tolist()))

    assert torch.equal(images(0), images(1)), "the same pixels in another order"


def test_what_the_images_are_can_be_stated(tmp_path) -> None:
    write_task("vtab-pets", tmp_path / "data", kind="jpg")
    config = config_of("vtab-pets", tmp_path, method="linear", vtab_source="original")
    splits = load_splits(resolve(config), World(torch.device("cpu")))
    assert splits.record["train"]["source"] == {
        "kind": "original",
        "reason": "stated by --vtab-source",
    }


def test_a_side_that_is_no_square_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"--resize: got 40, expected 32; images of VTAB-1k are "):
        resolve(config_of("vtab-pets", tmp_path, resize=40))
    assert resolve(config_of("vtab-pets", tmp_path, resize=SIZE)).resize == SIZE


def test_the_usual_protocol_is_that_of_the_benchmark() -> None:
    assert RunConfig(dataset="vtab-dtd").protocol == "last"
    assert RunConfig(dataset="dtd").protocol == "official"
    assert RunConfig(dataset="vtab-dtd", protocol="val").protocol == "val"
