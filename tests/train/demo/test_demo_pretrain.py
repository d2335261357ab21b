"""The demo's backbone: generated images are formulas, and the shipped weights learned them.

Nothing here sees a digit; `test_demo.py` covers the transfer.
"""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tcpa.train.__main__ import main
from tcpa.train.demo.backbone import WEIGHTS, build_backbone, load_backbone, normalise
from tcpa.train.demo.generate import FAMILIES, NUM_CLASSES, blur, generate, splat
from tcpa.train.demo.pretrain import augment, pretrain
from tcpa.train.options.demo import PretrainConfig


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """Six images of every class, `[NUM_CLASSES, 6, 32, 32]` in [0, 1]."""
    images, _ = generate(6, seed=0)
    return images.reshape(NUM_CLASSES, 6, 32, 32) / 255


def test_generate_is_reproducible() -> None:
    first, labels = generate(2, seed=3)
    again, _ = generate(2, seed=3)
    assert first.dtype == np.uint8
    assert first.shape == (2 * NUM_CLASSES, 32, 32)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(labels, np.arange(NUM_CLASSES).repeat(2))


def test_splits_show_other_images_of_the_same_classes(drawn: np.ndarray) -> None:
    other = generate(6, seed=0, split=1)[0].reshape(drawn.shape) / 255
    assert all(not np.array_equal(a, b) for a, b in zip(drawn, other, strict=True))
    # A drawn figure stays near its class, whichever split it is from; textures shift by phase.
    strokes = sum(len(FAMILIES[name]) for name in FAMILIES if name not in ("texture", "automaton"))
    gaps = np.square(drawn.mean(1)[:strokes, None] - other.mean(1)[None, :strokes]).mean((2, 3))
    assert (gaps.argmin(1) == np.arange(strokes)).mean() > 0.8


def test_another_seed_gives_other_formulas(drawn: np.ndarray) -> None:
    other = generate(6, seed=1)[0].reshape(drawn.shape) / 255
    rules = len(FAMILIES["automaton"])
    same = np.square(drawn.mean(1) - other.mean(1)).mean((1, 2))[:-rules]
    assert (same > 1e-4).all()


def test_every_class_has_visible_varied_images_of_its_own(drawn: np.ndarray) -> None:
    ranges = drawn.max((2, 3)) - drawn.min((2, 3))
    assert (ranges > 0.3).mean() > 0.99
    assert (drawn.std(axis=1).mean((1, 2)) > 0.01).all(), "images of a class are copies"
    means = drawn.mean(1).reshape(NUM_CLASSES, -1)
    gaps = np.square(means[:, None] - means[None]).mean(2) + np.eye(NUM_CLASSES)
    assert gaps.min() > 1e-4


def test_splat_keeps_mass_and_place() -> None:
    # Pixel centres of a 4 x 4 grid lie at -0.75, -0.25, 0.25, 0.75; x comes first.
    points = np.array([[[-0.75, 0.25], [0.0, -0.25], [5.0, 0.0]]])
    grid = splat(points, 4)[0]
    expected = np.zeros((4, 4))
    expected[2, 0] = 1
    expected[1, 1] = expected[1, 2] = 0.5
    np.testing.assert_allclose(grid, expected, atol=1e-6)


def test_blur_has_the_asked_width() -> None:
    impulse = np.zeros((2, 33, 33), dtype=np.float32)
    impulse[:, 16, 16] = 1
    spread = blur(impulse, np.array([1.0, 2.0]))
    distance = np.square(np.arange(33) - 16)
    variances = (spread.sum(1) * distance).sum(1)
    np.testing.assert_allclose(spread.sum((1, 2)), 1, rtol=1e-4)
    np.testing.assert_allclose(variances, [1.0, 4.0], rtol=1e-3)


def test_augment_keeps_range_and_varies(drawn: np.ndarray) -> None:
    images = torch.from_numpy((drawn[:, 0] * 255).astype(np.uint8))
    first = augment(images, torch.Generator().manual_seed(0))
    again = augment(images, torch.Generator().manual_seed(0))
    other = augment(images, torch.Generator().manual_seed(1))
    assert first.shape == (NUM_CLASSES, 1, 32, 32)
    assert first.min() >= -1.0001
    assert first.max() <= 1.0001
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_shipped_weights_fill_the_architecture_and_tell_their_recipe() -> None:
    assert WEIGHTS.stat().st_size <= 5e6
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.float16}
    recipe = json.loads(metadata["recipe"])
    defaults = PretrainConfig()
    assert recipe == {name: getattr(defaults, name) for name in recipe}
    assert {"torch", "timm", "safetensors"} <= json.loads(metadata["versions"]).keys()
    vit = load_backbone()
    assert not vit.training
    for name, value in vit.state_dict().items():
        assert value.dtype == torch.float32 and torch.isfinite(value).all(), name
    assert vit(torch.zeros(1, 1, 32, 32)).shape == (1, 128)


def test_shipped_weights_separate_the_formulas() -> None:
    """Nearest class centre on unseen generated images: the pretraining is in the file."""

    def features(vit: torch.nn.Module, split: int) -> torch.Tensor:
        images = torch.from_numpy(generate(6, seed=0, split=split)[0])
        with torch.inference_mode():
            raw = vit(normalise(images[:, None].float() / 255))
        return torch.nn.functional.normalize(raw, dim=-1)

    def nearest_centre_accuracy(vit: torch.nn.Module) -> float:
        centres = features(vit, 2).view(NUM_CLASSES, 6, -1).mean(1)
        named = torch.cdist(features(vit, 3), centres).argmin(1)
        return float((named == torch.arange(NUM_CLASSES).repeat_interleave(6)).float().mean())

    trained, untrained = map(nearest_centre_accuracy, (load_backbone(), build_backbone().eval()))
    # Measured: 0.62 and 0.20 of 128 classes.
    assert trained > 0.5
    assert trained > untrained + 0.25


def test_pretraining_runs_and_repeats(tmp_path, capsys) -> None:
    options = {"images_per_class": 1, "epochs": 1, "batch_size": 64}
    paths = [
        pretrain(PretrainConfig(output=tmp_path / name / "vit.safetensors", **options))
        for name in ("a", "b")
    ]
    first, second = map(load_backbone, paths)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with safe_open(paths[0], "pt") as file:
        assert json.loads(file.metadata()["recipe"])["images_per_class"] == 1
    printed = capsys.readouterr().out
    assert "epoch   1/1" in printed
    assert "generated images" in printed


def test_an_unwritable_file_is_refused_before_training(tmp_path, capsys) -> None:
    assert main(["pretrain-demo", "--output", str(tmp_path)]) == 2
    streams = capsys.readouterr()
    assert f"--output: got {tmp_path}" in streams.err
    assert "generated images" not in streams.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--images-per-class", "0"],
        ["--learning-rate", "-1"],
        ["--learning-rate", "inf"],
        ["--weight-decay", "nan"],
        ["--seed", str(2**64)],
    ],
)
def test_bad_arguments_are_named(arguments, capsys) -> None:
    assert main(["pretrain-demo", *arguments]) == 2
    assert f"{arguments[0]}: got {arguments[1]}" in capsys.readouterr().err
