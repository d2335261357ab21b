"""Promise: a run leaves a folder from which everything can be drawn, and says how it chose."""

import functools
import io
import json
import statistics
import sys
from dataclasses import replace

import pytest
import rich.console
import torch
from train_runs import CLASSES, make_config, make_splits

import tcpa
from tcpa.cli import UsageError
from tcpa.train.backbones import load_backbone
from tcpa.train.engine import progress
from tcpa.train.engine.checkpoint import CURRENT, load_checkpoint
from tcpa.train.engine.distributed import World
from tcpa.train.engine.model import evaluate
from tcpa.train.engine.precision import NUMERICS
from tcpa.train.engine.rundir import differences
from tcpa.train.jobs import run as running
from tcpa.train.jobs.run import run
from tcpa.train.recipes.runspec import resolve

CPU = World(torch.device("cpu"))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def finished(output, *, images=22, batch=8, **options):
    """Run; return result, folder, lines of the metrics."""
    result = run(make_config(output, **options), make_splits(images, batch))
    (folder,) = output.glob("*/*/*")
    return result, folder, lines_of(folder)


def adapted(folder):
    """Load the adapter of a run onto its backbone, which is random but for the seed."""
    torch.manual_seed(3407)
    backbone, _ = load_backbone("test_vit", "none", image_size=32)
    return tcpa.from_pretrained(folder / "adapter", backbone=backbone)


def accuracy_of(model, split):
    return evaluate(model, make_splits().evaluation[split], CPU, NUMERICS["fp32"]).accuracy


def accuracies(lines, split):
    return [line["accuracy"] for line in lines if line.get("split") == split]


# Protocols.


def test_official_is_the_best_test_epoch_and_says_so(tmp_path, capsys):
    result, folder, lines = finished(tmp_path, epochs=4)
    tested = accuracies(lines, "test")
    assert len(tested) == 4 and not accuracies(lines, "val")
    assert result.chosen_on == "test" and result.protocol == "official"
    assert result.accuracy == result.best_test_accuracy == max(tested)
    # The first of equals.
    assert result.epoch == tested.index(max(tested)) + 1
    assert result.last_accuracy == tested[-1]
    assert result.val_accuracy is None
    assert accuracy_of(adapted(folder), "test") == result.accuracy
    assert "chosen on the test images, as the official code does" in capsys.readouterr().out


def test_val_chooses_on_validation_and_tests_once(tmp_path):
    result, folder, lines = finished(tmp_path, epochs=4, protocol="val")
    chosen = accuracies(lines, "val")
    assert len(chosen) == 4 and accuracies(lines, "test") == [result.accuracy]
    assert result.chosen_on == "val" and result.val_accuracy == max(chosen)
    assert result.epoch == chosen.index(max(chosen)) + 1
    assert result.best_test_accuracy is None
    assert lines[-1]["split"] == "test" and lines[-1]["epoch"] == result.epoch
    model = adapted(folder)
    assert accuracy_of(model, "test") == result.accuracy
    assert accuracy_of(model, "val") == result.val_accuracy


def test_last_tests_once_at_the_end(tmp_path):
    result, folder, lines = finished(tmp_path, protocol="last")
    assert accuracies(lines, "test") == [result.accuracy] and not accuracies(lines, "val")
    assert result.chosen_on is None and result.epoch == result.epochs == 2
    assert result.last_accuracy == result.accuracy and result.best_test_accuracy is None
    assert accuracy_of(adapted(folder), "test") == result.accuracy


# The folder.


def test_the_record_says_with_what_it_was_made(tmp_path):
    result, folder, _ = finished(tmp_path, normalize="half", seed=11)
    (start,) = json.loads((folder / "environment.json").read_text())
    assert start["versions"]["torch"] == result.versions["torch"]
    assert {"python", "tcpa", "timm", "numpy"} <= start["versions"].keys()
    assert start["from_step"] == 0 and start["processes"] == 1 and start["date"]
    assert start["precision"] == start["eval_precision"] == "fp32"
    assert start["implementation"][0] == result.implementation == "sdpa"
    assert start["data"] == {"dataset": "generated"}
    backbone = start["backbone"]
    assert backbone["name"] == "test_vit" and backbone["weights"] == "none"
    assert len(backbone["fingerprint"]) == 64
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"]["seed"] == 11 and config["recipe"]["prompts"]["cls_pool_size"] == 4
    assert config["normalization"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert config["options"]["protocol"] == "official"
    saved = json.loads((folder / "result.json").read_text())
    assert saved["accuracy"] == result.accuracy and saved["normalize"] == "half"
    assert saved["seed"] == 11 and saved["label"] == "CUB" and saved["note"] == ""
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["normalization"]["mean"] == [0.5] * 3


def test_metrics_hold_every_step_epoch_and_rate(tmp_path):
    result, _, lines = finished(tmp_path, log_steps=2)
    steps = [line for line in lines if line["kind"] == "steps"]
    # Three batches an epoch: after the second, and at the end.
    assert [(line["epoch"], line["step"]) for line in steps] == [(1, 2), (1, 3), (2, 5), (2, 6)]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2]
    # 16 images in two batches, then 6.
    for epoch, (first, second) in zip(epochs, (steps[:2], steps[2:]), strict=True):
        mean = (16 * first["loss"] + 6 * second["loss"]) / 22
        assert epoch["loss"] == pytest.approx(mean)
        assert epoch["images_per_second"] == pytest.approx(22 / epoch["seconds"])
    assert result.seconds_per_epoch == statistics.median(line["seconds"] for line in epochs)
    assert result.images_per_second > 0 and result.pipeline_images_per_second > 0
    assert result.train_images == 22 and result.test_images == 13
    assert result.seconds_per_evaluation > 0


def test_tensorboard_shows_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, folder, lines = finished(tmp_path, tensorboard=True)
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert {"steps/loss", "steps/learning_rate", "epoch/seconds", "test/accuracy"} <= set(tags)
    shown = {event.step: event.value for event in events.Scalars("steps/loss")}
    expected = {line["step"]: line["loss"] for line in lines if line["kind"] == "steps"}
    assert shown == pytest.approx(expected)


def test_outside_a_terminal_there_is_one_line_an_epoch(tmp_path, capsys):
    finished(tmp_path, method="vpt+tcpa")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert sum(line.startswith("epoch ") for line in printed.splitlines()) == 2
    assert "note: hyper-parameters of vpt+tcpa are unpublished" in printed
    assert "input pipeline alone" in printed and "images/s" in printed


def test_a_terminal_shows_rate_and_remaining_time(tmp_path, monkeypatch):
    screen = io.StringIO()
    console = functools.partial(rich.console.Console, file=screen, force_terminal=True)
    monkeypatch.setattr(progress, "Console", lambda **options: console(**options | {"width": 150}))
    display = progress.Display(CPU, "cub", total_images=40, done_images=10)
    with display:
        display.advance(10)
        display.note("loss 1.234  5,678 images/s")
        display.say("epoch 1")
        display._bar.refresh()
    shown = screen.getvalue()
    for part in ("cub", " 50 %", "loss 1.234  5,678 images/s", ":", "epoch 1"):
        assert part in shown
    other = progress.Display(World(CPU.device, 1, 2), "cub", total_images=40, done_images=0)
    before = len(shown)
    with other:
        other.say("epoch 1")
    assert len(screen.getvalue()) == before, "the first process alone is seen"


# Methods and precisions.


@pytest.mark.parametrize("method", ["linear", "vpt-deep", "vfpt", "vpt+tcpa", "vfpt+tcpa"])
def test_methods_train_what_is_theirs(method, tmp_path):
    result, _, lines = finished(tmp_path, method=method)
    head, width, blocks = 64 * CLASSES + CLASSES, 64, 6
    pools = 2 * 2 * 4 * width * blocks
    image_prompt = 6547
    expected = {
        "linear": head,
        "vpt-deep": head + 10 * width * blocks,
        "vfpt": head + 10 * width * blocks,
        "vpt+tcpa": head + pools + image_prompt,
        "vfpt+tcpa": head + pools + image_prompt,
    }
    assert result.trainable == expected[method]
    distance = [line["distance"] for line in lines if line["kind"] == "epoch"]
    assert (distance[0] > 0) == method.endswith("tcpa")
    assert (result.note == "") == (method == "vfpt+tcpa")


@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast", "fp16"])
def test_low_precisions_follow_float32(precision, tmp_path):
    # float16 may skip its first steps until the scale fits: hence the low rate.
    options = {"prompt_dropout": 0.0, "random_selection_epochs": 0, "learning_rate": 1e-4}
    exact = finished(tmp_path / "exact", **options)
    found = finished(tmp_path / "low", precision=precision, **options)
    assert found[0].precision == found[0].eval_precision == precision
    for a, b in zip(exact[2], found[2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_evaluations_in_float32_are_those_of_the_float32_model(precision, tmp_path):
    result, folder, lines = finished(tmp_path, precision=precision, eval_precision="fp32")
    assert (result.precision, result.eval_precision) == (precision, "fp32")
    torch.manual_seed(3407)
    backbone, _ = load_backbone("test_vit", "none", image_size=32)
    model = tcpa.from_pretrained(folder / "adapter", backbone=backbone, check_backbone=False)
    expected = evaluate(model, make_splits().evaluation["test"], CPU, NUMERICS["fp32"])
    (line,) = (x for x in lines if x["kind"] == "evaluation" and x["epoch"] == result.epoch)
    assert line["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert line["accuracy"] == expected.accuracy == result.accuracy


def test_first_epochs_select_at_random(tmp_path, monkeypatch):
    drawn, forward = [], tcpa.PromptedViT.forward

    def watched(model, images, **options):
        random = model.training and model.epoch < model.config.random_selection_epochs
        drawn.append((model.training, random))
        return forward(model, images, **options)

    monkeypatch.setattr(tcpa.PromptedViT, "forward", watched)
    finished(tmp_path, random_selection_epochs=1)
    first, second, tests = [(True, True)] * 3, [(True, False)] * 3, [(False, False)] * 2
    assert drawn == [*first, *tests, *second, *tests]


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses(tmp_path, monkeypatch):
    # Capture is what differs between models; generated code is torch's own business.
    compile_model = functools.partialmethod(tcpa.PromptedViT.compile, backend="eager")
    monkeypatch.setattr(tcpa.PromptedViT, "compile", compile_model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"random_selection_epochs": 1, "epochs": 3, "images": 8, "batch": 13}
    plain = finished(tmp_path / "plain", **options)
    compiled = finished(tmp_path / "compiled", compile=True, **options)
    # Two ways to select, and evaluation: not one more for every epoch.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    for a, b in zip(plain[2], compiled[2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


# What goes wrong.


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path):
    splits = make_splits()
    epoch = splits.train.epoch

    def poisoned(number, start=0):
        for index, batch in enumerate(epoch(number, start), start):
            if (number, index) == (1, 1):
                batch.images[0] = torch.nan
            yield batch

    splits.train.epoch = poisoned
    with pytest.raises(UsageError) as caught:
        run(make_config(tmp_path), splits)
    for part in ("epoch 2, step 5", "not finite", "--learning-rate"):
        assert part in str(caught.value)
    (folder,) = tmp_path.glob("*/*/*")
    found, _ = load_checkpoint(folder)
    assert found is not None and found.state["step"] == 4
    assert all(bool(torch.isfinite(value).all()) for value in found.tensors.values())
    assert (folder / CURRENT).exists() and not (folder / "result.json").exists()


def test_an_epoch_without_a_batch_is_named(tmp_path):
    with pytest.raises(UsageError, match="got 0 training images, expected at least one batch"):
        run(make_config(tmp_path), make_splits(0))


def test_a_result_of_another_version_is_named(tmp_path):
    _, folder, _ = finished(tmp_path)
    (folder / "result.json").write_text('{"accuracy": 3.0}')
    with pytest.raises(UsageError, match=r"result.json: .*version of tcpa"):
        run(make_config(tmp_path), make_splits())
    (folder / "result.json").write_text("{")
    with pytest.raises(UsageError, match=r"result.json: cannot be read"):
        run(make_config(tmp_path), make_splits())


def test_a_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(UsageError, match=r"--tensorboard: .*pip install 'tcpa\[train\]'"):
        run(make_config(tmp_path, tensorboard=True), make_splits())


def test_the_pipelines_rate_is_measured_on_few_batches(monkeypatch):
    monkeypatch.setattr(running, "PIPELINE_BATCHES", 2)
    splits = make_splits()
    epoch, served = splits.train.epoch, []
    splits.train.epoch = lambda number: (served.append(b) or b for b in epoch(number))
    assert running._pipeline_rate(splits, CPU) > 0
    assert len(served) == 2


def test_an_altered_result_is_refused_and_written_again(tmp_path):
    result, folder, _ = finished(tmp_path, epochs=2)
    path = folder / "result.json"
    values = json.loads(path.read_text())
    for altered, message in (
        ({}, "not what this version of tcpa writes"),
        (values | {"accuracy": 99.9}, r"damaged or altered: .*; if only result\.json is"),
    ):
        path.write_text(json.dumps(altered))
        with pytest.raises(UsageError, match=message):
            finished(tmp_path, epochs=2)
    path.unlink()
    assert finished(tmp_path, epochs=2)[0].accuracy == result.accuracy


def test_a_run_without_its_checkpoints_says_that_it_begins_anew(tmp_path, capsys):
    _, folder, _ = finished(tmp_path, epochs=2)
    assert "restarts" not in capsys.readouterr().out
    for path in (folder / "result.json", *folder.glob("checkpoint*")):
        path.unlink()
    finished(tmp_path, epochs=2)
    assert f"warning: no checkpoint in {folder}: training restarts" in capsys.readouterr().out


def test_a_run_of_one_folder_does_not_answer_for_another(tmp_path):
    config = make_config(tmp_path, dataset="folder")
    first, second = (resolve(replace(config, data=tmp_path / name)).describe() for name in "ab")
    assert differences(first, second) == [("folder", "a", "b")]
