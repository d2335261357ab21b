"""Promise: a saved adapter comes back bit-exact, without pickle, and only on its own backbone."""

import json
import os
import pickle

import pytest
import torch
from models import ARCHITECTURES
from safetensors.torch import load_file, save_file

import tcpa
from tcpa import TCPAConfig, VPTConfig, from_pretrained, wrap
from tcpa.saving import CONFIG_FILE, WEIGHTS_FILE

TINY = ARCHITECTURES["vit-tiny"]
METHODS = {
    "tcpa": TCPAConfig(value_affine=True, image_prompt=True),
    "vfpt": VPTConfig.vfpt(length=3),
    "shallow": VPTConfig(deep=False),
    "linear": None,
}


@pytest.fixture
def saved(tmp_path):
    model = wrap(TINY.create(), METHODS["tcpa"], num_classes=4)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_bit_exact(tmp_path, method, dtype):
    normalization = ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    model = wrap(TINY.create(dtype), method, num_classes=4, normalization=normalization)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, backbone=TINY.create(dtype))
    assert again.config == model.config and again.normalization == normalization
    assert not again.training
    images = TINY.images(dtype=dtype)
    assert torch.equal(again(images), model.eval()(images))
    expected = model.trainable_named_parameters()
    got = again.trainable_named_parameters()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value) and got[name].dtype == value.dtype
        assert got[name].requires_grad


def test_only_what_is_trained_is_saved(saved):
    tensors = load_file(saved / WEIGHTS_FILE)
    names = {"backbone.head.weight", "backbone.head.bias"}
    assert {n for n in tensors if n.startswith("backbone")} == names
    assert sorted(p.name for p in saved.iterdir()) == sorted([CONFIG_FILE, WEIGHTS_FILE])


def test_the_config_file_says_what_was_trained_on_what(saved):
    record = json.loads((saved / CONFIG_FILE).read_text())
    assert record["method"] == "tcpa" and record["config"]["value_affine"] is True
    assert record["backbone"]["name"].startswith("vit_tiny_patch16_224")
    assert record["backbone"]["image_size"] == [64, 64]
    assert record["normalization"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert record["versions"].keys() == {"tcpa", "torch", "timm"}


def test_other_backbone_weights_are_refused_unless_told(saved):
    other = TINY.create()
    with torch.no_grad():
        other.blocks[1].mlp.fc1.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"backbone: got weights .*check_backbone=False"):
        from_pretrained(saved, backbone=other)
    assert from_pretrained(saved, backbone=other, check_backbone=False).num_classes == 4


def test_saving_again_replaces_whole_files_and_failing_keeps_the_old(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = wrap(TINY.create(), METHODS["tcpa"], num_classes=4)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    monkeypatch.undo()
    model.save_pretrained(saved)
    assert torch.equal(
        from_pretrained(saved, backbone=TINY.create()).pools.cls_keys, model.pools.cls_keys
    )


def test_a_missing_folder_or_file_is_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"directory: no {CONFIG_FILE} in .*nowhere"):
        from_pretrained(tmp_path / "nowhere", backbone=TINY.create())
    (saved / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=rf"directory: no {WEIGHTS_FILE}"):
        from_pretrained(saved, backbone=TINY.create())


def _edit(folder, **changes):
    record = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "peft"}, "another program's file"),
        ({"format_version": 99}, "got format 99, expected 1"),
        ({"method": "vp"}, "method: got 'vp', expected 'tcpa' or 'vpt' or 'linear'"),
        ({"config": {"pool": 3}}, r"config: unknown names \['pool'\]"),
        ({"config": [1]}, "config: got list, expected an object"),
        ({"config": {"cls_top_k": 99}}, "cls_top_k: got 99"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(saved, changes, message):
    _edit(saved, **changes)
    with pytest.raises(ValueError, match=message):
        from_pretrained(saved, backbone=TINY.create())


def test_damaged_files_are_refused_by_name(saved):
    weights = saved / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE}: damaged"):
        from_pretrained(saved, backbone=TINY.create())
    (saved / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=rf"{CONFIG_FILE}: not valid JSON"):
        from_pretrained(saved, backbone=TINY.create())


def test_tensors_that_do_not_fit_are_refused_by_name(saved):
    tensors = load_file(saved / WEIGHTS_FILE)
    save_file(tensors | {"extra": torch.zeros(1)}, saved / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"unknown \['extra'\]"):
        from_pretrained(saved, backbone=TINY.create())
    wrong = tensors | {"pools.cls_keys": torch.zeros(2, 18, 7)}
    save_file(wrong, saved / WEIGHTS_FILE)
    with pytest.raises(
        ValueError, match=r"got pools\.cls_keys \[2, 18, 7\], expected \[2, 18, 192\]"
    ):
        from_pretrained(saved, backbone=TINY.create())


def test_a_pickle_is_never_loaded(saved):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(saved / "sprung"),)

    (saved / WEIGHTS_FILE).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="damaged"):
        from_pretrained(saved, backbone=TINY.create())
    assert not (saved / "sprung").exists()


def test_the_package_offers_both_spellings(tmp_path):
    model = wrap(TINY.create(), None, num_classes=2)
    tcpa.save_pretrained(model, tmp_path / "new" / "folder")
    assert tcpa.from_pretrained(tmp_path / "new" / "folder", backbone=TINY.create()).config is None
