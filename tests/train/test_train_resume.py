"""Promise: a run that is killed at any moment resumes to bitwise the same end.

Everything that draws numbers is on: shuffling, augmentation, Mixup, prompt dropout and random
selection. A run saves after every step here, so that most kills have a checkpoint behind them.
"""

import functools
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
import train_zygote
from safetensors import safe_open
from train_runs import make_config, make_splits

from tcpa.cli import UsageError
from tcpa.train.engine.checkpoint import CURRENT, load_checkpoint
from tcpa.train.engine.interruption import defer_signals
from tcpa.train.jobs.run import run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed")

STEPS = 9
"""Of a whole run: three epochs of three batches."""

OPTIONS = {"epochs": 3, "learning_rate": 0.01}
RANDOM = random.Random(0)
KILLS = [
    *(("step", number) for number in RANDOM.sample(range(2, 2 + STEPS), 7)),
    *(("half", number) for number in RANDOM.sample(range(1, 12), 4)),
    *(("before", number) for number in RANDOM.sample(range(1, 20), 4)),
    *(("after", number) for number in RANDOM.sample(range(1, 20), 3)),
    *(("line", number) for number in RANDOM.sample(range(1, 12), 3)),
]
"""Where a run is killed, see `train_zygote`; the first batch is that of the pipeline's timing."""


@pytest.fixture(scope="module")
def train():
    return functools.partial(train_zygote.shared().train, **OPTIONS)


TIMES = ("seconds", "images_per_second")


def end_of(output: Path):
    """Return all that must be equal: tensors, state, losses of every step, result."""
    folder = output / "cub" / "vfpt+tcpa" / "official-seed3407"
    with safe_open(folder / CURRENT, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(file.metadata()["state"])
    del state["metrics_bytes"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    result = json.loads((folder / "result.json").read_text())
    result = {k: v for k, v in result.items() if "second" not in k}
    return tensors, state, lines, result


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert train(output) == 0
    return end_of(output)


def assert_same_end(output, uninterrupted):
    tensors, *rest = end_of(output)
    assert rest == list(uninterrupted[1:])
    assert tensors.keys() == uninterrupted[0].keys()
    for name, value in uninterrupted[0].items():
        assert torch.equal(tensors[name], value), name


def test_the_whole_run_is_what_the_others_are_compared_with(uninterrupted):
    tensors, state, lines, _ = uninterrupted
    assert state["step"] == STEPS
    # Not the last one, so that its values have to be carried over.
    assert state["best_epoch"] < state["epoch"]
    assert [line["step"] for line in lines if line["kind"] == "steps"] == [*range(1, STEPS + 1)]
    assert {line["kind"] for line in lines} == {"steps", "epoch", "evaluation"}
    kinds = {name.split("/")[0] for name in tensors}
    assert kinds == {"model", "optimizer", "best"}
    moments = [value for name, value in tensors.items() if "/exp_avg_sq/" in name]
    assert moments and all(bool((value > 0).any()) for value in moments)


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill[0]}-{kill[1]}")
def test_a_killed_run_ends_the_same(kill, train, uninterrupted, tmp_path):
    assert train(tmp_path, kill) == -9
    saved = bool(list(tmp_path.rglob("checkpoint*.safetensors")))
    assert train(tmp_path) == 0
    assert_same_end(tmp_path, uninterrupted)
    (environment,) = tmp_path.rglob("environment.json")
    assert (json.loads(environment.read_text())[-1]["from_step"] > 0) == saved


def test_a_run_that_is_killed_again_and_again_ends_the_same(train, uninterrupted, tmp_path):
    kills = [("step", 3), ("half", 2), ("line", 2), ("before", 4), ("step", 2), ("after", 3)]
    for kill in kills:
        assert train(tmp_path, kill) == -9
    assert train(tmp_path) == 0
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precisions_go_on_as_they_were(precision, train, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(whole, precision=precision) == 0
    assert train(killed, ("step", 6), precision=precision) == -9
    assert train(killed, precision=precision) == 0
    expected = end_of(whole)
    assert_same_end(killed, expected)
    # float16 has found its scale by skipping steps.
    assert bool(expected[1]["scaler"]) == (precision == "fp16")


def test_a_run_between_checkpoints_repeats_what_was_lost(train, uninterrupted, tmp_path):
    # Nothing is saved before the end: all of it is done again.
    assert train(tmp_path, ("step", 8), checkpoint_seconds=1e6) == -9
    assert train(tmp_path, checkpoint_seconds=1e6) == 0
    assert_same_end(tmp_path, uninterrupted)


# Asked to end.

ASKED = [
    ("SIGINT", 2, 1),
    ("SIGINT", 8, 5),
    ("SIGTERM", 6, 3),
    ("SIGTERM", 10, 7),
    ("tested", 1, 3),
    ("tested", 5, 9),
]
"""Signal, number of the batch with which it comes, and the step after which the run ends; the first
three batches are those of the pipeline's timing."""


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: f"{asked[0]}-{asked[1]}")
@pytest.mark.parametrize("seldom", [False, True], ids=["every-step", "between-looks"])
def test_a_run_that_is_asked_to_end_saves_and_ends_the_same(asked, seldom, train, tmp_path):
    signal_name, batch, step = asked
    # Nothing else is saved, and losses are looked at after two of three steps.
    options = {"log_steps": 2, "checkpoint_seconds": 1e6} if seldom else {}
    assert train(tmp_path / "whole", **options) == 0
    assert train(tmp_path, (signal_name, batch), **options) == (
        130 if signal_name == "SIGINT" else 143
    )
    (checkpoint,) = [path.parent for path in tmp_path.glob(f"cub/**/{CURRENT}")]
    found, _ = load_checkpoint(checkpoint)
    assert found is not None and found.state["step"] == step
    assert (tmp_path / "said.txt").read_text() == (
        f"stopped after step {step} of {STEPS}, which is saved; the same command resumes from there"
    )
    assert not list(tmp_path.glob("cub/**/result.json"))
    assert train(tmp_path, **options) == 0
    assert_same_end(tmp_path, end_of(tmp_path / "whole"))


def test_a_run_can_be_asked_again_and_again(train, uninterrupted, tmp_path):
    options = {"checkpoint_seconds": 1e6}
    for name in ("SIGTERM", "SIGINT", "tested", "SIGTERM"):
        assert train(tmp_path, (name, 2 if name != "tested" else 1), **options) in (130, 143)
    assert train(tmp_path, **options) == 0
    assert_same_end(tmp_path, uninterrupted)


def test_a_second_signal_ends_it_at_once(train, uninterrupted, tmp_path):
    assert train(tmp_path, ("twice", 4), checkpoint_seconds=1e6) == 130
    assert not list(tmp_path.glob("**/checkpoint*")) and not (tmp_path / "said.txt").exists()
    assert train(tmp_path) == 0
    assert_same_end(tmp_path, uninterrupted)


def test_a_loss_that_is_not_finite_is_not_saved_when_asked(tmp_path):
    splits = make_splits()
    epoch = splits.train.epoch

    def poisoned(number, start=0):
        for index, batch in enumerate(epoch(number, start), start):
            # Not in the timing of the pipeline.
            if (number, index) == (1, 1):
                batch.images[0] = torch.nan
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    splits.train.epoch = poisoned
    config = make_config(tmp_path, log_steps=3, checkpoint_seconds=1e6)
    with pytest.raises(UsageError, match="step 5: the loss is not finite"):
        run(config, splits)
    assert not list(tmp_path.glob("**/checkpoint*"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with defer_signals() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.received == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.received == signal.SIGTERM
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


FULL = [("disk", 1), ("disk", 2), ("disk", 3), ("disk", 4), ("disk", 7)]
TOO_LARGE = [("limit", 600), ("limit", 2500), ("limit", 50_000)]


@pytest.mark.parametrize("fault", FULL + TOO_LARGE, ids=lambda fault: f"{fault[0]}-{fault[1]}")
def test_a_full_disk_is_named_and_nothing_is_lost(fault, train, uninterrupted, tmp_path):
    assert train(tmp_path, fault) == 3
    message = (tmp_path / "error.txt").read_text()
    reason = "No space left on device" if fault in FULL else "File too large"
    assert reason in message and str(tmp_path) in message
    assert "run the same command again" in message
    saved = bool(list(tmp_path.rglob("checkpoint.safetensors")))
    assert ("it resumes from the last checkpoint" in message) == saved
    assert ("it restarts: nothing was saved yet" in message) != saved
    assert not list(tmp_path.rglob("*.part"))
    assert train(tmp_path) == 0
    assert_same_end(tmp_path, uninterrupted)
