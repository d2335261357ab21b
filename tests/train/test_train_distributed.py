"""Promise: several processes train what one trains: same global batch, same losses, same steps.

Processes talk through gloo on the CPU. Dropout and random selection draw other numbers on every
process, so they are off where runs are compared.
"""

import functools
import json
import os

import pytest
import torch
import train_zygote
from equal_runs import assert_equal_runs, end_of
from train_runs import make_config, make_splits

from tcpa.cli import UsageError
from tcpa.train.engine import distributed
from tcpa.train.engine.distributed import World
from tcpa.train.engine.trainer import Mixer
from tcpa.train.recipes.runspec import resolve

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

COMPARED = {"prompt_dropout": 0.0, "random_selection_epochs": 0}


@pytest.fixture(scope="module")
def train():
    return functools.partial(train_zygote.shared().train, **COMPARED)


CASES = {
    "uneven parts": (2, 22, {}),
    "odd batches without mixing": (2, 21, {"mixup_alpha": 0.0}),
    "a process without a row": (3, 18, {}),
    "plain prompts": (2, 22, {"method": "vfpt", "random_selection_epochs": None}),
    "chosen on validation": (2, 22, {"protocol": "val"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_several_processes_equal_one(case, train, tmp_path):
    processes, images, options = case
    one, several = tmp_path / "one", tmp_path / "several"
    assert train(one, images=images, **options) == 0
    statuses = train(several, images=images, processes=processes, **options)
    assert statuses == [0] * processes
    assert_equal_runs(one, several)


def test_a_run_of_two_processes_goes_on_after_a_kill(train, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole, processes=2, prompt_dropout=0.1, random_selection_epochs=1) == [0, 0]
    statuses = train(
        broken, ("line", 4), processes=2, prompt_dropout=0.1, random_selection_epochs=1
    )
    # The other one notices that its partner is gone.
    assert statuses[0] == -9 and statuses[1] != 0
    assert train(broken, processes=2, prompt_dropout=0.1, random_selection_epochs=1) == [0, 0]
    assert_equal_runs(whole, broken, rtol=1e-12)
    first, second = end_of(whole)[0], end_of(broken)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("log_steps", [1, 4])
def test_processes_of_which_one_is_asked_to_end_do_so_together(log_steps, train, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"prompt_dropout": 0.1, "random_selection_epochs": 1, "log_steps": log_steps}
    options |= {"processes": 2, "checkpoint_seconds": 1e6, "epochs": 3}
    assert train(whole, **options) == [0, 0]
    # The last process alone gets it; all know it one step later.
    for kill in (("SIGTERM", 4), ("SIGINT", 4), ("tested", 1)):
        status = 128 + (2 if kill[0] == "SIGINT" else 15)
        assert train(broken, kill, **options) == [status, status]
    assert "which is saved; the same command" in (broken / "said.txt").read_text()
    assert train(broken, **options) == [0, 0]
    assert_equal_runs(whole, broken, rtol=0)
    first, second = end_of(whole)[0], end_of(broken)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_first_process_alone_writes(train, tmp_path):
    assert train(tmp_path, processes=2) == [0, 0]
    (folder,) = tmp_path.glob("*/*/*")
    (start,) = json.loads((folder / "environment.json").read_text())
    assert start["processes"] == 2
    assert len(json.loads((folder / "result.json").read_text())) > 20


def test_parts_of_a_batch_are_mixed_as_the_whole(tmp_path):
    settings = resolve(make_config(tmp_path))
    mixer = Mixer(settings, 4)
    (whole,) = list(make_splits(8).train.epoch(0))
    mixed = {step: mixer(whole.images.clone(), whole.labels, epoch=3, step=step) for step in (0, 5)}
    assert not torch.equal(mixed[0][1], mixed[5][1])
    for world in (2, 3, 4):
        for rank in range(world):
            (part,) = list(make_splits(8, rank=rank, world=world).train.epoch(0))
            rows = [i for i in range(8) if min(i, 7 - i) % world == rank]
            for step, (images, targets) in mixed.items():
                found = mixer(part.images.clone(), part.labels, epoch=3, step=step)
                assert torch.equal(found[0], images[rows]) and torch.equal(found[1], targets[rows])


def test_one_gpu_by_number_cannot_serve_all_processes(monkeypatch):
    monkeypatch.setattr(distributed, "choose_device", torch.device)
    with pytest.raises(UsageError, match="--device: got cuda:1 under torchrun"):
        distributed._local_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="more than 3 processes, expected at most 2"):
        distributed._local_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed._local_device("cuda") == torch.device("cuda", 1)
    assert distributed._local_device("cpu") == torch.device("cpu")


def test_one_process_needs_no_group():
    world = World(torch.device("cpu"))
    assert world.is_main and world.agree(True) and world.share({"a": 1}) == {"a": 1}
    assert torch.equal(world.sum(torch.ones(2)), torch.ones(2))
