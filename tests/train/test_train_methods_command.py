"""Promise: `tcpa-train methods` tells what every row trains and costs, counted on the model."""

import csv
import dataclasses

import pytest
from parameter_counts import COUNTS

from tcpa.bench.costs.step import Workload, step_flops
from tcpa.train.__main__ import main
from tcpa.train.jobs.method_costs import BATCH, method_cost
from tcpa.train.jobs.methods import COLUMNS
from tcpa.train.recipes.recipe import METHODS, recipe
from tcpa.train.report.paper import ROWS, table1

VIT = "vit_base_patch16_224"
HEAD = 769 * 200


@pytest.mark.parametrize("method", ["linear", "vpt-deep", "vfpt", "vfpt+tcpa"])
def test_flops_are_those_of_the_formulas_of_bench(method) -> None:
    made = recipe("dtd", method)
    prompts = made.prompts
    if prompts is not None:
        # One set of prompts for the batch, as the formulas have it.
        prompts = prompts.replace(**{prompts.dropout_setting: 0.0})
    work = Workload(
        method="tcpa" if method.endswith("tcpa") else method,
        prompts=0 if prompts is None else prompts.num_prompts,
        batch=BATCH,
    )
    found = method_cost(dataclasses.replace(made, prompts=prompts), VIT, 200, None)
    assert found.evaluation * BATCH == pytest.approx(step_flops(work, train=False).total, rel=1e-6)
    # The plain attention keeps what the fused one computes again in its backward pass.
    training = step_flops(work, train=True)
    assert found.training * BATCH == pytest.approx(training.total - training.repeated, rel=2e-3)


@pytest.mark.parametrize("method", ["partial-1", "adapter", "lion", "dam-vp+tcpa"])
def test_trained_values_are_those_of_the_formulas(method) -> None:
    found = method_cost(recipe("cub", method), VIT, 200, None)
    assert found.total - HEAD == COUNTS[method] and found.trained["head"] == HEAD
    linear = method_cost(recipe("cub", "linear"), VIT, 200, None)
    assert linear.trained == {"head": HEAD}
    assert found.training > found.evaluation >= linear.evaluation


def test_cluster_features_cost_a_second_pass() -> None:
    frames, clusters = (method_cost(recipe("cub", m), VIT, 200, None) for m in ("vp", "dam-vp"))
    assert 1.99 < clusters.evaluation / frames.evaluation < 2.01


def test_the_csv_has_a_whole_line_for_every_method(capsys) -> None:
    words = ["methods", "--csv", "--backbone", "test_vit", "--classes", "5", "--dataset", "svhn"]
    assert main(words) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["method"] for row in rows] == list(METHODS)
    assert {row["table_row"] for row in rows} - {""} == set(table1())
    for row in rows:
        empty = {name for name in COLUMNS if not row[name]}
        assert empty <= {"table_row", "grid", "note"}, row["method"]
        parts = dict(part.rsplit(" ", 1) for part in row["trained_parts"].split("; "))
        assert sum(map(int, parts.values())) == int(row["trained_values"])
        assert parts["head"] == row["head_values"]
        assert float(row["gflop_training"]) >= float(row["gflop_evaluation"]) > 0
        assert (row["note"] == "") == (row["method"] == "vfpt+tcpa"), "what is published says so"
    by_name = {row["method"]: row for row in rows}
    assert "tests/golden" in by_name["vfpt+tcpa"]["verified"]
    assert by_name["lion"]["verified"].startswith("nothing")
    assert by_name["vpt-deep"]["grid"] == "9 rates x 4 decays, grid of KMnP/vpt 4410440"
    assert by_name["vp"]["grid"] == ""
    assert by_name["vfpt+tcpa"]["tokens"] == "Fourier TCPA 18 + 18, top 10, 10"


def test_the_table_names_every_method_and_its_source(monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        "tcpa.train.jobs.methods.METHODS",
        {name: METHODS[name] for name in ("full", "vpt-shallow", "vpt+tcpa")},
    )
    assert main(["methods", "--backbone", "test_vit", "--dataset", "vtab-dtd"]) == 0
    printed = capsys.readouterr().out
    assert "vpt-shallow*" in printed and "vpt-shallow" not in ROWS
    assert "source: KMnP/vpt" in printed and "10 rates x 4 decays" in printed
    assert "no recipe is published for this dataset" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "cubs"], "--dataset: got 'cubs', expected dtd, cub"),
        (["--classes", "0"], "--classes: got 0, expected 1 or more"),
        (["--image-size", "0"], "--image-size: got 0, expected 1 or more"),
        (["--backbone", "vit_none"], "--backbone vit_none, full: Unknown model"),
        (["--backbone", "resnet18"], "--backbone resnet18, full: "),
    ],
    ids=["dataset", "classes", "size", "unknown", "no transformer"],
)
def test_mistakes_are_named(words, message, capsys) -> None:
    assert main(["methods", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
