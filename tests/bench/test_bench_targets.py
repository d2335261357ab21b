"""Promise: targets stand beside what was measured on the device that they are for, and on no other;
the tables in the repository are those that the results give."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from tcpa.bench import __main__ as cli
from tcpa.bench.harness.results import load, make_rows, provenance
from tcpa.bench.harness.timing import Quantiles
from tcpa.bench.targets import MODEL, NOT_MEASURED, SHAPE, TARGETS, targets_table

ROOT = Path(__file__).parents[2]
HERE = provenance(torch.device("cpu"))
H200 = dataclasses.replace(HERE, device="NVIDIA H200")


def row(metric, unit, value, where=H200, **fields):
    return make_rows({(metric, unit): Quantiles.of([value])}, where, **fields)


def operation(name, mode, provider, microseconds, where=H200):
    fields = {"command": "ops", "operation": name, "shape": SHAPE, "dtype": "bf16", "mode": mode}
    return row("time", "us", microseconds, where, provider=provider, **fields)


def step(provider, metric, unit, value):
    fields = {"command": "step", "operation": "step in bfloat16", "shape": MODEL, "mode": "train"}
    return row(metric, unit, value, provider=provider, dtype="bfloat16", **fields)


def measured(rows):
    shown = targets_table(rows)
    return {line[0]: (line[-2], line[-1]) for line in shown.rows}, shown.notes[0]


def test_without_rows_of_the_device_nothing_is_claimed():
    elsewhere = operation("gated_attention", "forward", "tcpa triton", 1.0, HERE)
    found, conditions = measured(elsewhere)
    assert len(found) == len(TARGETS)
    assert set(found.values()) == {(NOT_MEASURED, "")}
    assert "nothing has run on one yet" in conditions


def test_levels_are_ordered():
    for target in TARGETS:
        levels = [target.must, target.target, target.stretch]
        levels += [] if target.limit is None else [target.limit]
        assert levels == sorted(levels, reverse=target.better == "less"), target.name
        assert target.verdict(target.must) in ("must", "target", "stretch")
        assert target.verdict(target.stretch) == "stretch"
        worse = target.must * (1.01 if target.better == "less" else 0.99)
        assert target.verdict(worse) == "missed"


def test_every_target_finds_its_rows():
    both = ("gated_attention", "both")
    rows = [
        *operation("gated_attention", "forward", "tcpa triton", 80.0),
        *operation("gated_attention", "forward", "tcpa triton, no gate", 10.0),
        *operation("gated_attention", "backward", "tcpa triton", 300.0),
        *operation(*both, "tcpa triton", 250.0),
        *operation(*both, "tcpa triton, no gate", 250.0),
        *operation(*both, "official", 2500.0),
        *operation(*both, "official, compiled", 500.0),
        *operation(*both, "composition A, LSE merge [flex]", 1000.0),
        *operation(*both, "composition C, duplicated keys [flex]", 900.0),
        *operation(*both, "composition C, duplicated keys [sdpa default]", 100.0),
        *operation(*both, "composition D, merged statistics [flash]", 600.0),
        *operation(*both, "composition D, merged statistics [flash, compiled]", 500.0),
        *operation(*both, "sdpa, no gate [default]", 500.0),
        *operation(*both, "sdpa, no gate [cudnn]", 225.0),
        *operation("norm_match", "forward", "tcpa triton", 20.0),
        *operation("norm_match", "backward", "tcpa triton", 50.0),
        *step("tcpa", "time", "ms", 22.0),
        *step("tcpa, bf16 weights", "time", "ms", 20.0),
        *step("tcpa, bf16 weights, compiled", "time", "ms", 18.0),
        *step("tcpa", "MFU", "%", 50.0),
        *step("tcpa, bf16 weights, compiled", "MFU", "%", 64.0),
        *step("tcpa", "peak memory", "MiB", 6000.0),
        *step("official", "time", "ms", 900.0),
        *step("official, autocast", "time", "ms", 72.0),
        *step("official, frozen", "time", "ms", 36.0),
        *step("official, frozen, compiled", "time", "ms", 27.0),
        *step("VPT-deep", "time", "ms", 22.0),
        *step("VPT-deep, prompts as tokens", "time", "ms", 25.0),
        *step("frozen backbone, with backward", "time", "ms", 20.0),
        *step("frozen ViT", "time", "ms", 5.0),
        *row("seconds per epoch", "s", 0.9, command="epoch", operation="epoch from device",
             shape=f"{MODEL}-n5394", dtype="bfloat16", mode="train", provider="tcpa"),
    ]  # fmt: skip
    found, conditions = measured([*rows, *operation(*both, "tcpa triton", 1.0, HERE)])
    assert list(found.values()) == [
        ("80.0", "must"),
        ("300", "missed"),
        ("10.0", "target"),
        ("2.00", "target"),
        ("3.60", "target"),
        ("2.00", "target"),
        ("2.00", "stretch"),
        ("0.900", "must"),
        ("1.00", "stretch"),
        ("20.0", "target"),
        ("50.0", "must"),
        ("18.0", "target"),
        ("64.0", "target"),
        ("4.00", "stretch"),
        ("2.00", "missed"),
        ("1.50", "target"),
        ("0.800", "stretch"),
        ("0.909", "must"),
        ("1.00", "stretch"),
        ("6.29", "target"),
        ("0.900", "target"),
    ]
    assert f"measured {H200.date[:10]} to {H200.date[:10]}" in conditions


@pytest.mark.parametrize("name", ["README.md", "bench/results/README.md"])
def test_the_tables_in_the_repository_are_those_of_the_results(name, tmp_path, capsys):
    copy = tmp_path / "README.md"
    shutil.copy(ROOT / name, copy)
    results = [str(path) for path in sorted((ROOT / "bench" / "results").glob("*.jsonl"))]
    assert cli.main(["report", *results, "--markdown", str(copy)]) == 0
    assert "no rows" not in capsys.readouterr().out
    assert copy.read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8")


def test_no_committed_row_comes_from_a_changed_checkout():
    for path in (ROOT / "bench" / "results").glob("*.jsonl"):
        assert not any(row.provenance.dirty for row in load(path)), path.name
