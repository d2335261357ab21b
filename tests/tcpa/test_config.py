"""Promise: configurations are checked on creation and carry the published settings."""

import csv
import dataclasses
from pathlib import Path

import pytest

from tcpa import HTA_DATASETS, Savings, TCPAConfig, VPTConfig

with (Path(__file__).parents[1] / "data" / "hparams_hta.csv").open() as file:
    SCRIPTS = list(csv.DictReader(file))


@pytest.mark.parametrize("row", SCRIPTS, ids=lambda row: row["dataset_flag"])
def test_official_settings_are_those_of_the_scripts(row):
    config = TCPAConfig.official(row["dataset_flag"])
    assert config.cls_pool_size == int(row["pool_size_cls"])
    assert config.image_pool_size == int(row["pool_size_image"])
    assert config.cls_prompt_length == int(row["len_prompts_cls"])
    assert config.image_prompt_length == int(row["len_prompts_image"])
    assert (config.cls_top_k, config.image_top_k) == (int(row["topk_cls"]), int(row["topk_image"]))
    assert config.match_weight == float(row["pool_loss_w"])
    assert config.random_selection_epochs == int(row["random_epoch"])
    assert config.prompt_dropout == float(row["prompt_dropout"])
    assert config.image_prompt == (row["IPrompt"] == "1")
    assert config.value_affine == (row["ADVP"] == "1") and config.simam == (row["simam"] == "1")
    assert (config.token_noise > 0) == (row["random_prompt"] == "1")
    assert config.coordination == ("token" if row["TDVP"] == "1" else "role")
    assert config.num_prompts == int(row["num_prompt_tokens_per_layer"])


def test_all_ten_datasets_have_official_settings():
    flags = [row["dataset_flag"] for row in SCRIPTS]
    assert sorted(flags) == sorted(HTA_DATASETS)


def test_paper_settings():
    config = TCPAConfig.paper()
    assert (config.cls_pool_size, config.image_pool_size, config.match_weight) == (10, 20, 0.5)


BAD = [
    ({"cls_top_k": 19}, ValueError, "cls_top_k: got 19, expected at most cls_pool_size=18; lower"),
    ({"image_pool_size": -1}, ValueError, "image_pool_size: got -1, expected an integer >= 0"),
    (
        {"image_prompt_length": 0},
        ValueError,
        "image_prompt_length: got 0, expected an integer >= 1",
    ),
    ({"cls_pool_size": 2.5}, TypeError, "cls_pool_size: got 2.5, expected an integer"),
    ({"prompt_dropout": 1.0}, ValueError, r"prompt_dropout: got 1\.0, expected .* < 1\.0"),
    ({"match_weight": float("nan")}, ValueError, "match_weight: got nan, expected a finite number"),
    ({"match_weight": float("inf")}, ValueError, "match_weight: got inf, expected a finite number"),
    ({"match_weight": "1"}, TypeError, "match_weight: got '1', expected a number"),
    ({"simam": 1}, TypeError, "simam: got 1, expected True or False"),
    ({"coordination": "tokens"}, ValueError, "coordination: got 'tokens'.*did you mean 'token'"),
    ({"prompt_transform": "fft"}, ValueError, "prompt_transform: got 'fft', expected 'fourier' or"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_settings_are_refused_by_name(change, kind, message):
    with pytest.raises(kind, match=message):
        TCPAConfig(**change)


def test_bad_vpt_settings_and_datasets():
    with pytest.raises(ValueError, match="length: got 0, expected an integer >= 1"):
        VPTConfig(length=0)
    with pytest.raises(ValueError, match=r"fourier_fraction: got 1\.5, expected a fraction"):
        VPTConfig(fourier_fraction=1.5)
    with pytest.raises(ValueError, match=r"dataset: got 'cub200', .*did you mean 'cub'"):
        TCPAConfig.official("cub200")
    with pytest.raises(TypeError, match="gate_bits: got 'no', expected True or False"):
        Savings(gate_bits="no")


def test_configurations_are_immutable():
    for config in (TCPAConfig(), VPTConfig(), Savings()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, 3)
    assert not any(dataclasses.astuple(Savings.none())) and all(dataclasses.astuple(Savings()))
    assert VPTConfig.vfpt(fourier_fraction=1.0).fourier_fraction == 1.0
    assert VPTConfig.official_vfpt().init == "uniform"
