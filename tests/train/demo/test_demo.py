"""The demo: disjoint splits, one loop for all methods, every promised file, clear refusals."""

import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tcpa
from tcpa.cli import UsageError
from tcpa.train.__main__ import main
from tcpa.train.demo import compare, digits, tune
from tcpa.train.demo.backbone import load_backbone
from tcpa.train.demo.digits import FOLDS, STRENGTHS, load_digits, make_split
from tcpa.train.demo.methods import PROMPT_ROWS, PROMPTS, TUNED, chosen_methods, probe_strength
from tcpa.train.demo.session import DemoOutput, DemoScore
from tcpa.train.demo.training import (
    DemoTask,
    build_model,
    learning_rate_factor,
    predict,
    run_task,
    run_tasks,
    train_epochs,
)
from tcpa.train.demo.tune import best_pair
from tcpa.train.options.demo import DemoConfig

CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick demo: its output folder, its rows and the metrics it wrote."""
    folder = tmp_path_factory.mktemp("demo") / "output"
    threads = torch.get_num_threads()
    rows = compare.run_demo(DemoConfig(output=folder, quick=True, device="cpu"))
    assert torch.get_num_threads() == threads, "the demo left the number of threads changed"
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return folder, rows, [json.loads(line) for line in lines]


def test_digits_are_the_enlarged_originals() -> None:
    from sklearn.datasets import load_digits as originals

    images, labels = load_digits()
    assert images.shape == (1797, 1, 32, 32)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.max() == 1
    assert images.min() >= -1
    # Enlarging fourfold puts no pixel centre on an old one, but keeps the mean of smooth parts.
    small = 1 - torch.from_numpy(originals().images).float() / 8
    pooled = torch.nn.functional.avg_pool2d(images, 4)[:, 0]
    assert torch.corrcoef(torch.stack([pooled.flatten(), small.flatten()]))[0, 1] > 0.97


def rows_of(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_folds_are_blocks_of_the_training_images_and_never_see_a_test_image() -> None:
    images, labels = load_digits()
    train, train_labels, test, test_labels = make_split("test")
    assert train_labels.bincount().tolist() == [100] * 10
    assert len(test) == len(test_labels) == 797
    threes = images[labels == 3]
    assert train[train_labels == 3].equal(threes[:100])
    assert test[test_labels == 3].equal(threes[100:])
    assert not rows_of(train) & rows_of(test)
    measured = []
    for number, fold in enumerate(FOLDS):
        first, first_labels, held, held_labels = make_split(fold)
        assert first_labels.bincount().tolist() == [75] * 10
        assert held_labels.bincount().tolist() == [25] * 10
        assert rows_of(first) | rows_of(held) == rows_of(train)
        assert not rows_of(first) & rows_of(held)
        block = train[train_labels == 7][25 * number : 25 * (number + 1)]
        assert held[held_labels == 7].equal(block)
        measured.append(held)
    assert rows_of(torch.cat(measured)) == rows_of(train)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] < 0.001


def test_methods_are_compared_fairly() -> None:
    linear, vpt, ours = chosen_methods()
    assert linear.prompts is None
    assert isinstance(vpt.prompts, tcpa.VPTConfig)
    assert vpt.prompts.deep
    assert isinstance(ours.prompts, tcpa.TCPAConfig)
    assert vpt.prompts.num_prompts == ours.prompts.num_prompts == PROMPT_ROWS
    assert ours.prompts.prompt_dropout == 0


def test_the_settings_are_the_best_of_the_recorded_grid() -> None:
    record = json.loads(TUNED.read_text(encoding="utf-8"))
    measured = record["accuracy_on_folds"]
    assert record["chosen"].keys() == measured.keys() == PROMPTS.keys()
    for name, rows in measured.items():
        by_pair = {(rate, decay): accuracy for rate, decay, accuracy in rows}
        grid = itertools.product(record["learning_rates"], record["weight_decays"])
        assert sorted(by_pair) == sorted(grid)
        chosen = record["chosen"][name]
        assert (chosen["learning_rate"], chosen["weight_decay"]) == best_pair(by_pair)
    assert record["epochs"] == DemoConfig().epochs
    for method in chosen_methods():
        chosen = record["chosen"][method.name]
        assert (method.learning_rate, method.weight_decay) == tuple(chosen.values())


def test_the_penalty_of_the_converged_probe_is_the_best_on_the_folds(monkeypatch) -> None:
    asked = []

    def measure(part, strength):
        asked.append((part, strength))
        return {0.1: 90.0, 10.0: 92.0}.get(strength, 50.0)

    monkeypatch.setattr(digits, "converged_probe", measure)
    assert digits.best_strength() == 10.0
    assert asked == [(fold, strength) for strength in STRENGTHS for fold in FOLDS]
    assert probe_strength() in STRENGTHS
    monkeypatch.undo()
    assert digits.converged_probe("quick", 1.0) > 60


def test_a_tie_goes_to_the_smaller_rate_then_decay() -> None:
    assert best_pair({(0.1, 0.0): 88.0, (0.03, 0.5): 88.0, (0.01, 0.5): 87.0}) == (0.03, 0.5)
    assert best_pair({(0.1, 0.5): 88.0, (0.1, 0.1): 88.0}) == (0.1, 0.1)
    assert best_pair({(0.1, 0.5): 88.5, (0.03, 0.5): 88.0}) == (0.1, 0.5)


def test_tuning_writes_a_record_of_the_whole_grid(tmp_path, capsys, monkeypatch) -> None:
    def pretend(tasks, on_epoch):
        assert [task.part for task in tasks] == list(FOLDS) * 6
        return [
            SimpleNamespace(accuracy=50.0 + task.method.learning_rate + task.seed) for task in tasks
        ]

    monkeypatch.setattr(tune, "best_strength", lambda: 7.0)
    monkeypatch.setattr(tune, "run_tasks", pretend)
    file = tmp_path / "new" / "tuned.json"
    grid = ["--learning-rates", "0.0001", "0.1", "--weight-decays", "0.1"]
    assert main(["tune-demo", *grid, "--epochs", "1", "--output", str(file)]) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    for rows in record["accuracy_on_folds"].values():
        assert rows == [[0.0001, 0.1, pytest.approx(51.5001)], [0.1, 0.1, pytest.approx(51.6)]]
    assert record["probe_strength"] == 7.0
    assert record["chosen"] == {
        name: {"learning_rate": 0.1, "weight_decay": 0.1} for name in PROMPTS
    }
    assert "linear probe, rate 0.1, decay 0.1 (51.6 %" in capsys.readouterr().out


def test_training_repeats_by_seed_and_leaves_the_backbone_alone() -> None:
    split, method = make_split("quick"), chosen_methods()[-1]
    models = []
    for seed in (0, 0, 1):
        models.append(build_model(method, split, seed=seed))
        list(train_epochs(models[-1], method, split, seed=seed, epochs=1))
    images = split.test_images[:4]
    first, again, other = (model.eval()(images) for model in models)
    assert first.equal(again)
    assert not first.equal(other)
    shipped = dict(load_backbone().named_parameters())
    for name, value in models[0].backbone.named_parameters():
        if not name.startswith("head."):
            assert torch.equal(value, shipped[name]), name


def test_runs_side_by_side_equal_runs_alone_and_a_failed_one_is_told() -> None:
    threads, method = torch.get_num_threads(), chosen_methods()[0]
    # The last task begins first: the bad one waits until another has ended.
    bad = DemoTask(method=replace(method, prompts="none"), seed=0, epochs=1, device=CPU)
    tasks = [bad, *(DemoTask(method=method, seed=seed, epochs=1, device=CPU) for seed in (0, 1))]
    together = {}
    with pytest.raises(TypeError, match="config"):
        run_tasks(tasks, lambda _: None, together.__setitem__)
    assert together
    torch.set_num_threads(1)
    for task, found in together.items():
        alone = run_task(task, lambda _: None)
        assert (found.accuracy, found.trainable) == (alone.accuracy, alone.trainable)
        assert found.implementation == alone.implementation
        assert found.epochs[0].loss == pytest.approx(alone.epochs[0].loss, rel=1e-3)
    torch.set_num_threads(threads)


def test_rows_tell_accuracy_size_and_implementation(finished) -> None:
    _, rows, _ = finished
    assert [row.method for row in rows] == ["linear probe", "VPT-deep", "TCPA"]
    head, prompts = 128 * 10 + 10, 4 * PROMPT_ROWS * 128
    assert [row.trainable for row in rows] == [head, head + prompts, head + 2 * prompts]
    for row in rows:
        assert len(row.accuracies) == 1
        assert row.spread is None
        assert row.seconds_per_epoch > 0
        assert row.implementation in ("sdpa", "dense")
        assert "cpu" in row.reason.lower()


def test_metrics_hold_config_epochs_and_summary(finished) -> None:
    _, rows, lines = finished
    kinds = [line["kind"] for line in lines]
    assert kinds == ["config"] + ["epoch"] * 6 + ["summary"] * 3 + ["converged probe"]
    assert lines[0]["program"] == "tcpa demo"
    assert lines[0]["epochs"] == 2
    assert lines[0]["seeds"] == [0]
    epochs = lines[1:7]
    assert [line["epoch"] for line in epochs] == [1, 2] * 3
    assert all(line["loss"] > 0 for line in epochs)
    last = [line["test_accuracy"] for line in epochs if line["epoch"] == 2]
    assert last == [row.mean for row in rows] == [line["mean"] for line in lines[7:10]]


def test_saved_adapter_gives_the_reported_accuracy(finished) -> None:
    folder, rows, _ = finished
    model = tcpa.from_pretrained(folder / "tcpa_adapter", backbone=load_backbone())
    split = make_split("quick")
    right = predict(model, split.test_images) == split.test_labels
    assert 100 * float(right.double().mean()) == pytest.approx(rows[-1].mean)


def test_pictures_are_written(finished) -> None:
    folder, _, _ = finished
    for name in ("curves.png", "selection.png"):
        assert (folder / name).read_bytes().startswith(PNG), name
        assert (folder / name).stat().st_size > 10_000, name


def test_an_earlier_demo_is_replaced(finished) -> None:
    folder, _, lines = finished
    metrics = folder / "metrics.jsonl"
    DemoOutput(folder, {"seeds": [7]})
    assert json.loads(metrics.read_text(encoding="utf-8"))["seeds"] == [7]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_verdict_says_when_tcpa_does_not_win() -> None:
    def row(method: str, *accuracies: float) -> DemoScore:
        rest = {"trainable": 1, "seconds_per_epoch": 1.0, "implementation": "", "reason": ""}
        return DemoScore(method=method, accuracies=accuracies, **rest)

    rows = [row("linear probe", 80, 82), row("VPT-deep", 91, 92), row("TCPA", 90, 92)]
    assert compare.verdict(rows) == [
        "TCPA beats linear probe here: +10.0 points (by seed: +10.0, +10.0)",
        "TCPA does NOT beat VPT-deep here: -0.5 points (by seed: -1.0, +0.0)",
    ]
    assert rows[0].mean == 81
    assert rows[0].spread == pytest.approx(2**0.5)


def test_command_prints_one_table(tmp_path, capsys) -> None:
    assert main(["demo", "--quick", "--seeds", "5", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for expected in ("linear probe", "VPT-deep", "TCPA", "trainable", "Implementation:"):
        assert expected in printed
    assert "seed 5" in printed
    assert "\x1b" not in printed, "control codes outside a terminal"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("demo", ["--epochs", "0"]),
        ("demo", ["--seeds", "1", "1"]),
        ("demo", ["--seeds", "-3"]),
        ("demo", ["--seeds"]),
        ("demo", ["--seeds", str(2**64)]),
        ("demo", ["--device", "gpu"]),
        ("demo", ["--device", "cuda:99"]),
        ("tune-demo", ["--learning-rates", "0.1", "0.1"]),
        ("tune-demo", ["--learning-rates", "-1"]),
        ("tune-demo", ["--learning-rates", "0.1", "nan"]),
        ("tune-demo", ["--learning-rates"]),
        ("tune-demo", ["--weight-decays", "-0.1"]),
        ("tune-demo", ["--folds", "0"]),
        ("tune-demo", ["--folds", "5"]),
    ],
)
def test_bad_arguments_are_named(command, arguments, tmp_path, capsys) -> None:
    output = tmp_path / "out"
    assert main([command, *arguments, "--output", str(output)]) == 2
    assert f"{arguments[0]}: got" in capsys.readouterr().err
    assert not output.exists()


def test_a_folder_of_other_files_and_an_unwritable_one_are_refused(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    for folder in (tmp_path, tmp_path / "thesis.txt", tmp_path / "thesis.txt" / "below"):
        with pytest.raises(UsageError, match="--output: got"):
            DemoOutput(folder, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_missing_package_names_the_extra(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo", "--quick", "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "sklearn" in message
    assert "pip install 'tcpa[train,plot]'" in message
