"""Promise: recipes are those of the official scripts, and options change just what they name."""

import csv
import dataclasses
import io
from pathlib import Path

import pytest
import tyro
from train_runs import make_config

import tcpa
from tcpa.cli import UsageError
from tcpa.train.options.run import (
    RecipesConfig,
    RunConfig,
    SweepConfig,
    TrainOptions,
    parse_normalization,
)
from tcpa.train.recipes.recipe import METHODS, compose, print_recipes, recipe, recipe_rows
from tcpa.train.recipes.runspec import POOLS, resolve

HPARAMS = Path(__file__).parents[1] / "data" / "hparams_hta.csv"
"""What the official scripts pass, one row per dataset."""


def expected_rows():
    with HPARAMS.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_cell_equals_the_scripts():
    expected = expected_rows()
    assert len(expected) == 10 and len(expected[0]) == 33
    assert recipe_rows() == expected


def test_the_printed_csv_equals_the_scripts(capsys):
    print_recipes(RecipesConfig(csv=True))
    printed = capsys.readouterr().out
    assert printed == HPARAMS.read_text(encoding="utf-8")
    assert list(csv.DictReader(io.StringIO(printed))) == expected_rows()


def test_the_printed_table_has_every_value(capsys):
    print_recipes(RecipesConfig())
    lines = capsys.readouterr().out.splitlines()
    rows = expected_rows()
    for row in rows:
        (line,) = (line for line in lines if f" {row['dataset_flag']} " in line)
        for name in ("dataset_label", "script", "lr", "weight_decay", "pool_size_cls", "IPrompt"):
            assert row[name] in line
    common = " ".join(lines[lines.index(next(x for x in lines if x.startswith("For all"))) :])
    for name in ("batch_size", "topk_image", "mix_prob", "seed", "optimizer", "pool_loss_w"):
        assert f"{name}={rows[0][name]}" in common


@pytest.mark.parametrize("dataset", tcpa.HTA_DATASETS)
def test_methods_are_built_from_the_same_recipe(dataset):
    published = recipe(dataset)
    assert published.prompts == tcpa.TCPAConfig.official(dataset) and published.note == ""
    plain = recipe(dataset, "vpt+tcpa")
    assert plain.prompts == dataclasses.replace(published.prompts, prompt_transform="identity")
    assert recipe(dataset, "linear").prompts is None
    assert recipe(dataset, "vfpt").prompts == tcpa.VPTConfig.official_vfpt()
    deep = recipe(dataset, "vpt-deep").prompts
    assert isinstance(deep, tcpa.VPTConfig) and deep.deep and deep.fourier_fraction == 0
    unpublished = ("vfpt", "vpt+tcpa", "vp+tcpa", "dam-vp+tcpa", "autovp+tcpa", "lion")
    assert {m for m, row in METHODS.items() if row.training is None} == {
        *unpublished,
        "vfpt+tcpa",
    }
    own = {"method", "source", "note", "prompts", "input_name", "input_prompt"}
    for method in unpublished:
        other = recipe(dataset, method)
        assert "unpublished; those of vfpt+tcpa were taken" in other.note
        for field in dataclasses.fields(other):
            same = getattr(other, field.name) == getattr(published, field.name)
            assert same or field.name in own, field.name


def test_every_row_names_its_source_and_what_it_assumes():
    for name, row in METHODS.items():
        found = recipe("cub", name)
        assert found.method == name and found.source == row.source and row.label
        assert bool(found.note) == (name != "vfpt+tcpa")
        # A prompt on the image comes with TCPA's tokens, not with its convolutions.
        if name.endswith("+tcpa") and found.input_prompt is not None:
            assert isinstance(found.prompts, tcpa.TCPAConfig) and not found.prompts.image_prompt


def test_rates_follow_the_batch_where_the_source_says_so(tmp_path):
    found = resolve(make_config(tmp_path, method="linear", batch_size=64))
    assert found.peak_rate == pytest.approx(found.learning_rate * 64 / 256)
    given = resolve(make_config(tmp_path, method="linear", batch_size=64, learning_rate=0.3))
    assert given.peak_rate == 0.3
    assert recipe("cub").peak_rate == recipe("cub").learning_rate


def test_choices_of_a_row_can_be_replaced(tmp_path):
    choices = {"input_prompt": "vp", "tuning": "bias"}
    config = make_config(tmp_path, method="vpt-deep", **choices)
    found = resolve(config)
    assert found.method == "vpt-deep_input-vp_tuning-bias"
    assert found.folder.parent.name == found.method
    assert found.input_prompt == tcpa.VPConfig() and found.tuning == tcpa.BiasTuning()
    assert found.prompts == recipe("cub", "vpt-deep").prompts
    assert "of which a choice was replaced" in found.note
    # The full name is a method too.
    assert recipe("cub", found.method) == recipe("cub", compose("vpt-deep", **choices))
    # Tunings with equal fields are told apart.
    plain = resolve(make_config(tmp_path, method="vpt-deep", tuning="head"))
    other = resolve(make_config(tmp_path, method="vpt-deep", tuning="bias"))
    assert plain.describe()["recipe"]["tuning"] == other.describe()["recipe"]["tuning"]
    assert plain.describe() != other.describe()
    assert recipe("cub", "dam-vp_input-none").input_prompt is None


def test_bugs_of_a_source_come_back_for_parity():
    assert recipe("cub", "dam-vp_parity").momentum == 0.0
    adapter = recipe("cub", "adapter_parity").tuning
    assert isinstance(adapter, tcpa.AdapterTuning) and adapter.zero_init
    for method in ("dam-vp", "adapter"):
        assert "corrected: " in recipe("cub", method).note
        repeated = recipe("cub", f"{method}_parity").note
        assert "corrected" not in repeated and "repeats the known bugs" in repeated
    with pytest.raises(UsageError, match="--parity: got parity with VFPT, expected a method whose"):
        recipe("cub", "vfpt_parity")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("vfpt_input-vpp", r"--input-prompt: got 'vpp', .*did you mean 'vp'\?"),
        ("vfpt_tuning-biases", r"--tuning: got 'biases', .*did you mean 'bias'\?"),
        ("vfpt_tunings-bias", "--method: got 'tunings-bias', expected input-NAME, tuning-NAME or"),
    ],
)
def test_an_unknown_choice_is_named(method, message):
    with pytest.raises(UsageError, match=message):
        recipe("cub", method)


def test_a_dataset_of_ones_own_says_whose_recipe_it_has():
    found = recipe("folder")
    assert (found.learning_rate, found.weight_decay) == (0.005, 0.1)
    assert "that of food101 was taken" in found.note and found.script == ""


@pytest.mark.parametrize(("method", "hint"), [("vftp+tcpa", "vfpt+tcpa"), ("zzz", "choose")])
def test_an_unknown_method_is_named(method, hint):
    with pytest.raises(UsageError) as caught:
        recipe("cub", method)
    assert method in str(caught.value) and hint in str(caught.value)


def test_options_replace_what_they_name(tmp_path):
    config = make_config(tmp_path, seed=5, match_weight=0.5, prompt_dropout=0.0, resize=40)
    found, official = resolve(config), recipe("cub")
    assert (found.epochs, found.batch_size, found.crop, found.resize) == (2, 8, 32, 40)
    assert found.seed == 5
    changed = {"epochs", "batch_size", "crop", "resize", "seed", "prompts"}
    for field in dataclasses.fields(official):
        same = getattr(found, field.name) == getattr(official, field.name)
        assert same == (field.name not in changed), field.name
    prompts = found.prompts
    assert isinstance(prompts, tcpa.TCPAConfig) and prompts.image_prompt
    assert (prompts.cls_pool_size, prompts.image_pool_size) == (4, 4)
    assert (prompts.cls_top_k, prompts.image_top_k, prompts.match_weight) == (2, 2, 0.5)
    assert (prompts.random_selection_epochs, prompts.prompt_dropout) == (1, 0.0)
    expected = tmp_path / "cub" / "vfpt+tcpa" / "official-seed5"
    assert found.folder == expected


def test_the_default_run_is_the_recipe():
    found, usual = resolve(RunConfig(dataset="gtsrb")), recipe("gtsrb")
    for field in dataclasses.fields(usual):
        assert getattr(found, field.name) == getattr(usual, field.name), field.name
    described = found.describe()
    assert described["normalization"]["mean"] == [0.485, 0.456, 0.406]
    assert described["options"]["backbone"] == "orig_in21k"


@pytest.mark.parametrize("option", [*POOLS, "prompt_dropout"])
def test_options_that_do_not_fit_the_method_are_named(option, tmp_path):
    config = make_config(
        tmp_path, method="linear", **{option: 1 if option != "prompt_dropout" else 0.5}
    )
    with pytest.raises(UsageError) as caught:
        resolve(config)
    message = str(caught.value)
    assert option.replace("_", "-") in message and "with --method linear" in message


def test_prompts_without_pools_have_dropout_too(tmp_path):
    prompts = resolve(make_config(tmp_path, method="vfpt", prompt_dropout=0.25)).prompts
    assert isinstance(prompts, tcpa.VPTConfig) and prompts.dropout == 0.25


def test_values_that_do_not_fit_each_other_are_named(tmp_path):
    with pytest.raises(UsageError, match="--top-k: got 9, expected at most the cls pool's 4"):
        resolve(make_config(tmp_path, top_k=9))
    with pytest.raises(UsageError, match=r"--image-size: got 32, expected at most --resize \(16\)"):
        resolve(make_config(tmp_path, resize=16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "--epochs: got 0, expected 1 or more"),
        ({"batch_size": -1}, "--batch-size: got -1"),
        ({"learning_rate": 0.0}, "--learning-rate: got 0.0, expected a number above 0"),
        ({"learning_rate": float("nan")}, "--learning-rate: got nan"),
        ({"weight_decay": -0.1}, "--weight-decay: got -0.1, expected 0 or more"),
        ({"prompt_dropout": 1.0}, "--prompt-dropout: got 1.0, expected 0 or more and less than 1"),
        ({"label_smoothing": 1.5}, "--label-smoothing: got 1.5"),
        ({"log_steps": 0}, "--log-steps: got 0"),
        ({"checkpoint_seconds": -1.0}, "--checkpoint-seconds: got -1.0"),
        ({"seed": -1}, "--seed: got -1"),
        ({"seed": 2**63}, "--seed: got"),
        ({"dataset": "../x"}, r"DATASET: got '../x', expected a name without slashes"),
        ({"method": ".."}, r"--method: got '..'"),
        ({"normalize": "halve"}, r"--normalize: got 'halve', .*did you mean 'half'"),
        ({"normalize": "0.5,0.5,0.5,0.5,0.5"}, "--normalize: got .*six numbers"),
        ({"normalize": "0,0,0,1,1,0"}, "--normalize: got .*positive deviations"),
        ({"normalize": "0,0,nan,1,1,1"}, "--normalize: got"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        make_config(tmp_path, **options)


def test_normalisations():
    assert parse_normalization("half") == ((0.5,) * 3, (0.5,) * 3)
    assert parse_normalization("0,0.1,0.2,1,2,3") == ((0, 0.1, 0.2), (1, 2, 3))


@pytest.mark.parametrize("config", [RunConfig, SweepConfig, RecipesConfig])
def test_help_explains_every_option(config, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(config, args=["--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(config):
        option = f"--{field.name.replace('_', '-')}"
        assert option in printed or field.name in ("dataset", "datasets"), option
    # A first word of each explanation, where there are all of them.
    for word in ("Passes over", "Images of a step", "pixels", "Peak of", "Seconds of work"):
        assert (word in printed) == issubclass(config, TrainOptions)
