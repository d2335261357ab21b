"""Promise: the step benchmark compares equal computations only, and says what it measured."""

import dataclasses
import json

import pytest
from tcpa.bench import __main__ as cli
from tcpa.bench import step
from tcpa.bench.step import PROVIDERS, StepCase, StepResult, _verify, measure, report

from tcpa import Savings


def result(name, milliseconds, peak, error=0.0):
    return StepResult(
        provider=name, milliseconds=milliseconds, peak_mib=peak, loss=1.0, gradient_error=error
    )


def test_the_command_measures_all_providers(tmp_path, capsys):
    path = tmp_path / "step.json"
    options = ["--model", "vit_tiny_patch16_224", "--batch", "2", "--rounds", "2"]
    assert cli.main(["step", *options, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert rows["case"]["batch"] == 2
    assert [row["provider"] for row in rows["results"]] == list(PROVIDERS)
    for row in rows["results"]:
        assert row["provider"] in printed and len(row["milliseconds"]) == 2
        assert row["gradient_error"] < 1e-3 and row["peak_mib"] > 100


def test_the_first_provider_is_the_official_algorithm_as_it_stands():
    assert next(iter(PROVIDERS.values())) == Savings.none()
    assert PROVIDERS["tcpa"] == Savings()


def test_the_table_gives_medians_and_ratios():
    results = [result("official", [30.0, 10.0, 20.0], 200.0), result("tcpa", [10.0], 50.0, 1e-6)]
    table = report(StepCase(), results)
    assert "20 (15-25)" in table and "1.00x" in table
    assert "2.00x" in table and "0.25x" in table and "1e-06" in table


def test_no_figures_of_a_wrong_result():
    import numpy as np

    gradient = np.ones(3, dtype=np.float32)
    first = {"official": (1.0, [gradient]), "tcpa": (1.0, [gradient * 1.01])}
    with pytest.raises(RuntimeError, match=r"'tcpa' differs from .* by 1\.0e-02"):
        _verify(StepCase(), first)
    first["tcpa"] = (float("nan"), [gradient])
    with pytest.raises(RuntimeError, match="no figures of a wrong result"):
        _verify(StepCase(), first)


def test_every_saving_can_be_measured_alone():
    case = StepCase(model="vit_tiny_patch16_224", batch=1)
    some = {"official": Savings.none(), "bits": dataclasses.replace(Savings.none(), gate_bits=True)}
    assert [r.provider for r in measure(case, 1, some)] == ["official", "bits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch: got 0, expected at least 1"),
        (["--rounds", "-1"], "--rounds: got -1, expected at least 1"),
        (["--model", "vit_tiny"], "--model: timm does not know 'vit_tiny'"),
        (["--dataset", "imagenet"], "invalid choice: 'imagenet'"),
    ],
)
def test_bad_options_are_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        step.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_command_line_lists_its_commands(capsys):
    assert cli.main(["--help"]) == 0
    assert "step" in capsys.readouterr().out
    assert cli.main(["stp"]) == 2 and "unknown command 'stp'" in capsys.readouterr().err
    assert cli.main([]) == 2
