"""Ablations: every study trains what it says, is compared on validation images and resumes."""

import csv
import dataclasses
import json
import os
import shlex
import signal
from dataclasses import replace

import pytest
import torch
from train_runs import make_config, make_splits

import tcpa
from tcpa.cli import UsageError
from tcpa.train.__main__ import main, parse
from tcpa.train.demo.methods import PROMPTS, chosen_methods
from tcpa.train.demo.training import DemoEpoch, DemoOutcome, run_tasks
from tcpa.train.engine.interruption import Interrupted
from tcpa.train.engine.loop import Loop
from tcpa.train.jobs.ablate import runs
from tcpa.train.jobs.ablate.command import ablate
from tcpa.train.jobs.ablate.figures import draw_study
from tcpa.train.jobs.ablate.runs import AblationResult, spec_of, task_of
from tcpa.train.jobs.ablate.studies import label, make_studies
from tcpa.train.jobs.ablate.tables import (
    conclusions,
    csv_text,
    markdown,
    notes,
    summarise,
    table_of,
)
from tcpa.train.options.ablate import STUDIES, AblateConfig
from tcpa.train.recipes.rows import METHODS
from tcpa.train.recipes.runspec import resolve

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ("--pool-sizes", "2", "4", "--top-ks", "1", "3", "--lengths", "1", "2")
SMALL += ("--match-weights", "0", "0.1")


def pretend(tasks, on_epoch, on_outcome):
    """Stand in for training."""
    for number, task in enumerate(tasks):
        epoch = DemoEpoch(task.method.name, task.seed, task.epochs, 1.0, 50.0, 40.0 + number, 0.1)
        found = DemoOutcome(epochs=(epoch,), trainable=7, implementation=("", ""))
        on_outcome(task, found)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All studies on the digits, in their quick form and without the training."""
    folder = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "run_tasks", pretend)
        assert main(["ablate", "demo", "--quick", *SMALL, "--output", str(folder)]) == 0
    return folder


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_leaves_a_table_and_a_picture(study, finished):
    target = finished / "demo" / study
    assert target.with_suffix(".png").read_bytes().startswith(PNG)
    text = target.with_suffix(".md").read_text(encoding="utf-8")
    rows = rows_of(target.with_suffix(".csv"))
    expected = {"pools": 4, "components": 3, "fourier": 3}.get(study, 2)
    assert len(rows) == expected
    # Heading and rule.
    assert text.count("\n| ") == expected + 2
    assert "Protocol val" in text
    assert "--quick: the figures mean nothing." in text
    for row in rows:
        assert row["study"] == study and row["protocol"] == "val" and row["seeds"] == "1"
        assert 40 <= float(row["validation"]) < 60
        assert row["mean_validation"] == row["validation"] and row["spread_validation"] == ""
        assert f"{float(row['validation']):.1f}" in text


def test_settings_that_are_equal_are_trained_once_and_not_again(finished, monkeypatch, capsys):
    shared = {"top-k": [], "length": ["1"], "selection": ["nearest"], "normalization": ["all"]}
    values = {
        row["validation"]
        for study, rows in shared.items()
        for row in rows_of(finished / "demo" / f"{study}.csv")
        if row["row"] in rows
    }
    assert len(values) == 1
    # 16 settings in 21 lines.
    assert len(list((finished / "demo").rglob("result.json"))) == 16
    before = (finished / "demo" / "pools.csv").read_bytes()

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "run_tasks", refuse)
    assert main(["ablate", "demo", "--quick", *SMALL, "--output", str(finished)]) == 0
    assert (finished / "demo" / "pools.csv").read_bytes() == before
    assert "Pool sizes" in capsys.readouterr().out


def test_an_interrupted_ablation_goes_on_and_a_run_repeats(tmp_path, monkeypatch):
    trained = []

    def stop_after_one(tasks, on_epoch, on_outcome):
        trained.append(tasks[0].method.name)
        run_tasks(tasks[:1], on_epoch, on_outcome)
        os.kill(os.getpid(), signal.SIGTERM)

    config = AblateConfig(
        recipe="demo", study=("selection",), quick=True, output=tmp_path / "a", device="cpu"
    )
    with monkeypatch.context() as patch:
        patch.setattr(runs, "run_tasks", stop_after_one)
        with pytest.raises(Interrupted, match="resumes the runs that are not finished"):
            ablate(config)
    (kept,) = tmp_path.rglob("result.json")
    before = kept.stat().st_mtime_ns

    def note(tasks, on_epoch, on_outcome):
        trained.extend(task.method.name for task in tasks)
        return run_tasks(tasks, on_epoch, on_outcome)

    monkeypatch.setattr(runs, "run_tasks", note)
    (summaries,) = ablate(config).values()
    assert trained == ["vpt+tcpa", "vpt+tcpa.selection-farthest"]
    assert kept.stat().st_mtime_ns == before
    assert [list(one.runs) for one in summaries] == [[0], [0]]

    # One cell writes no table.
    assert ablate(replace(config, output=tmp_path / "b", cells=("base",))) == {}
    (again,) = (tmp_path / "b").rglob("*.*son")
    assert again.relative_to(tmp_path / "b") == kept.relative_to(tmp_path / "a")
    first, second = (json.loads(file.read_text())["result"] for file in (kept, again))
    assert first["validation"] == second["validation"] == summaries[0].validation[0]


def test_runs_on_the_digits_have_their_fold_and_their_tuned_settings(tmp_path):
    _, vpt, ours = chosen_methods()
    config = AblateConfig(recipe="demo", study=("components",), output=tmp_path)
    (study,) = make_studies(config, PROMPTS["TCPA"])
    cpu = torch.device("cpu")
    tasks = [task_of(config, study.settings[0], seed, cpu) for seed in range(5)]
    assert [task.part for task in tasks] == ["fold 0", "fold 1", "fold 2", "fold 3", "fold 0"]
    assert all(task.then_test for task in tasks)
    assert not task_of(replace(config, protocol="tune"), study.settings[0], 0, cpu).then_test
    methods = [task_of(config, setting, 0, cpu).method for setting in study.settings]
    assert [method.prompts for method in methods[::2]] == [vpt.prompts, ours.prompts]
    assert methods[1].prompts == replace(ours.prompts, coordination="role")
    found = [(method.learning_rate, method.weight_decay) for method in methods]
    assert found[0] == (vpt.learning_rate, vpt.weight_decay)
    assert found[1:] == [(ours.learning_rate, ours.weight_decay)] * 2


FIELDS = {
    "pools": {"cls_pool_size", "image_pool_size", "cls_top_k", "image_top_k"},
    "top-k": {"cls_top_k", "image_top_k"},
    "length": {"cls_prompt_length", "image_prompt_length"},
    "match-weight": {"match_weight"},
    "selection": {"selection"},
    "normalization": {"normalize_over"},
    "fourier": {"prompt_transform", "fourier_scope"},
}


@pytest.mark.parametrize("method", ["vpt+tcpa", "vfpt+tcpa"])
def test_a_study_changes_what_it_names_and_nothing_else(method):
    config = AblateConfig(recipe="cub", method=method)
    base = METHODS[method].prompts("cub")
    names: dict[str, object] = {}
    for study in make_studies(config, base):
        for setting in study.settings:
            # One name, one run.
            assert names.setdefault(setting.name, setting.prompts) == setting.prompts
            assert not set(label(setting.name, method)) & set("_/ ")
            if study.name == "components":
                continue
            assert isinstance(setting.prompts, tcpa.TCPAConfig)
            different = {
                field.name
                for field in dataclasses.fields(base)
                if getattr(setting.prompts, field.name) != getattr(base, field.name)
            }
            assert different <= FIELDS[study.name]
            sizes = (setting.prompts.cls_pool_size, setting.prompts.image_pool_size)
            used = (setting.prompts.cls_top_k, setting.prompts.image_top_k)
            if study.name == "pools":
                pair = (setting.row, setting.column)
                assert pair == tuple(map(str, sizes)) and used == tuple(min(10, s) for s in sizes)
    assert names[""] == base
    assert len({str(prompts) for prompts in names.values()}) == len(names)


def test_components_differ_in_coordination_alone():
    base = METHODS["vpt+tcpa"].prompts("cub")
    assert base.image_prompt, "CUB's script has a prompt on the image, which VPT lacks"
    (study,) = make_studies(AblateConfig(recipe="cub", study=("components",)), base)
    vpt, role, token = (setting.prompts for setting in study.settings)
    assert (vpt.length, vpt.deep, vpt.init) == (base.num_prompts, True, "uniform")
    assert vpt.dropout == base.prompt_dropout and vpt.fourier_fraction == 0
    assert role == replace(base, coordination="role", image_prompt=False)
    assert token == replace(base, image_prompt=False)
    fourier = METHODS["vfpt+tcpa"].prompts("dtd")
    config = AblateConfig(recipe="dtd", method="vfpt+tcpa", study=("components",))
    (study,) = make_studies(config, fourier)
    assert study.settings[0].prompts.fourier_fraction == 1
    assert study.settings[0].row == "VFPT"


def dataset_config(output, **options):
    """Return the ablation of a run that takes a second."""
    run = make_config(output, method="vpt+tcpa")
    shared = {
        field.name: getattr(run, field.name)
        for field in dataclasses.fields(AblateConfig)
        if field.name in run.__dataclass_fields__ and field.name != "method"
    }
    return AblateConfig(recipe="cub", **shared | {"protocol": "val", "seeds": (1, 2)} | options)


def test_a_dataset_is_trained_by_the_training_program(tmp_path, monkeypatch):
    config = dataset_config(tmp_path, study=("components", "top-k"), top_ks=(1, 2), seeds=(2,))
    found = ablate(config, make_splits())
    assert [len(found[name]) for name in config.study] == [3, 2]
    for one in (*found["components"], *found["top-k"]):
        assert list(one.runs) == [2] and len(one.test) == 1
    folder = tmp_path / "cub"
    # CUB's recipe has a prompt on the image, so that the last component is not the start itself.
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "vpt+tcpa",
        "vpt+tcpa.vpt",
        "vpt+tcpa.image-prompt-false",
        "vpt+tcpa.coordination-role.image-prompt-false",
        "vpt+tcpa.cls-top-k-1.image-top-k-1",
    }
    run = folder / "vpt+tcpa.cls-top-k-1.image-top-k-1" / "val-seed2"
    recipe = json.loads((run / "config.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe["prompts"]["cls_top_k"] == 1 and recipe["prompts"]["cls_pool_size"] == 4
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    (row,) = (row for row in rows_of(folder / "top-k.csv") if row["row"] == "1")
    assert row["validation"] == f"{result['val_accuracy']:.4f}"
    assert row["test"] == f"{result['accuracy']:.4f}"

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(Loop, "run", refuse)
    again = ablate(config, make_splits())
    assert again == found
    monkeypatch.undo()

    tune = replace(config, study=("normalization",), protocol="tune")
    (summaries,) = ablate(tune, make_splits()).values()
    assert all(one.test == [] for one in summaries)
    text = (folder / "normalization.md").read_text(encoding="utf-8")
    assert "No test image was read." in text


def test_an_interrupted_run_on_a_dataset_goes_on_and_a_failed_one_stops_no_other(
    tmp_path, monkeypatch
):
    config = dataset_config(tmp_path, study=("selection",), seeds=(1,))
    run, started = Loop.run, []

    def stop_in_the_second(self, *arguments):
        started.append(self.spec.folder.parent.name)
        if len(started) == 2:
            raise Interrupted(15, "asked to end")
        return run(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", stop_in_the_second)
        with pytest.raises(Interrupted):
            ablate(config, make_splits())
    (first,) = tmp_path.rglob("result.json")
    before = first.stat().st_mtime_ns
    (summaries,) = ablate(config, make_splits()).values()
    assert [list(one.runs) for one in summaries] == [[1], [1]]
    assert first.stat().st_mtime_ns == before

    folder = tmp_path / "cub" / "vpt+tcpa.selection-farthest" / "val-seed1"
    (folder / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"1 of 2 runs failed.*selection-farthest, seed 1") as told:
        ablate(config, make_splits())
    assert str(folder) in str(told.value)
    text = (tmp_path / "cub" / "selection.md").read_text(encoding="utf-8")
    assert "| farthest | - | - | - |" in text


def made_up(study_name, accuracies, config=None):
    """Return a study whose settings reached (validation, test) accuracies, by seed."""
    config = config or AblateConfig(recipe="dtd", study=(study_name,))
    (study,) = make_studies(config, METHODS["vpt+tcpa"].prompts("dtd"))
    runs = {
        (setting.name, seed): AblationResult(
            validation=validation, test=test, trainable=7, seconds_per_epoch=1.5
        )
        for setting, by_seed in zip(study.settings, accuracies, strict=True)
        for seed, (validation, test) in enumerate(by_seed)
    }
    return config, study, summarise(study.settings, (0, 1, 2), runs)


def test_the_best_setting_is_that_of_the_validation_images():
    better = [(90.0, 10.0), (92.0, 10.0), (94.0, 10.0)]
    worse = [(80.0, 99.0), (80.0, 99.0), (80.0, 99.0)]
    _, study, found = made_up("selection", [worse, better])
    assert table_of(study, found).rows[1] == [
        "farthest", "92.0", "2.0", "90.0, 92.0, 94.0", "10.0", "0.0", "0, 1, 2", "7", "1.50",
    ]  # fmt: skip
    (line,) = conclusions(study, found, 3)
    assert "entries by cosine similarity farthest (92.0 %)" in line
    assert "12.0 points" in line
    _, study, found = made_up("selection", [better, better])
    (line,) = conclusions(study, found, 3)
    assert "similarity nearest and entries by cosine similarity farthest (92.0 %)" in line


def test_components_are_compared_seed_by_seed():
    steps = [[(80.0, 0.0), (82.0, 0.0)], [(81.0, 0.0), (84.0, 0.0)], [(83.0, 0.0), (83.0, 0.0)]]
    config, study, found = made_up("components", steps)
    assert conclusions(study, found, 2) == [
        "VPT + R-TCPA - VPT: +1.5 points on validation images (by seed: +1.0, +2.0).",
        "VPT + R-TCPA + T-TCPA - VPT + R-TCPA: +0.5 points on validation images (by seed: +2.0, "
        "-1.0).",
    ]
    lines = notes(config, "2026-11-21.")
    assert "accuracy on validation images" in lines[0] and "nothing was chosen by it" in lines[0]
    assert "| VPT | 81.0 | 1.4 | 80.0, 82.0 |" in markdown(study, found, lines)
    assert csv_text(config, study, found).count("\n") == 7


def test_what_is_not_finished_is_shown_as_such():
    _, study, found = made_up("pools", [[(50.0, 50.0)], *[[]] * 15])
    figure = draw_study(study, found, (0, 1, 2), "dtd")
    axes, bar = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts[0] == "50.0" and texts[1:] == ["not\nfinished"] * 15
    assert axes.get_xlabel() == "entries of the image pool"
    assert axes.get_ylabel() == "entries of the CLS pool"
    assert bar.get_ylabel() == "validation accuracy, %"
    assert "mean of 3 seeds" in axes.get_title()
    assert axes.images[0].get_cmap().name == "cividis"


def test_one_thing_varied_is_drawn_with_its_seeds():
    _, study, found = made_up("selection", [[(50.0, 0.0), (60.0, 0.0)], [(70.0, 0.0)]])
    axes = draw_study(study, found, (0, 1, 2), "dtd").axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts[:4] == ["50.0", "60.0", "not\nfinished", "55.0\n± 7.1"]
    assert texts[4:] == ["70.0", "not\nfinished", "not\nfinished", "70.0"]
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["seed 0", "seed 1", "seed 2", "mean"]


def test_a_setting_is_the_start_with_other_prompts_and_a_name():
    config = AblateConfig(recipe="cub", study=("selection",), tuning="bias", pool_size=12)
    base = config.base(3)
    (study,) = make_studies(config, resolve(base).prompts)
    near, far = (spec_of(config, setting, 3) for setting in study.settings)
    assert near == resolve(base)
    prompts = replace(near.prompts, selection="farthest")
    named = "vpt+tcpa.selection-farthest_tuning-bias"
    assert far == replace(near, method=named, prompts=prompts)
    assert far.folder.parent.name == named and far.prompts.cls_pool_size == 12


def test_printed_jobs_train_one_run_each(tmp_path, capsys):
    words = ["demo", "--study", "selection", "fourier", "--seeds", "3", "4", "--epochs", "1"]
    assert main(["ablate", *words, "--output", str(tmp_path), "--print-jobs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # nearest = no transform, farthest, joint, each pool; two seeds.
    assert len(lines) == len(set(lines)) == 8
    assert not list(tmp_path.iterdir())
    configs = []
    for line in lines:
        _, minus_m, module, *arguments = shlex.split(line)
        assert (minus_m, module) == ("-m", "tcpa.train")
        configs.append(parse(arguments)[1])
    assert {(config.cells, config.seeds) for config in configs} == {
        ((name,), (seed,))
        for name in (
            "base",
            "selection-farthest",
            "prompt-transform-fourier",
            "prompt-transform-fourier.fourier-scope-pool",
        )
        for seed in (3, 4)
    }
    assert all(config.epochs == 1 and config.output == tmp_path for config in configs)


@pytest.mark.parametrize("damage", ["{", "[1]", '{"description": {}, "result": {"test": 1}}'])
def test_a_damaged_result_is_named(damage, tmp_path):
    folder = tmp_path / "demo" / "vpt+tcpa" / "val-seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(damage, encoding="utf-8")
    config = AblateConfig(recipe="demo", study=("selection",), quick=True, output=tmp_path)
    with pytest.raises(UsageError, match=r"result\.json: "):
        ablate(config)
    assert (folder / "result.json").read_text(encoding="utf-8") == damage


def test_results_of_other_settings_are_not_taken(finished, capsys):
    arguments = ["ablate", "demo", "--quick", "--learning-rate", "0.5", "--output", str(finished)]
    before = {path: path.read_bytes() for path in finished.rglob("*.*") if path.is_file()}
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "method.learning_rate: got 0.5, expected 0.1 as in " in told
    assert "repeat the first command, or choose another --output" in told
    assert before == {path: path.read_bytes() for path in finished.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--study", "pool"], "did you mean 'pools'?"),
        (["demo", "--protocol", "official"], "--protocol: got official, expected val or tune"),
        (["demo", "--seeds", "1", "1"], "--seeds: got 1, 1, expected one or more different"),
        (["demo", "--seeds", "-1"], "--seeds: got -1"),
        (["demo", "--pool-sizes", "0"], "--pool-sizes: got 0, expected numbers from 1"),
        (["demo", "--match-weights", "-0.1"], "--match-weights: got -0.1, expected numbers from 0"),
        (["demo", "--top-ks", "30"], "--study top-k: cls_top_k: got 30, expected at most"),
        (["demo", "--method", "vfpt+tcpa"], "--method: got 'vfpt+tcpa', expected vpt+tcpa"),
        (["demo", "--backbone", "x"], "--backbone: got x with RECIPE demo, expected --output"),
        (["demo", "--cells", "bas"], "--cells: got 'bas', expected vpt, coordination-role, base"),
        (["demo", "--epochs", "0"], "--epochs: got 0"),
        (["cubb"], "DATASET: got 'cubb'"),
        (["cub", "--method", "vpt-deep"], "--method: got 'vpt-deep', expected a row with TCPA"),
        (["cub", "--method", "vpt"], "--method: got 'vpt'"),
        (["cub", "--quick"], "--quick: got cub, expected demo"),
        (["cub", "--data", "none"], "none"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--weights", "none", "--device", "cpu"] if arguments[0] == "cub" else []
    assert main(["ablate", *arguments, *options, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not list(output.rglob("*.json"))


def test_an_unwritable_output_and_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    arguments = ["ablate", "demo", "--quick", "--output", str(file)]
    assert main(arguments) == 2
    assert "--output: got " in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(arguments) == 2
    assert "WORLD_SIZE: got 4" in capsys.readouterr().err
