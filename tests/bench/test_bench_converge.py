"""Promise: trainings that should be the same are told from trainings that are not."""

import numpy as np
import pytest

from tcpa.bench import __main__ as cli
from tcpa.bench import converge
from tcpa.bench.harness import model
from tcpa.bench.harness.results import load
from tcpa.train.engine import step as engine_step

SMALL = ["--model", "test_vit", "--device", "cpu", "--batch", "4", "--steps", "20"]
SMALL += ["--repeats", "2"]


def run(*arguments):
    return cli.main(["converge", *SMALL, *arguments])


def test_the_fast_attention_trains_like_the_reference(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    assert run("--impl", "dense", "--precision", "bfloat16", "--results", str(path)) == 0
    printed = capsys.readouterr().out
    assert "dense" in printed and "2 of 2 repeats" in printed
    found = {row.metric: row for row in load(path)}
    apart = found["distance from the reference"].p50
    assert apart < found["distance between orders"].p20
    assert found["repeats equal to the last bit"].p50 == 100
    assert {row.provider for row in found.values()} == {"dense"}


def test_the_loss_falls():
    case = converge.StepCase(model="test_vit", batch=8)
    provider = converge.StepProvider(name="reference", impl="reference")
    curve = converge.windows(converge.losses(case, provider, 40, 0))
    assert len(curve) == 4 and curve[-1] < 0.8 * curve[0]


def test_another_training_is_noticed(monkeypatch, capsys):
    real = converge.losses

    def drifting(case, provider, steps, order):
        drift = 0.0 if provider.impl == "reference" else 1.0
        return real(case, provider, steps, order) + drift

    monkeypatch.setattr(converge, "losses", drifting)
    assert run("--impl", "sdpa", "--precision", "float32") == 1


def test_a_step_that_differs_is_noticed(monkeypatch):
    noise = iter(range(100))
    real = model.losses
    monkeypatch.setattr(converge, "losses", lambda *_: np.arange(20.0) * 0)
    monkeypatch.setattr(engine_step, "losses", lambda *a: real(*a) + 1e-3 * next(noise))
    assert run("--precision", "float32") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: got 0, expected at least 1"),
        (["--model", "vit"], "--model: got 'vit', expected a timm model"),
        (["--device", "cuda:99"], "--device: got 'cuda:99'"),
    ],
)
def test_bad_options_are_refused_by_name(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
