"""Promise: one command learns a meta-prompt from datasets on disk, and a run starts from it."""

import pytest
import torch
from dataset_trees import write_tree

from tcpa.train.__main__ import main
from tcpa.train.engine.stages import load_meta_prompt

MODEL = ["--backbone", "test_vit", "--weights", "none", "--image-size", "32", "--resize", "40"]
SMALL = [*MODEL, "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("dtd", "flower102")):
        write_tree(name, root, per_class=8, seed=seed)
    return root


def command(data, *arguments):
    return main([*arguments, "--data", str(data), *SMALL])


def test_a_run_starts_from_what_was_learned_on_other_datasets(data, tmp_path, capsys):
    path = tmp_path / "meta.safetensors"
    options = ["--epochs", "2", "--update-steps", "1", "--output", str(path)]
    assert command(data, "meta-prompt", "dtd", "flower102", *options) == 0
    printed = capsys.readouterr().out
    assert "dtd: 16 clusters of" in printed and "flower102: 16 clusters of" in printed
    assert "step 1 of" in printed and "about 0 s left" in printed
    assert str(path) in printed and "--meta-prompt" in printed
    strips = load_meta_prompt(path)
    assert [list(strip.shape) for strip in strips] == [[3, 4, 32]] * 2 + [[3, 24, 4]] * 2
    # The same command gives the same frame, another seed another one.
    again = tmp_path / "again.safetensors"
    options[-1] = str(again)
    assert command(data, "meta-prompt", "dtd", "flower102", *options) == 0
    assert all(map(torch.equal, strips, load_meta_prompt(again)))
    assert command(data, "meta-prompt", "dtd", "flower102", *options, "--seed", "1") == 0
    assert not torch.equal(strips[0], load_meta_prompt(again)[0])
    options = ["--epochs", "1", "--protocol", "last", "--precision", "fp32", "--no-tensorboard"]
    options += ["--method", "dam-vp", "--meta-prompt", str(path), "--output", str(tmp_path / "r")]
    assert command(data, "run", "dtd", *options) == 0
    assert "(the last epoch)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dtd", "dtd"], "DATASETS: got dtd, dtd, expected one or more different datasets"),
        (["dtdd"], "DATASET: got 'dtdd', expected"),
        (["dtd", "--epochs", "0"], "--epochs: got 0, expected 1 or more"),
        (["dtd", "--learning-rate", "0"], "--learning-rate: got 0.0, expected a number above 0"),
        (["dtd", "--output", "."], "--output: "),
    ],
)
def test_bad_options_are_refused_by_name(data, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(data, "meta-prompt", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
