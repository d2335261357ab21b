"""Promise: a backbone is whole or refused, and its record says which weights it has."""

import hashlib
import os
import pickle
import time
import urllib.error
from email.message import Message

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tcpa.cli import UsageError
from tcpa.train import hub
from tcpa.train.backbones import ALIASES, load_backbone

NAME, SIZE = "test_vit", 32


@pytest.fixture(scope="module")
def source():
    """A model with a head whose weights are all different from zero."""
    torch.manual_seed(3)
    model = timm.create_model(NAME, img_size=SIZE, num_classes=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def plain_state(source):
    return {name: value.clone() for name, value in source.state_dict().items()}


def assert_filled(model, source):
    expected = source.state_dict()
    got = model.state_dict()
    assert got.keys() == {name for name in expected if not name.startswith("head.")}
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def load(path):
    return load_backbone(NAME, str(path), image_size=SIZE)


def google_arrays(source):
    """Return weights under the names and in the layouts of the original JAX checkpoints."""
    state = {name: value.numpy() for name, value in plain_state(source).items()}
    heads = source.blocks[0].attn.num_heads
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for index in range(len(source.blocks)):
        ours, theirs = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        for norm, number in (("norm1", 0), ("norm2", 2)):
            arrays[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        weights = np.split(state[f"{ours}attn.qkv.weight"], 3)
        biases = np.split(state[f"{ours}attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(len(weight), heads, -1)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        out = state[f"{ours}attn.proj.weight"].T
        arrays[f"{attention}out/kernel"] = out.reshape(heads, -1, out.shape[1])
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for number, name in enumerate(("fc1", "fc2")):
            dense = f"{theirs}MlpBlock_3/Dense_{number}/"
            arrays[f"{dense}kernel"] = state[f"{ours}mlp.{name}.weight"].T
            arrays[f"{dense}bias"] = state[f"{ours}mlp.{name}.bias"]
    return arrays


WRAPPINGS = {
    "plain": lambda state: state,
    "under model": lambda state: {"model": state, "epoch": 3},
    "under state_dict": lambda state: {"state_dict": state},
    "parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    # The original in21k checkpoint has a layer before its head.
    "with pre_logits": lambda state: (
        state | {"pre_logits.fc.weight": torch.zeros(3, 3), "pre_logits.fc.bias": torch.zeros(3)}
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS.values(), ids=WRAPPINGS)
def test_state_dicts_are_loaded_whole(wrapping, source, tmp_path):
    path = tmp_path / "vit_base_p16_224_in22k.pth"
    torch.save(wrapping(plain_state(source)), path)
    model, record = load(path)
    assert_filled(model, source)
    assert record.weights == path.name and not model.training
    assert record.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_and_google_files_give_the_same_weights(source, tmp_path):
    save_file(plain_state(source), tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **google_arrays(source))
    records = []
    for name in ("w.safetensors", "w.npz"):
        model, record = load(tmp_path / name)
        assert_filled(model, source)
        records.append(record)
    assert records[0].fingerprint == records[1].fingerprint
    assert records[0].file_sha256 != records[1].file_sha256


def test_random_weights_come_from_the_seed():
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(load_backbone(NAME, "none", image_size=SIZE)[1])
    assert found[0] == found[1] and found[0].fingerprint != found[2].fingerprint
    assert found[0].weights == "none" and found[0].file_sha256 is None


def broken_states(source):
    state = plain_state(source)
    fewer = {k: v for k, v in state.items() if k != "blocks.3.mlp.fc1.bias"}
    return {
        "missing": (fewer, "missing blocks.3.mlp.fc1.bias"),
        "unexpected": (state | {"blocks.6.norm1.bias": torch.zeros(64)}, "unexpected blocks.6."),
        "shape": (state | {"norm.bias": torch.zeros(1)}, r"norm.bias \[1\] for \[64\]"),
        "nan": (state | {"norm.bias": torch.full((64,), torch.nan)}, "NaN or infinity in norm.b"),
        "many": ({"norm.bias": state["norm.bias"]}, "missing .* and .* more"),
    }


@pytest.mark.parametrize("kind", ["missing", "unexpected", "shape", "nan", "many"])
def test_a_partial_state_is_refused(kind, source, tmp_path):
    state, message = broken_states(source)[kind]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path / "w.pth")
    text = str(caught.value)
    assert "w.pth does not hold a whole test_vit (6 blocks of width 64)" in text


def test_a_partial_google_file_is_refused(source, tmp_path):
    arrays = google_arrays(source)
    cases = {
        "missing Transformer/encoderblock_5/": {
            k: v for k, v in arrays.items() if "encoderblock_5/" not in k
        },
        "it has 7 blocks": arrays
        | {k.replace("_5/", "_6/"): v for k, v in arrays.items() if "encoderblock_5/" in k},
        "missing or not finite: norm.bias": arrays
        | {"Transformer/encoder_norm/bias": np.full(64, np.nan, np.float32)},
        "must match": arrays | {"Transformer/encoder_norm/bias": np.zeros(63, np.float32)},
    }
    for message, changed in cases.items():
        np.savez(tmp_path / "w.npz", **changed)
        with pytest.raises(UsageError, match="does not hold a whole test_vit") as caught:
            load(tmp_path / "w.npz")
        assert message in str(caught.value)


def test_a_pickle_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"norm.bias": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    np.savez(tmp_path / "trap.npz", **{"embedding/kernel": np.array([Trap()], dtype=object)})
    for name in ("trap.pth", "old.pth", "trap.npz"):
        with pytest.raises(UsageError, match=name) as caught:
            load(tmp_path / name)
        assert ("holds more than tensors" in str(caught.value)) == name.endswith(".pth")
    assert not (tmp_path / "sprung").exists()


def test_files_that_cannot_be_read_are_named(source, tmp_path):
    torch.save(plain_state(source), tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "weights.h5").write_bytes(b"")
    (tmp_path / "junk.pth").write_bytes(b"<html>404 not found</html>")
    (tmp_path / "zeros.pt").write_bytes(bytes(200))
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x02junk")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    cases = {
        "cut.pth": "is damaged or no file of torch.save",
        "junk.pth": "is damaged or no file of torch.save",
        "zeros.pt": "is damaged or no file of torch.save",
        "pickle.bin": "is damaged or no file of torch.save",
        "empty.pth": "is damaged or no file of torch.save",
        "cut.safetensors": "is damaged",
        "cut.npz": "is damaged",
        "weights.h5": "expected a file named .safetensors, .pth",
        "tensor.pth": "holds a Tensor, expected a state dict",
        "other.pth": "holds a dict, expected a state dict of tensors",
        "absent.pth": "expected pretrained, none or a file",
    }
    for name, message in cases.items():
        with pytest.raises(UsageError, match=name) as caught:
            load(tmp_path / name)
        assert message in str(caught.value) and str(caught.value).startswith("--weights: ")


def test_both_in21k_checkpoints_have_names_of_their_own():
    assert {timm.get_pretrained_cfg(name).hf_hub_id for name in ALIASES.values()} == {
        "timm/vit_base_patch16_224.orig_in21k",
        "timm/vit_base_patch16_224.augreg_in21k",
    }


@pytest.fixture
def empty_hub(monkeypatch, tmp_path):
    """A hub at an address where nobody listens, and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return constants


def never(*_, **__):
    pytest.fail("the hub's client was asked, which takes a minute")


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_connection_it_is_said_what_to_fetch(offline, empty_hub, monkeypatch, capfd):
    monkeypatch.setattr(empty_hub, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(timm, "create_model", never)
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        load_backbone("orig_in21k")
    assert time.monotonic() - start < 10 and capfd.readouterr() == ("", "")
    message = str(caught.value)
    reason = "HF_HUB_OFFLINE is set" if offline else "no connection to http://127.0.0.1:9: "
    for part in (
        f"--weights: the pretrained weights of {ALIASES['orig_in21k']} could not be loaded (",
        reason,
        "fetch model.safetensors of http://127.0.0.1:9/timm/vit_base_patch16_224.orig_in21k",
        "pass it as --weights FILE",
        f"kept in {empty_hub.HF_HUB_CACHE}",
    ):
        assert part in message
    assert "\n" not in message


def test_a_hub_that_does_not_answer_is_given_up(empty_hub, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.05)
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *a, **k: time.sleep(5))
    with pytest.raises(UsageError, match=r"no connection to http://127.0.0.1:9: no answer"):
        load_backbone("orig_in21k")


def test_a_hub_that_refuses_is_there(empty_hub, monkeypatch):
    refused = urllib.error.HTTPError("http://127.0.0.1:9", 403, "Forbidden", Message(), None)
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *a, **k: raising(refused))
    assert hub.source(ALIASES["orig_in21k"]) == {}


def raising(error):
    raise error


def test_the_hubs_cache_is_enough(empty_hub, monkeypatch, source, tmp_path):
    """The file of the cache fills the model without a question to anybody, and is recorded."""
    repository = tmp_path / f"hub/models--timm--{timm.get_pretrained_cfg(NAME).hf_hub_id[5:]}"
    path = repository / "snapshots/abc/model.safetensors"
    path.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    state = plain_state(source)
    save_file(state, path)
    monkeypatch.setattr(hub, "_unreachable", never)
    assert hub.source(NAME) == {"pretrained_cfg_overlay": {"file": str(path), "custom_load": False}}
    model, record = load_backbone(NAME, image_size=48)
    assert record.weights == "pretrained"
    assert record.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(model.state_dict()["norm.bias"], state["norm.bias"])


@pytest.mark.parametrize(
    ("name", "near"),
    [("orig_in22k", "orig_in21k"), ("vit_base_patch16_225", "vit_base_patch16_224")],
)
def test_an_unknown_backbone_is_named(name, near):
    with pytest.raises(UsageError) as caught:
        load_backbone(name, "none")
    assert f"--backbone: got {name!r}" in str(caught.value)
    assert f"did you mean {near!r}?" in str(caught.value)


def test_an_image_size_that_makes_no_whole_patches_is_named():
    with pytest.raises(UsageError, match="--image-size: got 40, expected a multiple of the 16 pix"):
        load_backbone("test_vit", "none", image_size=40)


def test_an_architecture_that_is_none_is_named_and_not_its_size():
    with pytest.raises(UsageError, match=r"--backbone: got resnet18: .*use one of timm's"):
        load_backbone("resnet18", "none", image_size=96)
