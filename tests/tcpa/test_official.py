"""Promise: official names go in and come out, and a dict that does not fit changes nothing."""

import numpy as np
import pytest
import torch
from models import ARCHITECTURES

from tcpa import TCPAConfig, VPTConfig, load_official_state_dict, official_state_dict, wrap
from tcpa.official import official_learning_rate

TINY = ARCHITECTURES["vit-tiny"]
EVERYTHING = TCPAConfig(image_prompt=True, value_affine=True)


def make(config=EVERYTHING):
    return wrap(TINY.create(), config)


def test_names_are_the_official_ones():
    names = set(official_state_dict(make())) - {
        f"backbone.{name}" for name, _ in TINY.create().named_parameters()
    }
    assert names == {
        "Pool.Pool_cls.keys",
        "Pool.Pool_cls.prompts",
        "Pool.Pool_image.keys",
        "Pool.Pool_image.prompts",
        "ADVP_w",
        "ADVP_b",
        "Prompter.Prompter.0.weight",
        "Prompter.Prompter.0.bias",
        "Prompter.Prompter.1.weight",
        "Prompter.Prompter.2.weight",
        "Prompter.Prompter.2.bias",
    }
    assert "prompts" in official_state_dict(make(VPTConfig(length=3)))


@pytest.mark.parametrize("kind", ["tensors", "arrays"])
@pytest.mark.parametrize("config", [EVERYTHING, VPTConfig(length=3)], ids=["tcpa", "vpt"])
def test_round_trip(kind, config):
    source, target = make(config), make(config)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
    state = official_state_dict(source)
    if kind == "arrays":
        state = {name: value.numpy().astype(np.float64) for name, value in state.items()}
    load_official_state_dict(target, state)
    for name, value in official_state_dict(source).items():
        assert torch.equal(official_state_dict(target)[name], value), name
    assert torch.equal(target.eval()(TINY.images()), source.eval()(TINY.images()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("ADVP_w"), "missing ADVP_w"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown extra"),
        (
            lambda s: s.update(ADVP_w=torch.zeros(1, 2)),
            r"ADVP_w: got \[1, 2\], expected \[1, 36, 192\]",
        ),
        (lambda s: s["ADVP_w"].fill_(torch.nan), "NaN or infinity in ADVP_w"),
        (lambda s: s.clear(), r"missing ADVP_b, ADVP_w, .* and \d+ more"),
    ],
)
def test_a_dict_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    model = make()
    before = {name: value.clone() for name, value in official_state_dict(model).items()}
    state = {name: value + 1 for name, value in before.items()}
    change(state)
    with pytest.raises(ValueError, match=f"state_dict does not fit this model: .*{message}"):
        load_official_state_dict(model, state)
    for name, value in before.items():
        assert torch.equal(official_state_dict(model)[name], value)


def test_a_value_or_dict_of_the_wrong_type_is_named():
    state = official_state_dict(make())
    with pytest.raises(TypeError, match=r"state_dict\['ADVP_w'\]: got str, expected a tensor"):
        load_official_state_dict(make(), state | {"ADVP_w": "zeros"})
    for wrong in (torch.zeros(1, 36, 192).long(), torch.zeros(1, 36, 192, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=r"'ADVP_w'\]: got torch\..*, expected real floating"):
            load_official_state_dict(make(), state | {"ADVP_w": wrong})
    with pytest.raises(TypeError, match=r"model: got NoneType, expected what tcpa\.wrap returns"):
        load_official_state_dict(None, state)
    with pytest.raises(TypeError, match="state_dict: got list, expected a dict"):
        load_official_state_dict(make(), [1])


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [official_learning_rate(s, base_lr=1.0, total_steps=100) for s in range(100)]
    assert rates[0] == pytest.approx(1 / 20) and rates[19] == 1.0 and rates[20] == 1.0
    assert rates[60] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert official_learning_rate(0, base_lr=1.0, total_steps=1) == 1.0
