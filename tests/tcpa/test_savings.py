"""Promise: every exact saving equals the plain computation, values and gradients, to 1e-12."""

import dataclasses
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES

from tcpa import (
    AdaptFormerTuning,
    AutoVPConfig,
    BiasTuning,
    DAMVPConfig,
    E2VPTConfig,
    FullTuning,
    GatedPromptConfig,
    LastBlockTuning,
    LIONConfig,
    Savings,
    SideTuning,
    TCPAConfig,
    VPTConfig,
    wrap,
)

NAMES = [field.name for field in dataclasses.fields(Savings)]
SIZES = {"cls_pool_size": 6, "image_pool_size": 9, "cls_top_k": 2, "image_top_k": 3}
QUIET = {"prompt_dropout": 0.0, "random_selection_epochs": 0, "match_weight": 0.5}
TCPA = TCPAConfig(cls_prompt_length=2, **SIZES, **QUIET)
E2VPT = E2VPTConfig(length=3, kv_length=4, dropout=0.0)
GATED = GatedPromptConfig(length=4, gate_init=0.5, dropout=0.0)
METHODS = {
    "tcpa": TCPA,
    "tcpa-visible": TCPA.replace(normalize_over="visible"),
    "tcpa-role": TCPA.replace(coordination="role"),
    "tcpa-all-modules": TCPA.replace(value_affine=True, simam=True, image_prompt=True),
    "vpt-deep": VPTConfig(length=7),
    "vpt-shallow": VPTConfig(length=7, deep=False),
    "vfpt": VPTConfig(length=7, fourier_fraction=0.6),
    "linear": None,
    "e2vpt": E2VPT,
    "gated": GATED,
    "e2vpt-last-block": {"config": E2VPT, "tuning": LastBlockTuning()},
}
"""Configuration of the token prompts, or all three choices."""

CHOICES = {
    "vpt-deep-full": {"config": VPTConfig(length=3), "tuning": FullTuning()},
    "tcpa-bias": {"config": TCPA, "tuning": BiasTuning()},
    "gated-adaptformer-dam-vp": {
        "config": GATED,
        "tuning": AdaptFormerTuning(head="linear", dropout=0.0),
        "input_prompt": DAMVPConfig(num_clusters=2),
    },
    "side-autovp": {
        "config": None,
        "tuning": SideTuning(pretrained=False),
        "input_prompt": AutoVPConfig(trainable_scale=True),
    },
    "lion": {"config": None, "input_prompt": LIONConfig(hidden=5, iterations=60)},
}


def run(architecture, config, savings):
    """Logits, distance and all trained gradients of one step in float64."""
    backbone = architecture.create(torch.float64)
    choices = config if isinstance(config, dict) else {"config": config}
    torch.manual_seed(3)
    model = wrap(backbone, savings=savings, **choices)
    images = architecture.images(dtype=torch.float64)
    if "tuning" in choices or "input_prompt" in choices:
        # What starts from zeros would hide what it does.
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    if isinstance(choices.get("input_prompt"), DAMVPConfig):
        model.fit_clusters(images)
    logits, distance = model(images, return_distance=True)
    loss = F.cross_entropy(logits, torch.tensor([0, 1, 2])) + model.match_weight * distance
    loss.backward()
    values = {"logits": logits.detach(), "distance": distance.detach()}
    for name, parameter in model.trainable_named_parameters().items():
        grad = parameter.grad
        values[name] = torch.zeros_like(parameter) if grad is None else grad
    with torch.no_grad():
        values["evaluation"] = model.eval()(images)
    return values


def assert_equal(got, expected):
    for name, truth in expected.items():
        if truth.numel() == 0:
            continue
        # A gradient that is zero but for rounding has no relative error.
        size = truth.abs().max().clamp_min(1e-9)
        error = float((got[name] - truth).abs().max() / size)
        assert error < 1e-12, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_each_saving_alone_equals_the_plain_form(name, method):
    architecture = ARCHITECTURES["vit-tiny"]
    plain = run(architecture, method, Savings.none())
    alone = replace(Savings.none(), **{name: True})
    assert_equal(run(architecture, method, alone), plain)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_each_saving_left_out_equals_all_of_them(name, method):
    architecture = ARCHITECTURES["vit-tiny"]
    full = run(architecture, method, Savings())
    assert_equal(run(architecture, method, replace(Savings(), **{name: False})), full)


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_all_savings_together_with_other_choices(choices):
    architecture = ARCHITECTURES["vit-tiny"]
    plain = run(architecture, choices, Savings.none())
    assert_equal(run(architecture, choices, Savings()), plain)


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_all_savings_together_on_every_architecture(key):
    for method in (TCPA, VPTConfig(length=5)):
        plain = run(ARCHITECTURES[key], method, Savings.none())
        assert_equal(run(ARCHITECTURES[key], method, Savings()), plain)


def test_savings_save():
    """The switches do what they say: fewer weight gradients, rows, bytes kept."""
    architecture = ARCHITECTURES["vit-tiny"]
    kept = {}
    for savings in (Savings(), Savings.none()):
        model = wrap(architecture.create(), TCPA, savings=savings)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {}

        def keep(tensor, sizes=sizes, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(architecture.images()).sum().backward()
        trained = {id(p) for p in model.trainable_parameters()}
        frozen = [p for p in model.backbone.parameters() if id(p) not in trained]
        assert all((p.grad is None) == savings.frozen_backbone for p in frozen)
        kept[savings] = sum(sizes.values())
    assert kept[Savings()] < 0.6 * kept[Savings.none()]


def test_prompt_keys_are_kept_until_a_parameter_changes():
    model = wrap(ARCHITECTURES["vit-tiny"].create(), TCPA).eval()
    images = ARCHITECTURES["vit-tiny"].images()
    with torch.no_grad():
        first = model(images)
        kept = model.projector._kv._kept
        assert torch.equal(model(images), first) and model.projector._kv._kept is kept
        model.pools.image_prompts.mul_(-1)
        second = model(images)
        assert not torch.equal(second, first)
        fresh = wrap(ARCHITECTURES["vit-tiny"].create(), TCPA).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(images), second)
    model.double()
    with torch.no_grad():
        assert model(images.double()).dtype == torch.float64
    with torch.inference_mode():
        inside = model(images.double())
    # What was computed in inference mode must not leak into a graph.
    outside = model(images.double())
    outside.sum().backward()
    torch.testing.assert_close(outside, inside.clone())


def test_one_product_projects_the_prompts_of_all_blocks_and_follows_the_weights():
    architecture = ARCHITECTURES["vit-tiny"]
    model = wrap(architecture.create(torch.float64), TCPA).double().train()
    images = architecture.images(dtype=torch.float64)
    block = model.backbone.blocks[1]
    for change in (lambda: None, lambda: block.attn.qkv.weight.mul_(1.5), block.norm1.bias.zero_):
        with torch.no_grad():
            change()
        model.zero_grad()
        model(images).sum().backward()
        stack = model.projector._stack._kept
        assert stack is not None and stack.weight.shape[0] == len(model.backbone.blocks)
        ours = {name: p.grad for name, p in model.trainable_named_parameters().items()}
        model.zero_grad()
        model.savings = replace(model.savings, prompt_kv_stacked=False)
        model.projector._stack.clear()
        model(images).sum().backward()
        assert model.projector._stack._kept is None
        model.savings = Savings()
        for name, p in model.trainable_named_parameters().items():
            grad = ours[name]
            assert (grad is None) == (p.grad is None)
            if grad is not None:
                torch.testing.assert_close(grad, p.grad, rtol=1e-12, atol=1e-12)
    block.attn.qkv.weight.requires_grad_()
    model(images).sum().backward()
    assert model.projector._stack._kept is None and block.attn.qkv.weight.grad is not None
