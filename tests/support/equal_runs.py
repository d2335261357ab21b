"""What two runs that should be equal have in common, up to rounding."""

import json

import pytest
from safetensors.torch import load_file

from tcpa.train.engine.checkpoint import CURRENT


def end_of(output):
    (folder,) = output.glob("*/*/*")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / CURRENT), lines, json.loads((folder / "result.json").read_text())


def assert_equal_runs(one, several, rtol=1e-6):
    tensors, lines, result = end_of(one)
    other_tensors, other_lines, other_result = end_of(several)
    assert len(lines) == len(other_lines)
    for a, b in zip(lines, other_lines, strict=True):
        for name in ("kind", "step", "epoch", "accuracy", "images", "split", "learning_rate"):
            assert a.get(name) == b.get(name)
        for name in a.keys() & {"loss", "cross_entropy", "distance"}:
            assert a[name] == pytest.approx(b[name], rel=rtol)
    assert other_result["accuracy"] == result["accuracy"]
    assert tensors.keys() == other_tensors.keys()
    for name in tensors:
        # Norms: Adam divides each gradient by its own size, however small, rounding included. The
        # first moment would show a gradient that is scaled wrongly.
        if name.startswith(("model/", "optimizer/exp_avg/")):
            error = (other_tensors[name] - tensors[name]).norm()
            assert error <= 1e-4 * tensors[name].norm(), name
