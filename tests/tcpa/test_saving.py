"""Promise: a saved adapter comes back bit-exact, without pickle, and only on its own backbone."""

import json
import os
import pickle

import pytest
import timm
import torch
from models import ARCHITECTURES
from safetensors.torch import load_file, save_file

import tcpa
from tcpa import TCPAConfig, VPTConfig, from_pretrained, wrap
from tcpa.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_checksum

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"global_pool": "avg", "fc_norm": False},
            "backbone: pooling: got 'avg', expected 'token'",
        ),
        ({"act_layer": "relu"}, "backbone: activation: got 'ReLU', expected 'GELU'"),
        ({"num_heads": 6}, "backbone: heads: got 6, expected 3"),
        ({"depth": 1}, "backbone: depth: got 1, expected 2"),
        ({"img_size": 32}, r"backbone: image_size: got \[32, 32\], expected \[64, 64\]"),
    ],
)
def test_a_backbone_with_other_settings_is_refused_by_their_name(saved, arguments, message):
    other = {"img_size": 64, "depth": 2} | arguments
    with pytest.raises(ValueError, match=message):
        from_pretrained(saved, backbone=timm.create_model("vit_tiny_patch16_224", **other))


def test_a_backbone_that_is_refused_stays_with_its_model(saved):
    other = TINY.create()
    with torch.no_grad():
        other.blocks[0].norm1.weight.add_(1.0)
    model, images = wrap(other, None, num_classes=7).eval(), TINY.images()
    logits = model(images)
    with pytest.raises(ValueError, match="backbone: got weights"):
        from_pretrained(saved, backbone=other)
    assert torch.equal(model(images), logits) and model.num_classes == 7


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


@pytest.mark.parametrize("wrapped", [torch.compile, type], ids=["compiled", "class"])
def test_what_is_no_model_of_ours_is_refused(wrapped, tmp_path):
    model = wrap(TINY.create(), tcpa.TCPAConfig(), num_classes=3)
    with pytest.raises(TypeError, match="model"):
        tcpa.save_pretrained(wrapped(model), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_or_file_is_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"directory: no {CONFIG_FILE} in .*nowhere"):
        from_pretrained(tmp_path / "nowhere", backbone=TINY.create())
    (saved / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=rf"directory: no {WEIGHTS_FILE}"):
        from_pretrained(saved, backbone=TINY.create())


def _edit(folder, **changes):
    """Change the record; a dict changes what it names, "absent" removes a field."""
    record = json.loads((folder / CONFIG_FILE).read_text())
    for name, value in changes.items():
        if isinstance(value, dict) and value:
            value = record[name] | value
        record[name] = value
    record = {name: value for name, value in record.items() if value != "absent"}
    (folder / CONFIG_FILE).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "peft"}, "got another program's file"),
        ({"format_version": 99}, "got format 99, expected 1"),
        ({"method": "vp"}, "method: got 'vp', expected .*did you mean 'vpt'"),
        ({"method": None}, "method: got null, expected str"),
        ({"method": "linear"}, "config: got {.*}, expected null for a linear probe"),
        ({"config": {"pool": 3}}, r"config: unknown names \['pool'\]"),
        ({"config": [1]}, r"config: got \[1\], expected dict or null"),
        ({"config": None}, "config: got NoneType, expected an object"),
        ({"config": {}}, r"config: no \['cls_pool_size', .*restore the file"),
        ({"config": {"cls_top_k": 99}}, "cls_top_k: got 99"),
        ({"config": {"cls_top_k": "3"}}, "cls_top_k: got '3', expected an integer"),
        ({"num_classes": None}, "num_classes: got null, expected int"),
        ({"num_classes": True}, "num_classes: got true, expected int"),
        ({"backbone": "absent"}, r"fields: got none named \['backbone'\]"),
        ({"backbone": None}, "backbone: got null, expected dict"),
        ({"backbone": {"name": 3}}, r"backbone\.name: got 3, expected str"),
        (
            {"backbone": {"image_size": ["a"]}},
            r'image_size: got \["a"\], expected a list of',
        ),
        ({"normalization": {}}, r"normalization\.fields: got none named \['mean', 'std'\]"),
        (
            {"normalization": {"mean": [None]}},
            r"\.mean: got \[null\], expected a list",
        ),
        ({"sha256": "absent"}, r"got none named \['sha256'\]"),
        ({"sha256": "0" * 64}, rf"{WEIGHTS_FILE}: got checksum .*expected 000000000000"),
        ({"config": {"selection": "farthest"}}, "got checksum .*one of the two files was altered"),
        ({"backbone": {"name": "other"}}, "got checksum .*one of the two files was altered"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(saved, changes, message):
    _edit(saved, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(saved, backbone=TINY.create())
    assert str(saved) in str(caught.value)


def _rewrite(folder, tensors):
    """Write other weights with a right checksum."""
    save_file(tensors, folder / WEIGHTS_FILE)
    record = json.loads((folder / CONFIG_FILE).read_text())
    _edit(folder, sha256=adapter_checksum(tensors, record))


def test_one_altered_byte_is_noticed(saved):
    weights = saved / WEIGHTS_FILE
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE}: got checksum .*altered"):
        from_pretrained(saved, backbone=TINY.create())


def test_nan_is_neither_saved_nor_loaded(saved):
    before = (saved / WEIGHTS_FILE).read_bytes()
    model = wrap(TINY.create(), METHODS["tcpa"], num_classes=4)
    with torch.no_grad():
        model.pools.cls_keys[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in \['pools\.cls_keys'\]"):
        model.save_pretrained(saved)
    assert (saved / WEIGHTS_FILE).read_bytes() == before
    tensors = load_file(saved / WEIGHTS_FILE)
    tensors["pools.cls_keys"][0, 0, 0] = torch.inf
    _rewrite(saved, tensors)
    with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE}: got NaN or infinity"):
        from_pretrained(saved, backbone=TINY.create())


def test_a_model_without_a_head_comes_back_without_one(tmp_path):
    model = wrap(TINY.create(), VPTConfig(length=3), num_classes=0).eval()
    model.save_pretrained(tmp_path)
    again, images = from_pretrained(tmp_path, backbone=TINY.create()), TINY.images()
    assert again.num_classes == 0 and again(images).shape == (3, 192)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_on_another_precision_the_values_are_converted(tmp_path, dtypes):
    trained, used = (getattr(torch, name) for name in dtypes)
    model = wrap(TINY.create(trained), METHODS["tcpa"], num_classes=4).to(trained)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, backbone=TINY.create(used), check_backbone=False)
    assert again(TINY.images(dtype=used)).isfinite().all()
    assert all(p.dtype == torch.float32 for p in again.trainable_parameters())


@pytest.mark.parametrize("directory", [None, "", 3])
def test_a_folder_must_be_a_path(saved, directory):
    model = wrap(TINY.create(), None)
    for use in (model.save_pretrained, from_pretrained):
        with pytest.raises(TypeError, match=r"directory: got .*, expected a folder's path"):
            use(directory)


def test_a_file_is_not_a_folder(saved):
    path = saved / CONFIG_FILE
    with pytest.raises(NotADirectoryError, match="directory: got the file"):
        from_pretrained(path, backbone=TINY.create())
    with pytest.raises(NotADirectoryError, match="directory: got the file"):
        wrap(TINY.create(), None).save_pretrained(path)


def test_only_our_models_are_saved(tmp_path):
    with pytest.raises(TypeError, match=r"model: got Linear, expected what tcpa\.wrap returns"):
        tcpa.save_pretrained(torch.nn.Linear(2, 2), tmp_path)


def test_without_a_backbone_timm_is_asked_and_its_failure_told(saved, monkeypatch):
    asked = []

    def create(name, **arguments):
        asked.append((name, arguments))
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(RuntimeError, match=r"no route to host.*; pass backbone=") as caught:
        from_pretrained(saved)
    assert isinstance(caught.value.__cause__.__cause__, ConnectionError)
    name, arguments = asked[0]
    assert name.startswith("vit_tiny_patch16_224")
    assert arguments == {"pretrained": True, "img_size": (64, 64)}
    _edit(saved, backbone={"name": "my_vit"})
    _rewrite(saved, load_file(saved / WEIGHTS_FILE))
    with pytest.raises(ValueError, match=r"timm does not know 'my_vit'.*pass backbone="):
        from_pretrained(saved)


def test_check_backbone_is_a_flag(saved):
    with pytest.raises(TypeError, match="check_backbone: got 'no', expected True or False"):
        from_pretrained(saved, backbone=TINY.create(), check_backbone="no")


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
    _rewrite(saved, tensors | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unknown \['extra'\]"):
        from_pretrained(saved, backbone=TINY.create())
    _rewrite(saved, tensors | {"pools.cls_keys": torch.zeros(2, 18, 7)})
    with pytest.raises(
        ValueError, match=r"got pools\.cls_keys \[2, 18, 7\], expected \[2, 18, 192\]"
    ):
        from_pretrained(saved, backbone=TINY.create())

    _rewrite(saved, tensors | {"pools.cls_keys": torch.zeros(2, 18, 192, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"got pools\.cls_keys torch\.int32, expected floating"):
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
