"""Promise: on a day with a GPU one command measures everything, and was rehearsed before."""

import json
import signal

import pytest

from tcpa.bench import __main__ as cli
from tcpa.bench import gpu
from tcpa.bench.gpu import Stage, stages
from tcpa.bench.harness.results import load

ECHO = ("-c", "import sys; sys.exit(int(sys.argv[1]))")


def test_the_rehearsal_runs_every_stage(tmp_path, capfd, monkeypatch):
    """The commands of bench run in this process, which has done the imports."""
    start = gpu.run

    def run(stage, results, seconds):
        _, module, *arguments = stage.arguments
        if module != "tcpa.bench":
            return start(stage, results, seconds)
        extra = ("--results", str(results)) if stage.keeps_results else ()
        return cli.main([*arguments, *extra])

    monkeypatch.setattr(gpu, "run", run)
    results = tmp_path / "results.jsonl"
    arguments = ["gpu", "--rehearse", "--results", str(results)]
    status = cli.main(arguments)
    printed = capfd.readouterr()
    assert status == 0, printed.err[-2000:]
    assert not results.with_suffix(".stages.json").exists(), "the real run has still all to do"
    done = json.loads(results.with_suffix(".rehearsed.json").read_text())["done"]
    assert done == [stage.name for stage in stages("cpu", rehearse=True)]
    assert {row.command for row in load(results)} >= {"ops", "step", "epoch", "ceilings"}
    size = results.stat().st_size
    assert cli.main(arguments) == 0 and results.stat().st_size == size


def test_the_real_run_has_the_stages_of_the_rehearsal_on_the_promised_shapes():
    real, rehearsed = stages("cuda", rehearse=False), stages("cpu", rehearse=True)
    assert [s.name for s in real] == [s.name for s in rehearsed]
    assert [s.name for s in real][:5] == ["tests", "golden", "ops", "step", "epoch"]
    by_name = {stage.name: stage.arguments for stage in real}
    assert "b16-224-p36-b128" in by_name["ops"] and "cuda" in by_name["ops"]
    assert any("test_gated_attention_kernels.py" in word for word in by_name["tests"])
    assert "--collect-only" not in by_name["tests"] and "128" in by_name["step"]
    assert sum(argument.endswith(".npz") for argument in by_name["golden"]) == 9


@pytest.fixture
def scripted(monkeypatch):
    """Three stages, the second of which fails until it is told not to."""
    statuses = {"a": "0", "b": "3", "c": "0"}

    def planned(*_, **__):
        return [
            Stage(name, (*ECHO, status), keeps_results=False) for name, status in statuses.items()
        ]

    monkeypatch.setattr(gpu, "stages", planned)
    return statuses


def test_a_failing_stage_keeps_none_from_running_and_is_tried_again(scripted, tmp_path, capsys):
    arguments = ["gpu", "--rehearse", "--results", str(tmp_path / "r.jsonl")]
    assert cli.main(arguments) == 1
    assert "not done: b (3); run it again" in capsys.readouterr().err
    scripted["b"] = "0"
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "--- b" in printed and "--- a" not in printed


def test_time_is_handed_on_and_ends(scripted, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "run", lambda *_: None)
    arguments = ["gpu", "--rehearse", "--results", str(tmp_path / "r.jsonl")]
    assert cli.main([*arguments, "--minutes", "0.5"]) == 1
    assert "a (out of time)" in capsys.readouterr().err
    assert cli.main([*arguments, "--minutes", "0.001"]) == 1
    assert "c (no time left)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes: got 0.0, expected a positive number"),
        (["--rehearse", "--stage", "d"], "--stage: got 'd', expected tests, golden, ops"),
        (["--device", "cuda:99"], "--device: got 'cuda:99'"),
        (["--device", "cpu"], "--device: got cpu, expected a GPU; pass --rehearse"),
    ],
)
def test_bad_options_are_refused_by_name(arguments, message, capsys):
    assert cli.main(["gpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_damaged_progress_is_named(tmp_path, capsys):
    (tmp_path / "r.rehearsed.json").write_text("{")
    assert cli.main(["gpu", "--rehearse", "--results", str(tmp_path / "r.jsonl")]) == 2
    assert "r.rehearsed.json is damaged" in capsys.readouterr().err


def test_a_stage_is_stopped_when_its_time_is_over(tmp_path):
    sleeping = Stage("sleep", ("-c", "import time; time.sleep(60)"), keeps_results=False)
    assert gpu.run(sleeping, tmp_path / "r.jsonl", 0.5) is None


def test_a_stopped_stage_writes_what_it_has(tmp_path, monkeypatch):
    kept, ready = tmp_path / "kept", tmp_path / "ready"
    code = (
        "import pathlib, time\n"
        "try:\n"
        f"    pathlib.Path({str(ready)!r}).touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        f"    pathlib.Path({str(kept)!r}).touch()\n"
    )
    # As in a shell's background.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert gpu.run(Stage("s", ("-c", code), keeps_results=False), tmp_path, 5.0) is None
    finally:
        signal.signal(signal.SIGINT, before)
    assert ready.exists() and kept.exists()
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    assert gpu.run(Stage("s", ("-c", deaf), keeps_results=False), tmp_path, 2.0) is None
