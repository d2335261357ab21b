"""Promise: stages find the same on several processes as on one."""

import functools
import os

import pytest
import train_zygote
from equal_runs import assert_equal_runs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

OFF = {"prompt_dropout": None, "random_selection_epochs": None}
CASES = {
    "clusters": (2, 22, {"method": "dam-vp", **OFF}),
    "clusters with a process without a row": (3, 18, {"method": "dam-vp", **OFF}),
    "critical values": (2, 22, {"method": "lion", **OFF}),
}


@pytest.fixture(scope="module")
def train():
    return functools.partial(train_zygote.shared().train)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_several_processes_equal_one(case, train, tmp_path):
    processes, images, options = case
    assert train(tmp_path / "one", images=images, **options) == 0
    statuses = train(tmp_path / "several", images=images, processes=processes, **options)
    assert statuses == [0] * processes
    assert_equal_runs(tmp_path / "one", tmp_path / "several")


def test_counted_values_are_those_of_the_first_process(train, tmp_path):
    options = {"method": "adaptformer", "protocol": "val", **OFF}
    assert train(tmp_path, images=22, processes=2, **options) == [0, 0]
    pruned = {"method": "e2vpt", "prune_tokens": 0.4, "random_selection_epochs": None}
    assert train(tmp_path, images=22, processes=2, **pruned) == [0, 0]
