"""Promise: a profile can be looked at: operators, kinds, memory, a trace that TensorBoard shows."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tcpa.bench import __main__ as cli

SMALL = ["--model", "vit_tiny_patch16_224", "--batch", "1"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    output = tmp_path_factory.mktemp("profile") / "new"
    assert cli.main(["profile", *SMALL, "--output", str(output)]) == 0
    return output


def test_all_files_are_written(profiled):
    assert "aten::addmm" in (profiled / "operators.txt").read_text()
    kinds = (profiled / "kinds.txt").read_text()
    assert "matrix products" in kinds and "gaps" in kinds
    memory = json.loads((profiled / "memory.json").read_text())
    assert memory[0]["bytes"] >= memory[-1]["bytes"] > 0 and memory[0]["calls"] > 0
    (trace,) = (profiled / "trace").glob("tcpa.*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)


def test_tensorboard_shows_the_run(profiled):
    pytest.importorskip("torch_tb_profiler")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--logdir", str(profiled / "trace"), "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "tensorboard.main", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server:
        try:
            runs = ask(port, 120)
        finally:
            server.terminate()
    assert runs == ["trace"]


def ask(port, seconds):
    """Ask the plugin for its runs until it knows one."""
    url = f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler/runs"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                runs = json.loads(answer.read())["runs"]
        except OSError:
            runs = []
        if runs:
            return runs
        time.sleep(1)
    return []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "fast"], "--provider: got 'fast', expected one of 'official'"),
        (["--device", "cuda:99"], "--device: got 'cuda:99'"),
        (["--model", "resnet18", "--batch", "1"], "--model resnet18: backbone: ResNet is not"),
    ],
)
def test_bad_options_are_refused_by_name(arguments, message, tmp_path, capsys):
    assert cli.main(["profile", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["profile", *SMALL, "--output", str(tmp_path / "file")]) == 2
    assert "--output: got " in capsys.readouterr().err
