"""Promise: a search tries the published grid on validation images, once each, and writes a choice
that runs take; it never reads a test image."""

import json
import re
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import tyro
from vtab_trees import write_task

from tcpa.cli import UsageError
from tcpa.train.__main__ import main
from tcpa.train.jobs import search as command
from tcpa.train.jobs.scheduler import PROGRAM, Job
from tcpa.train.jobs.search import DIVERGED, grid_of, search
from tcpa.train.jobs.sweep import jobs_of
from tcpa.train.options.run import RunConfig, SweepConfig
from tcpa.train.options.search import SearchConfig
from tcpa.train.recipes.choices import CHOICE, Choice, read_choice
from tcpa.train.recipes.recipe import recipe
from tcpa.train.recipes.runspec import resolve

SMALL = {"backbone": "test_vit", "weights": "none", "image_size": 32, "precision": "fp32",
         "device": "cpu", "tensorboard": False, "epochs": 1, "batch_size": 8}  # fmt: skip

RESULT_NUMBERS = ("seconds_per_epoch", "seconds_per_evaluation", "images_per_second",
                  "pipeline_images_per_second", "trainable")  # fmt: skip


def write_trial(job: Job) -> str | None:
    """Leave behind what the run of a trial does, without the training; return what went wrong."""
    # What the command line says, as the process of the run would read it.
    config = tyro.cli(RunConfig, args=job.command[len(PROGRAM) :])
    assert config.protocol == "tune"
    settings = resolve(config)
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    count = folder / "starts"
    count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
    rate, decay = settings.learning_rate, settings.weight_decay
    said = ""
    if rate > 10:
        said = "epoch 1, step 3: the loss is not finite; the last checkpoint is of an earlier step"
    elif rate == 2.0 and not Path("mended").exists():
        said = "no memory"
    if said:
        with (folder / "log.txt").open("a") as log:
            log.write(f"some line\n{said}\n")
        return said
    # The best rate is 1, whatever the decay but the highest.
    accuracy = {0.5: 60.0, 1.0: 80.0, 2.0: 70.0}.get(rate, 10.0) - 20 * (decay == 0.01)
    start = dict.fromkeys(("date", "device", "precision", "eval_precision"), "d")
    start |= {"processes": 1, "backbone": {}, "data": {}, "versions": {}}
    (folder / "config.json").write_text(json.dumps(settings.describe()))
    (folder / "environment.json").write_text(json.dumps([start]))
    shared = {"epoch": 1, "loss": 1.0, "seconds": 1.0}
    lines = [{"kind": "epoch", **shared},
             {"kind": "evaluation", "split": "val", "accuracy": accuracy, **shared}]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ("dataset", "method", "seed")
    result = {name: getattr(settings, name) for name in names} | dict.fromkeys(RESULT_NUMBERS, 1)
    result |= {"protocol": "tune", "epochs": 1, "epoch": 1, "accuracy": accuracy}
    (folder / "result.json").write_text(json.dumps(result))
    return None


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Trials take no time, and no process."""
    monkeypatch.chdir(tmp_path)

    def carry_out(jobs, devices, console):
        return [(job, reason) for job in jobs if (reason := write_trial(job)) is not None]

    monkeypatch.setattr(command, "carry_out", carry_out)


def config_of(output, rates=(0.5, 1.0), decays=(0.0, 0.001, 0.01), **options) -> SearchConfig:
    given = {"method": "vpt-deep", "dataset": "vtab-pets", "output": output / "searches"}
    given |= {"learning_rates": rates, "weight_decays": decays}
    return SearchConfig(**SMALL | given | options)


def starts(output) -> list[int]:
    return [int(path.read_text()) for path in sorted(output.rglob("starts"))]


# Grids.


def test_the_published_grids_are_tried(tmp_path) -> None:
    """METHOD's of VPT: rates for batches of 256, with a lower one on VTAB-1k."""
    rates = [50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1]
    decays = [0.01, 0.001, 0.0001, 0]
    for dataset, more in (("cub", []), ("vtab-dtd", [0.05])):
        config = SearchConfig(method="vpt-deep", dataset=dataset)
        grid = grid_of(config, resolve(config.trial()))
        # The recipe's batch is 128.
        assert set(grid.learning_rates) == {rate / 2 for rate in rates + more}
        assert set(grid.weight_decays) == set(decays)
        assert len(list(grid.pairs())) == 4 * (len(rates) + len(more))
        assert grid.source == f"grid of {recipe(dataset, 'vpt-deep').source}"
    smaller = SearchConfig(method="vpt-deep", dataset="cub", batch_size=64)
    assert max(grid_of(smaller, resolve(smaller.trial())).learning_rates) == 12.5
    full = SearchConfig(method="full", dataset="cub")
    grid = grid_of(full, resolve(full.trial()))
    assert grid.learning_rates == tuple(r * 384 / 256 for r in (1e-4, 5e-4, 1e-3, 5e-3))
    assert grid.weight_decays == (0.01,), "hard-coded in the source"
    config = SearchConfig(method="vpt+tcpa", dataset="vtab-dtd")
    grid = grid_of(config, resolve(config.trial()))
    assert grid.learning_rates == (0.001, 0.0015, 0.002, 0.004, 0.005, 0.01, 0.014)
    assert grid.weight_decays == (0.1, 0.5, 1.4)
    assert grid.source == "values of the official TCPA scripts; no grid is published"


def test_a_method_without_a_published_grid_asks_for_one() -> None:
    config = SearchConfig(method="vp", dataset="cub")
    with pytest.raises(UsageError, match="--learning-rates: got none for vp"):
        grid_of(config, resolve(config.trial()))
    config = SearchConfig(method="vp", dataset="cub", learning_rates=(40.0, 4.0))
    with pytest.raises(UsageError, match="--weight-decays: got none for vp"):
        grid_of(config, resolve(config.trial()))
    config = replace(config, weight_decays=(0.0,))
    grid = grid_of(config, resolve(config.trial()))
    assert (grid.learning_rates, grid.weight_decays) == ((4.0, 40.0), (0.0,))
    assert grid.source == "given by hand"


# Trials and the choice.


def test_every_pair_is_one_run_that_reads_no_test_image(stand_in, tmp_path, capsys) -> None:
    config = config_of(tmp_path)
    search(replace(config, print_jobs=True))
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    runs = [tyro.cli(RunConfig, args=line[len(PROGRAM) :]) for line in lines]
    pairs = [(run.learning_rate, run.weight_decay) for run in runs]
    assert pairs == list(product((0.5, 1.0), (0.0, 0.001, 0.01)))
    assert {run.protocol for run in runs} == {"tune"}
    folders = {resolve(run).folder for run in runs}
    assert len(folders) == 6 and {folder.parent for folder in folders} == {
        tmp_path / "searches/vtab-pets/vpt-deep"
    }
    assert not list(tmp_path.rglob("starts"))


def test_the_choice_is_the_best_on_validation_images(stand_in, tmp_path, capsys) -> None:
    choice = search(config_of(tmp_path))
    assert (choice.learning_rate, choice.val_accuracy) == (1.0, 80.0)
    assert choice.weight_decay == 0.001, "of equal ones the highest decay"
    assert starts(tmp_path) == [1] * 6
    assert [trial["val_accuracy"] for trial in choice.trials] == [60, 60, 40, 80, 80, 60]
    path = tmp_path / "searches/vtab-pets/vpt-deep" / CHOICE
    assert Choice(**json.loads(path.read_text())) == choice
    printed = capsys.readouterr().out
    assert "6 trials, 0 of them finished; given by hand" in printed
    assert re.search(r"1 +│ +80.00 │ +80.00 │ +60.00", printed)
    before = path.read_text()
    search(config_of(tmp_path))
    assert starts(tmp_path) == [1] * 6 and path.read_text() == before
    assert "6 trials, 6 of them finished" in capsys.readouterr().out
    search(config_of(tmp_path, rates=(0.5, 1.0, 1.5)))
    assert len(starts(tmp_path)) == 9, "a larger grid tries what is new in it"


def test_a_loss_that_is_not_finite_is_an_outcome(stand_in, tmp_path, capsys) -> None:
    config = config_of(tmp_path, rates=(1.0, 25.0), decays=(0.0,))
    choice = search(config)
    assert [trial["val_accuracy"] for trial in choice.trials] == [80.0, None]
    assert "not finite" in capsys.readouterr().out
    search(config)
    assert starts(tmp_path) == [1, 1], "it is not tried again"
    search(replace(config, label_smoothing=0.1, output=tmp_path / "other"))
    path = tmp_path / "searches/vtab-pets/vpt-deep" / DIVERGED
    (tmp_path / "other/vtab-pets/vpt-deep" / DIVERGED).write_text(path.read_text())
    search(replace(config, label_smoothing=0.1, output=tmp_path / "other"))
    assert starts(tmp_path / "other") == [1, 2], "under other options it is"
    with pytest.raises(UsageError, match=r"--learning-rates: got 25.0, expected one with which"):
        search(config_of(tmp_path, rates=(25.0,), decays=(0.0,)))


def test_a_failed_trial_stops_no_other_and_leaves_the_choice_open(stand_in, tmp_path) -> None:
    config = config_of(tmp_path, rates=(1.0, 2.0), decays=(0.0,))
    with pytest.raises(
        UsageError,
        match=r"1 of 2 trials failed, .*tune-lr2.0-wd0.0-seed42 "
        r"\(no memory; see .*log.txt\); run the same command again",
    ):
        search(config)
    assert not list(tmp_path.rglob(CHOICE))
    Path("mended").touch()
    choice = search(config)
    assert choice.learning_rate == 1.0 and starts(tmp_path) == [1, 2]


# Use of the choice.


def test_runs_take_the_choice(stand_in, tmp_path) -> None:
    search(config_of(tmp_path))
    given = SMALL | {"choices": tmp_path / "searches", "output": tmp_path / "runs"}
    config = RunConfig(dataset="vtab-pets", method="vpt-deep", **given | {"epochs": 3})
    settings = resolve(config)
    assert (settings.peak_rate, settings.weight_decay) == (1.0, 0.001)
    assert (config.protocol, settings.epochs) == ("last", 3)
    assert settings.chosen == "given by hand"
    assert settings.note.startswith("rate and decay were chosen on validation images")
    assert "middle values" not in settings.note
    jobs = jobs_of(SweepConfig(datasets=("vtab-pets",), methods=("vpt-deep",), **given))
    assert [job.spec.seed for job in jobs] == [42, 44, 82, 100, 800]
    assert {job.spec.learning_rate for job in jobs} == {1.0}
    # The command of a job gives the same run.
    for job in jobs:
        again = tyro.cli(RunConfig, args=job.command[len(PROGRAM) :])
        assert resolve(again).describe() == job.spec.describe()


def refused(tmp_path, **options) -> str:
    given = SMALL | {"choices": tmp_path / "searches", "dataset": "vtab-pets"}
    with pytest.raises(UsageError) as caught:
        resolve(RunConfig(**given | {"method": "vpt-deep"} | options))
    return str(caught.value)


def test_a_choice_that_does_not_fit_is_refused(stand_in, tmp_path) -> None:
    search(config_of(tmp_path))
    for options, message in (
        ({"batch_size": 4}, "recipe.batch_size: got 4, expected 8 as in the search of "),
        ({"normalize": "half"}, "normalization.mean: got [0.5, 0.5, 0.5], expected [0.485"),
        ({"learning_rate": 1.0}, "--learning-rate: got 1.0, expected none with --choices"),
        ({"weight_decay": 0.1}, "--weight-decay: got 0.1, expected none with --choices"),
        ({"dataset": "vtab-dtd"}, "tcpa-train search vpt-deep vtab-dtd --output"),
        ({"method": "vfpt"}, "searches without vtab-pets/vfpt/choice.json, expected the choice"),
    ):
        assert message in refused(tmp_path, **options)
    path = tmp_path / "searches/vtab-pets/vpt-deep" / CHOICE
    found = json.loads(path.read_text())
    for broken in ({"dataset": "vtab-dtd"}, {"learning_rate": "much"}, {"more": 1}):
        path.write_text(json.dumps(found | broken))
        assert "no choice for vpt-deep on vtab-pets" in refused(tmp_path)
    path.write_text("{")
    assert "choice.json: cannot be read" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("--method", ["vpt-deeb", "cub"]),
        ("DATASET", ["vpt-deep", "cubs"]),
        ("--protocol", ["vpt-deep", "cub", "--protocol", "official"]),
        ("--learning-rate", ["vpt-deep", "cub", "--learning-rate", "1"]),
        ("--learning-rates", ["vpt-deep", "cub", "--learning-rates", "1", "1"]),
        ("--learning-rates", ["vpt-deep", "cub", "--learning-rates", "0"]),
        ("--weight-decays", ["vpt-deep", "cub", "--weight-decays", "-1"]),
        ("--choices", ["vpt-deep", "cub", "--choices", "c"]),
        ("--seed", ["vpt-deep", "cub", "--seed", "-1"]),
        ("--gpus", ["vpt-deep", "cub", "--gpus", "-1"]),
    ],
)
def test_bad_arguments_are_named(name, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["search", *words]) == 2
    assert f"{name}: got" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# The whole way.


def test_a_real_search_never_opens_a_test_image(tmp_path, monkeypatch, capsys) -> None:
    folder = write_task("vtab-pets", tmp_path / "data")
    for path in (folder / "images/test").iterdir():
        path.unlink()
    monkeypatch.chdir(tmp_path)
    words = "linear vtab-pets --learning-rates 0.01 --weight-decays 0 --backbone test_vit"
    words += " --weights none --image-size 32 --epochs 1 --batch-size 8 --device cpu"
    words += " --no-tensorboard --precision fp32"
    assert main(["search", *shlex.split(words)]) == 0
    choice = read_choice(tmp_path / "searches", "vtab-pets", "linear")
    assert (choice.learning_rate, choice.weight_decay) == (0.01, 0.0)
    assert 0 <= choice.val_accuracy <= 100 and "--choices searches" in capsys.readouterr().out
    assert main(["report", "searches"]) == 0
    assert "a trial of a search" in capsys.readouterr().out
