"""Promise: a run that is killed at any moment goes on to bitwise the same end.

Everything that draws numbers is on: shuffling, augmentation, Mixup, prompt dropout and random
selection. A run saves after every step here, so that most kills have a checkpoint behind them.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tcpa.train.engine.checkpoint import CURRENT

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


class Zygote:
    """Answers jobs with exit statuses."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("train_zygote.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def train(self, output: Path, kill: tuple | None = None, **options) -> int:
        assert self._process.stdin and self._process.stdout
        job = {"output": str(output), "options": OPTIONS | options, "kill": kill}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def stop(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def zygote():
    found = Zygote()
    yield found
    found.stop()


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
def uninterrupted(zygote, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert zygote.train(output) == 0
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
    assert [line["step"] for line in lines if line["kind"] == "steps"] == [*range(1, STEPS + 1)]
    assert {line["kind"] for line in lines} == {"steps", "epoch", "evaluation"}
    kinds = {name.split("/")[0] for name in tensors}
    assert kinds == {"model", "optimizer", "best"}
    moments = [value for name, value in tensors.items() if "/exp_avg_sq/" in name]
    assert moments and all(bool((value > 0).any()) for value in moments)


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill[0]}-{kill[1]}")
def test_a_killed_run_ends_the_same(kill, zygote, uninterrupted, tmp_path):
    assert zygote.train(tmp_path, kill) == -9
    assert zygote.train(tmp_path) == 0
    assert_same_end(tmp_path, uninterrupted)


def test_a_run_that_is_killed_again_and_again_ends_the_same(zygote, uninterrupted, tmp_path):
    kills = [("step", 3), ("half", 2), ("line", 2), ("before", 4), ("step", 2), ("after", 3)]
    for kill in kills:
        assert zygote.train(tmp_path, kill) == -9
    assert zygote.train(tmp_path) == 0
    assert_same_end(tmp_path, uninterrupted)


def test_a_run_between_checkpoints_repeats_what_was_lost(zygote, uninterrupted, tmp_path):
    # Nothing is saved before the end: all of it is done again.
    assert zygote.train(tmp_path, ("step", 8), checkpoint_seconds=1e6) == -9
    assert zygote.train(tmp_path, checkpoint_seconds=1e6) == 0
    assert_same_end(tmp_path, uninterrupted)


FULL = [("disk", 1), ("disk", 2), ("disk", 3), ("disk", 4), ("disk", 7)]
TOO_LARGE = [("limit", 600), ("limit", 2500), ("limit", 50_000)]


@pytest.mark.parametrize("fault", FULL + TOO_LARGE, ids=lambda fault: f"{fault[0]}-{fault[1]}")
def test_a_full_disk_is_named_and_nothing_is_lost(fault, zygote, uninterrupted, tmp_path):
    assert zygote.train(tmp_path, fault) == 3
    message = (tmp_path / "error.txt").read_text()
    reason = "No space left on device" if fault in FULL else "File too large"
    assert reason in message and str(tmp_path) in message
    assert "run the same command again" in message
    assert not list(tmp_path.rglob("*.part"))
    assert zygote.train(tmp_path) == 0
    assert_same_end(tmp_path, uninterrupted)
