"""Promise: the model computes what the official code computed: 1e-9 in float64, 1e-4 in float32."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tcpa import Savings, verify
from tcpa.golden import case_of, check, compare, config_of, golden_weights
from tcpa.verify import TOLERANCE, load_golden, main

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.npz"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_files_by_the_command(path, capsys):
    status = main([str(path)])
    printed = capsys.readouterr().out
    assert status == 0 and printed.startswith(f"ok   {path.name}: "), printed


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_files_in_float32(path):
    errors = check(load_golden(path), dtype=torch.float32)
    assert errors and all(e <= TOLERANCE["float32"] for e in errors.values()), errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vfpt_tcpa_len4", "vfpt_deep_10"])
def test_golden_files_without_any_saving(name):
    path = next(p for p in FILES if p.stem == name)
    errors = check(load_golden(path), savings=Savings.none())
    assert all(e <= TOLERANCE["float64"] for e in errors.values()), errors


def test_every_kind_of_case_is_there():
    cases = [case_of(load_golden(p)) for p in FILES if p.stem != "lr_schedule"]
    assert len(cases) >= 8
    assert {type(config_of(case)).__name__ for case in cases} == {"TCPAConfig", "VPTConfig"}
    assert {case["prompt_transform"] for case in cases} == {"fourier", "identity"}
    flags = [key for case in cases for key in ("iprompt", "advp", "simam") if case.get(key)]
    assert set(flags) == {"iprompt", "advp", "simam"}


def test_the_comparison_can_fail():
    golden = {"logits": np.array([1.0, 2.0]), "cls_index": np.array([[0, 1], [2, 3]])}
    assert compare(golden, golden) == {"logits": 0.0, "cls_index": 0.0}
    wrong = {"logits": np.array([1.0, 2.2]), "cls_index": np.array([[1, 0], [2, 4]])}
    assert compare(golden, wrong) == {"logits": pytest.approx(0.1), "cls_index": 1.0}
    assert compare(golden, {"logits": np.array([1.0, np.nan])})["logits"] == float("inf")
    assert compare(golden, {})["cls_index"] == float("inf")


def test_golden_weights_follow_the_recipe():
    shapes = {"b.weight": (3,), "norm1.weight": (2,), "a.keys": (2,), "z.bias": (1,)}
    drawn = dict(golden_weights(shapes, seed=5))
    generator = np.random.RandomState(5)
    for name, factor, offset in (
        ("a.keys", 0.5, 0),
        ("b.weight", 0.04, 0),
        ("norm1.weight", 0.1, 1),
    ):
        expected = offset + factor * generator.standard_normal(shapes[name])
        np.testing.assert_array_equal(drawn[name], expected)


def test_command_prints_a_line_per_file_and_fails_on_a_difference(tmp_path, capsys, monkeypatch):
    schedule = next(p for p in FILES if p.stem == "lr_schedule")
    assert main([str(schedule)]) == 0
    assert capsys.readouterr().out.startswith("ok   lr_schedule.npz: lr ")
    values = dict(np.load(schedule))
    values["lr"] = values["lr"] * (1 + 1e-6)
    np.savez(tmp_path / "wrong.npz", **values)
    assert main([str(schedule), str(tmp_path / "wrong.npz")]) == 1
    assert "FAIL wrong.npz: lr 1e-06" in capsys.readouterr().out
    seen = {}
    monkeypatch.setattr(
        verify, "check", lambda golden, **options: seen.update(options) or {"a": 0.0}
    )
    assert main([str(FILES[-1]), "--plain", "--dtype", "float32"]) == 0
    plain = {"dtype": torch.float32, "savings": Savings.none()}
    assert seen == plain | {"impl": "auto", "device": torch.device("cpu")}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_files_through_the_kernels_on_a_gpu(path):
    arguments = ["--impl", "triton", "--device", "cuda", "--dtype", "float32"]
    assert main([str(path), *arguments]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu"], "--impl auto --device gpu: "),
        (["--impl", "triton"], "pass --dtype float32"),
        (["--impl", "triton", "--device", "meta"], "--impl triton --device meta: "),
    ],
)
def test_an_implementation_that_cannot_run_is_refused(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("tcpa.kernels.host.interpreting", lambda: True)
    assert main([str(FILES[0]), *arguments]) == 2
    assert message in capsys.readouterr().err


UNREADABLE = {
    "empty": b"",
    "cut": FILES[0].read_bytes()[:5000],
    "no-members": b"PK\x03\x04 cut",
    "text": b"hello",
    "pickle": pickle.dumps({"lr": 1}),
    "end-only": b"PK\x05\x06" + b"\xff" * 18,
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_unusable_files_are_named(tmp_path, capsys, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    assert main([str(path), str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "broken.npz: cannot be read as .npz, it is cut or another kind of file" in errors
    assert f"{tmp_path}: is a folder, expected a golden .npz file" in errors
    # numpy would advise to run what is in the file.
    assert "allow_pickle" not in errors


def test_files_of_other_kinds_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "trap.npz", lr=np.array([object()], dtype=object))
    assert main([str(tmp_path / n) for n in ("other.npz", "trap.npz", "missing.npz")]) == 2
    errors = capsys.readouterr().err
    assert "other.npz: no case/* fields, expected a golden file" in errors
    assert "trap.npz: lr: is no plain array of numbers" in errors and "allow_pickle" not in errors
    assert "missing.npz: no such file" in errors


def test_a_file_that_lacks_a_setting_is_named(tmp_path, capsys):
    np.savez(tmp_path / "partial.npz", **{"case/seed": 1, "case/n_classes": 3})
    assert main([str(tmp_path / "partial.npz")]) == 2
    assert "partial.npz: no field case/prompt_transform" in capsys.readouterr().err


BAD_FIELDS = {
    "words": ({"logits": np.array(["a"])}, "logits: got an array of <U1, expected numbers"),
    "two": ({"case/seed": np.array([1, 2])}, "case/seed: got shape [2], expected one value"),
    "negative": ({"case/batch": np.array(-1)}, "case/batch: got -1, expected an integer from 1"),
    "float": ({"case/steps": np.array(1.5)}, "case/steps: got 1.5, expected an integer"),
    "nan": ({"case/lr": np.array(np.nan)}, "case/lr: got nan, expected a finite number >= 0"),
    "flag": ({"case/tdvp": np.array(2)}, "case/tdvp: got 2, expected True or False"),
    "choice": ({"case/prompt_transform": np.array("x")}, "case/prompt_transform: got 'x'"),
    "schedule": ({"lr": np.zeros(3)}, "no field epochs, steps_per_epoch, base_lr"),
}


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_fields_of_another_kind_are_named(tmp_path, capsys, change, message):
    path = tmp_path / "changed.npz"
    np.savez(path, **(dict(np.load(GOLDEN / "vpt_tcpa_10_20.npz")) | change))
    assert main([str(path)]) == 2
    assert f"{path}: {message}" in capsys.readouterr().err


def test_a_schedule_of_another_length_is_named(tmp_path, capsys):
    path = tmp_path / "short.npz"
    values = dict(np.load(GOLDEN / "lr_schedule.npz"))
    np.savez(path, **(values | {"lr": values["lr"][:7]}))
    assert main([str(path)]) == 2
    assert "short.npz: lr: got shape [7], expected [4300]" in capsys.readouterr().err


def test_fields_of_another_shape_are_infinitely_wrong(tmp_path, capsys, monkeypatch):
    golden = {"logits": np.zeros(3), "cls_index": np.zeros((2, 3))}
    computed = {"logits": np.zeros(2), "cls_index": np.zeros((2, 4))}
    errors = compare(golden, computed)
    assert errors == dict.fromkeys(golden, float("inf"))
    monkeypatch.setattr(verify, "check", lambda *_, **__: errors)
    assert main([str(FILES[0])]) == 1
    assert "inf: missing, of another shape, or NaN on one side" in capsys.readouterr().err
