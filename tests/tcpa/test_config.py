"""Promise: configurations are checked on creation and carry the published settings."""

import csv
import dataclasses
from pathlib import Path

import pytest

from tcpa import (
    HTA_DATASETS,
    AdapterTuning,
    AdaptFormerTuning,
    AutoVPConfig,
    DAMVPConfig,
    E2VPTConfig,
    FullTuning,
    GatedPromptConfig,
    HeadTuning,
    LIONConfig,
    MLPHeadTuning,
    Savings,
    TCPAConfig,
    VPConfig,
    VPTConfig,
)

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
    (TCPAConfig, {"cls_top_k": 19}, "cls_top_k: got 19, expected at most cls_pool_size=18; lower"),
    (TCPAConfig, {"image_pool_size": -1}, "image_pool_size: got -1, expected an integer >= 0"),
    (
        TCPAConfig,
        {"image_prompt_length": 0},
        "image_prompt_length: got 0, expected an integer >= 1",
    ),
    (TCPAConfig, {"cls_pool_size": 2.5}, "cls_pool_size: got 2.5, expected an integer"),
    (TCPAConfig, {"prompt_dropout": 1.0}, r"prompt_dropout: got 1\.0, expected .* < 1\.0"),
    (TCPAConfig, {"match_weight": float("nan")}, "match_weight: got nan, expected a finite number"),
    (TCPAConfig, {"match_weight": float("inf")}, "match_weight: got inf, expected a finite number"),
    (TCPAConfig, {"match_weight": "1"}, "match_weight: got '1', expected a number"),
    (TCPAConfig, {"simam": 1}, "simam: got 1, expected True or False"),
    (TCPAConfig, {"coordination": "tokens"}, "coordination: got 'tokens'.*did you mean 'token'"),
    (TCPAConfig, {"prompt_transform": "fft"}, "prompt_transform: got 'fft', expected 'fourier' or"),
    (VPTConfig, {"length": 0}, "length: got 0, expected an integer >= 1"),
    (VPTConfig, {"fourier_fraction": 1.5}, r"fourier_fraction: got 1\.5, expected a fraction"),
    (TCPAConfig.official, {"dataset": "cub200"}, "dataset: got 'cub200', .*did you mean 'cub'"),
    (Savings, {"gate_bits": "no"}, "gate_bits: got 'no', expected True or False"),
    (DAMVPConfig, {"num_clusters": 1}, "num_clusters: got 1, expected an integer from 2"),
    (DAMVPConfig, {"num_clusters": None}, "num_clusters: got num_clusters=None, distance"),
    (VPConfig, {"width": 0}, "width: got 0, expected an integer >= 1"),
    (AutoVPConfig, {"mapping": "semantic"}, "mapping: got 'semantic', .*compares the names"),
    (AutoVPConfig, {"mapping": "frequent"}, ".*did you mean 'frequency'"),
    (LIONConfig, {"kernel_size": 4}, "kernel_size: got 4, expected odd"),
    (LIONConfig, {"contraction": 1.0}, r"contraction: got 1\.0, expected .* < 1\.0"),
    (LIONConfig, {"critical_share": 1.5}, "critical_share: got 1.5, expected a share"),
    (HeadTuning, {"head": "mlp"}, "head: got 'mlp', expected 'linear' or 'prior' or"),
    (MLPHeadTuning, {"head": "normed"}, "head: got 'normed', expected 'linear' or 'prior'"),
    (AdapterTuning, {"reduction": 0}, "reduction: got 0, expected an integer >= 1"),
    (AdaptFormerTuning, {"dropout": 1.0}, "dropout: got 1.0"),
    (FullTuning, {"dropout": -0.1}, "dropout: got -0.1"),
    (E2VPTConfig, {"kv_length": 0}, "kv_length: got 0, expected an integer >= 1"),
    (GatedPromptConfig, {"gate_init": -1.0}, "gate_init: got -1.0"),
]


@pytest.mark.parametrize(("kind", "values", "message"), BAD)
def test_bad_settings_are_refused_by_name(kind, values, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**values)


def test_configurations_are_immutable():
    for config in (TCPAConfig(), VPTConfig(), Savings()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, 3)
    assert not any(dataclasses.astuple(Savings.none())) and all(dataclasses.astuple(Savings()))
    assert VPTConfig.vfpt(fourier_fraction=1.0).fourier_fraction == 1.0
    assert VPTConfig.official_vfpt().init == "uniform"
