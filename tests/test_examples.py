"""The example for a model and images of one's own runs as it stands, on generated images."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).parents[1] / "examples" / "adapt_your_model.py"
PNG = b"\x89PNG\r\n\x1a\n"
COLOURS = {"blue": 2, "green": 1, "red": 0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of coloured noise, 20 JPEG files each."""
    root = tmp_path_factory.mktemp("images") / "photos"
    generator = np.random.default_rng(0)
    for name, channel in COLOURS.items():
        (root / name).mkdir(parents=True)
        for index in range(20):
            pixels = generator.integers(0, 120, (200, 230, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{index}.jpg")
    return root


def run_example(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
    return runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_it_adapts_inspects_saves_and_reloads(photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "adapted"
    options = ("--model", "test_vit", "--random-weights", "--epochs", "6", "--batch-size", "4")
    found = run_example(monkeypatch, "--images", photos, *options, "--output", output)
    printed = capsys.readouterr().out
    assert "3 classes: blue, green, red" in printed
    assert printed.count("prompts unused") == len(found["model"].backbone.blocks)
    assert "reloaded: same logits: True" in printed
    for name in ("selection.png", "usage.png", "attention.png"):
        assert (output / name).read_bytes().startswith(PNG)
    assert (output / "adapter").is_dir()
    parts = {name: source.num_images for name, source in found["batches"].items()}
    assert sum(parts.values()) == 60 and min(parts.values()) > 0
    # Colours are told apart after six epochs.
    assert found["accuracy"](found["loaded"], found["batches"]["test"]) > 60
    frozen = dict(found["untouched"].named_parameters())
    for name, value in found["model"].backbone.named_parameters():
        if not name.startswith("head"):
            assert torch.equal(value.cpu(), frozen[name].cpu()), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere", "--random-weights", "--model", "test_vit"], "nowhere"),
        (["--model", "test_vit"], "--images"),
        (["--images", ".", "--model", "no_such_vit"], "--model: timm cannot create 'no_such_vit'"),
        (["--images", ".", "--epochs", "0"], "--epochs and --batch-size: expected 1 or more"),
    ],
)
def test_bad_arguments_are_named(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_example(monkeypatch, *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_covered_is_named(photos, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_example(monkeypatch, "--images", photos, "--model", "test_resnet", "--random-weights")
    assert "--model test_resnet: " in capsys.readouterr().err
