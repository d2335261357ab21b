"""The rows of the paper's tables on the demo's digits: one loop, tuned settings, one table."""

import csv
import json
from dataclasses import fields, replace

import pytest
import torch

import tcpa
from tcpa.cli import UsageError
from tcpa.train.__main__ import main
from tcpa.train.demo import compare, methods, tune
from tcpa.train.demo.digits import FOLDS, DigitSplit, make_split
from tcpa.train.demo.methods import (
    PROMPTS,
    TUNED_ROWS,
    describe,
    find_rows,
    row_of,
    tuned_settings,
)
from tcpa.train.demo.session import DemoScore
from tcpa.train.demo.training import DemoEpoch, DemoOutcome, build_model, train_epochs
from tcpa.train.options.demo import DemoConfig, TuneConfig
from tcpa.train.recipes.rows import METHODS


@pytest.fixture(scope="module")
def tiny():
    """Forty training and ten test images."""
    images, labels, test_images, test_labels = make_split("quick")
    pick = torch.arange(0, 100, 100 // 40)[:40]
    return DigitSplit(images[pick], labels[pick], test_images[:10], test_labels[:10])


def test_every_row_runs_or_says_why_not(monkeypatch):
    found, reasons = find_rows(["all"])
    assert [row.name for row in found] == list(METHODS) and not reasons
    deep = tcpa.LastBlockTuning(num_blocks=99)
    monkeypatch.setitem(METHODS, "partial-1", replace(METHODS["partial-1"], tuning=deep))
    found, reasons = find_rows(["all"])
    assert "partial-1" not in [row.name for row in found]
    assert "num_blocks: got 99" in reasons["partial-1"]
    with pytest.raises(UsageError, match=r"--methods: got 'partial-1', .*num_blocks: got 99"):
        find_rows(["partial-1"])


@pytest.mark.parametrize("name", list(METHODS))
def test_a_row_trains_what_its_registry_entry_trains(name, tiny):
    row, entry = row_of(name), METHODS[name]
    assert type(row.tuning) is type(entry.tuning)
    assert row.input_prompt == entry.input_prompt
    assert type(row.prompts) is type(entry.prompts("digits"))
    method = row.tuned(0.01, 0.0001)
    model = build_model(method, tiny, seed=0)
    before = {key: value.clone() for key, value in model.backbone.named_parameters()}
    (epoch,) = train_epochs(model, method, tiny, seed=0, epochs=1)
    assert epoch.test_accuracy is not None and epoch.loss > 0
    trained = model.trainable_named_parameters().keys()
    for key, value in model.backbone.named_parameters():
        if f"backbone.{key}" not in trained:
            assert torch.equal(value, before[key]), key
    assert any(name.startswith("backbone.head") for name in trained)


def test_rows_with_prompts_have_equally_many():
    for name in METHODS:
        prompts = row_of(name).prompts
        if prompts is not None:
            assert prompts.num_prompts == 20, name
            dropout = [f.name for f in fields(prompts) if f.name in ("dropout", "prompt_dropout")]
            assert [getattr(prompts, field) for field in dropout] == [0.0]
    assert row_of("vpt-deep").prompts == PROMPTS["VPT-deep"]
    assert row_of("vpt+tcpa").prompts == PROMPTS["TCPA"]
    assert row_of("vfpt+tcpa").prompts == replace(PROMPTS["TCPA"], prompt_transform="fourier")
    assert {row_of(name).tuning.head for name in METHODS} == {"linear"}
    # 64 of 768 channels, on a width of 128.
    assert row_of("adaptformer").tuning.bottleneck == 10


def test_every_row_is_tuned_on_folds_of_the_training_images():
    tuned = json.loads(TUNED_ROWS.read_text(encoding="utf-8"))["rows"]
    found, _ = find_rows(["all"])
    for row in found:
        record = tuned[row.name]
        remedy = f"tcpa-train tune-demo --methods {row.name} --output train/demo/tuned_rows.json"
        assert record["choices"] == describe(row), remedy
        assert record["epochs"] == DemoConfig(methods=("all",)).epochs
        assert set(record["folds"]) <= set(FOLDS)
        assert {fold for _, _, fold, _ in record["measured"]} <= set(FOLDS)
        config = TuneConfig(methods=("all",), folds=len(record["folds"]))
        assert list(tune.measured_on(config)) == record["folds"]
        found = tune._RowsRecord(config, [], torch.device("cpu"))
        found.rows = tuned
        first, *others = sorted(config.weight_decays)
        (rate, _), _ = found.best(row.name, [(rate, first) for rate in config.learning_rates])
        chosen, _ = found.best(row.name, [(rate, decay) for decay in (first, *others)])
        assert (record["learning_rate"], record["weight_decay"]) == chosen, row.name


def test_the_results_page_has_every_row_with_its_recorded_rate():
    page = (TUNED_ROWS.parent / "README.md").read_text(encoding="utf-8")
    tuned = tuned_settings()
    found, reasons = find_rows(["all"])
    for row in found:
        (line,) = (
            line for line in page.splitlines() if line.startswith(f"| {METHODS[row.name].label} |")
        )
        rate, decay = (f"{tuned[row.name][key]:g}" for key in ("learning_rate", "weight_decay"))
        assert line.endswith(f"| {rate} | {decay} |"), line
    assert all(f"{name} is left out: {reason}" in page for name, reason in reasons.items())


def accuracy_of(task):
    """A made-up landscape: the best pair is (0.1, 0.5), but decay matters only there."""
    method = task.method
    return {(0.01, 0.1): 50.0, (0.1, 0.1): 60.0, (0.1, 0.5): 61.0}[
        method.learning_rate, method.weight_decay
    ]


def pretend(tasks, on_epoch, on_outcome):
    """Stand in for training."""
    for task in tasks:
        name, seed = task.method.name, task.seed
        epoch = DemoEpoch(name, seed, task.epochs, 1.0, 50.0, accuracy_of(task), 0.1)
        on_epoch(epoch)
        on_outcome(task, DemoOutcome(epochs=(epoch,), trainable=1, implementation=("", "")))


GRID = ("--learning-rates", "0.1", "0.01", "--weight-decays", "0.5", "0.1", "--folds", "2")


def test_tuning_searches_rates_then_decays_and_keeps_other_rows(tmp_path, monkeypatch, capsys):
    file = tmp_path / "tuned.json"
    trained = []

    def count(tasks, on_epoch, on_outcome):
        trained.append([(t.method.name, t.part) for t in tasks])
        pretend(tasks, on_epoch, on_outcome)

    monkeypatch.setattr(tune, "run_tasks", count)
    assert main(["tune-demo", "--methods", "linear", *GRID, "--output", str(file)]) == 0
    assert [part for _, part in trained[0]] == ["fold 2", "fold 3"] * 2
    assert [name for name, _ in trained[1]] == ["linear, rate 0.1, decay 0.5"] * 2
    assert "linear, rate 0.1, decay 0.5 (61.0 % on held-out images)" in capsys.readouterr().out
    trained.clear()
    assert main(["tune-demo", "--methods", "linear", "bias", *GRID, "--output", str(file)]) == 0
    assert {name.partition(",")[0] for part in trained for name, _ in part} == {"bias"}
    record = tuned_settings(file)
    assert record.keys() == {"linear", "bias"}
    for row in record.values():
        assert (row["learning_rate"], row["weight_decay"]) == (0.1, 0.5)
        assert row["folds"] == ["fold 2", "fold 3"] and row["epochs"] == 5
        assert len(row["measured"]) == 6


def test_tuning_goes_on_where_it_stopped(tmp_path, monkeypatch):
    file = tmp_path / "tuned.json"
    arguments = ["tune-demo", "--methods", "linear", *GRID, "--output", str(file)]

    def stop(tasks, on_epoch, on_outcome):
        pretend(tasks[:3], on_epoch, on_outcome)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run_tasks", stop)
    assert main(arguments) == 130
    trained = []

    def count(tasks, on_epoch, on_outcome):
        trained.extend(tasks)
        pretend(tasks, on_epoch, on_outcome)

    monkeypatch.setattr(tune, "run_tasks", count)
    assert main(arguments) == 0
    # One of four rates, and the other decay on two folds.
    assert len(trained) == 3
    assert main([*arguments, "--epochs", "2"]) == 0
    assert len(trained) == 3 + 6


def test_the_table_holds_every_row_and_how_its_rate_was_chosen(tmp_path, capsys):
    output = tmp_path / "out"
    names = ["linear", "vpt-deep", "vpt+tcpa"]
    assert main(["demo", "--quick", "--methods", *names, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    text = (output / "methods.md").read_text(encoding="utf-8")
    with (output / "methods.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == names
    tuned = tuned_settings()
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summaries = [json.loads(line) for line in lines if '"kind": "summary"' in line]
    for row, summary in zip(table, summaries, strict=True):
        assert float(row["mean"]) == pytest.approx(summary["mean"], abs=1e-4)
        assert int(row["trained_values"]) == summary["trainable"]
        assert float(row["learning_rate"]) == tuned[row["method"]]["learning_rate"]
        assert f"| {METHODS[row['method']].label} | {summary['mean']:.1f} |" in text
    assert "VPT+TCPA - VPT-Deep: " in text and "VPT+TCPA - VPT-Deep: " in printed
    for part in ("The test images chose nothing", "held-out images of fold", "20 prompt rows",
                 "--quick: the figures mean nothing."):  # fmt: skip
        assert part in text
    assert "\x1b" not in printed


def test_all_lists_what_is_left_out(tmp_path, monkeypatch, capsys):
    deep = replace(METHODS["partial-1"], tuning=tcpa.LastBlockTuning(num_blocks=99))
    monkeypatch.setattr(methods, "METHODS", {"linear": METHODS["linear"], "partial-1": deep})
    assert main(["demo", "--quick", "--methods", "all", "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "methods.md").read_text(encoding="utf-8")
    assert "- partial-1 is left out: tuning: num_blocks: got 99, expected at most" in text


def test_gains_are_taken_seed_by_seed():
    def row(method, *accuracies):
        rest = {"trainable": 1, "seconds_per_epoch": 1.0, "implementation": "", "reason": ""}
        return DemoScore(method=method, accuracies=accuracies, **rest)

    found = [row("vp", 50.0, 60.0), row("vpt-deep", 70.0, 80.0), row("vp+tcpa", 53.0, 59.0)]
    found += [row("vpt+tcpa", 70.0, 79.0), row("vfpt+tcpa", 1.0, 2.0)]
    assert compare.gains(found) == [
        "VP+TCPA - VP: +1.0 points (by seed: +3.0, -1.0)",
        "VPT+TCPA - VPT-Deep: -0.5 points (by seed: +0.0, -1.0)",
    ]


def test_a_row_whose_choices_changed_is_not_taken_as_tuned(monkeypatch):
    record = tuned_settings()
    record["linear"] = record["linear"] | {"choices": {}}
    monkeypatch.setattr(compare, "tuned_settings", lambda: record)
    config = DemoConfig(methods=("linear",))
    with pytest.raises(UsageError, match="tune-demo --methods linear"):
        compare.with_settings(config, [row_of("linear")], {})
    reasons: dict[str, str] = {}
    found = [row_of("linear"), row_of("vpt-deep")]
    (left,) = compare.with_settings(DemoConfig(methods=("all",)), found, reasons)
    assert left.name == "vpt-deep" and "no learning rate is recorded" in reasons["linear"]


@pytest.mark.parametrize("rows", [["vpt-dep"], ["linear", "linear"], []])
@pytest.mark.parametrize("command", ["demo", "tune-demo"])
def test_bad_rows_are_named(command, rows, tmp_path, capsys):
    output = tmp_path / "out"
    assert main([command, "--methods", *rows, "--output", str(output)]) == 2
    told = capsys.readouterr().err
    assert "--methods: got" in told and ("vpt-dep" not in rows or "'vpt-deep'?" in told)
    assert not output.exists()


def test_a_damaged_record_is_named(tmp_path, capsys):
    file = tmp_path / "tuned.json"
    file.write_text("[]", encoding="utf-8")
    assert main(["tune-demo", "--methods", "linear", "--output", str(file)]) == 2
    assert f"{file}: got other data, expected what tune-demo" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "[]"
