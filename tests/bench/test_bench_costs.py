"""Promise: the formulas count the FLOPs that a step really computes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models import Architecture
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from tcpa import AutoVPConfig, DAMVPConfig, Savings, TCPAConfig, VPConfig, VPTConfig, wrap
from tcpa.bench.costs.step import Workload, backbone_sizes, flops_of, step_flops
from tcpa.bench.harness.case import BACKBONES, Backbone, StepCase
from tcpa.bench.harness.provider import StepProvider

CLASSES, BATCH, SIZE = 5, 2, 64
ViT = Architecture("vit_tiny_patch16_224", SIZE, {"img_size": SIZE, "depth": 3})
SMALL = Workload(
    vit=Backbone(3, 64, 3, 16),
    patches=(SIZE // 16) ** 2,
    prompts=11,
    entries=8,
    batch=BATCH,
    classes=CLASSES,
)
TCPA = TCPAConfig(
    cls_pool_size=3,
    image_pool_size=5,
    cls_prompt_length=2,
    cls_top_k=2,
    image_top_k=2,
    prompt_dropout=0.0,
    random_selection_epochs=0,
)
LINEAR = dataclasses.replace(SMALL, method="linear", prompts=0)
DAM_VP = DAMVPConfig(num_clusters=3)
# Method, what is done to the image, and the workload.
METHODS = {
    "tcpa": (TCPA, None, SMALL),
    "vpt-deep": (VPTConfig(length=11), None, dataclasses.replace(SMALL, method="vpt-deep")),
    "linear": (None, None, LINEAR),
    **{
        f"{name}{end}": (config, prompt, dataclasses.replace(work, input_prompt=True, **passes))
        for name, prompt, passes in (
            ("vp", VPConfig(), {}),
            ("dam-vp", DAM_VP, {"plain_passes": 1}),
            ("autovp", AutoVPConfig(), {}),
        )
        for end, config, work in (("", None, LINEAR), ("+tcpa", TCPA, SMALL))
    },
}
SAVINGS = {
    "all": Savings(),
    "none": Savings.none(),
    **{
        f"only {field.name}": dataclasses.replace(Savings.none(), **{field.name: True})
        for field in dataclasses.fields(Savings)
    },
    **{
        f"without {field.name}": dataclasses.replace(Savings(), **{field.name: False})
        for field in dataclasses.fields(Savings)
    },
}


def _flash_forward(q, k, v, *_, **__):
    return sdpa_flop_count(q, k, v)


def _flash_backward(grad, q, k, v, *_, **__):
    return sdpa_backward_flop_count(grad, q, k, v)


# Not every torch counts them.
FLASH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


def counted(config, prompt, savings, impl, train):
    """FLOPs that torch's counter sees in one step of the real model."""
    options = {"input_prompt": prompt, "savings": savings, "impl": impl}
    model = wrap(ViT.create(), config, num_classes=CLASSES, **options)
    images = ViT.images(BATCH)
    if prompt is DAM_VP:
        model.fit_clusters(ViT.images(3))
    if train:
        with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
            logits, distance = model(images, return_distance=True)
            (F.cross_entropy(logits, torch.tensor([0, 1])) + distance).backward()
    else:
        # The counter cannot follow tensors that could have gradients where none are made.
        model.eval().requires_grad_(False)
        with torch.no_grad():
            model(images)
            with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
                model(images)
    return counter.get_total_flops()


CASES = [
    (method, name)
    for method in METHODS
    for name in SAVINGS
    if method in ("tcpa", "vpt-deep") or name in ("all", "none")
]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("method", "name"), CASES)
def test_the_formulas_equal_a_count_of_the_plain_operations(method, name, train):
    (config, prompt, work), savings = METHODS[method], SAVINGS[name]
    work = dataclasses.replace(work, savings=savings)
    found = step_flops(work, train=train)
    # The reference keeps its scores: it makes none again.
    expected = found.total - found.repeated
    if train and work.prompts and not tokens_have_gradients(work):
        # Where only prompts have gradients, the fused form leaves the tokens' scores alone; the
        # reference multiplies do with all values.
        expected += 2 * BATCH * work.tokens**2 * work.vit.width
    assert counted(config, prompt, savings, "reference", train) == expected


def tokens_have_gradients(work):
    saved = work.savings
    dense = work.method == "tcpa" and not saved.gate_bits
    return work.image_gradient or not saved.prompt_keys_only or dense


@pytest.mark.parametrize("name", ["all", "without skip_input_gradient", "without frozen_backbone"])
def test_the_formulas_equal_a_count_of_the_fused_operations(name):
    work = dataclasses.replace(SMALL, savings=SAVINGS[name])
    assert counted(TCPA, None, SAVINGS[name], "sdpa", True) == step_flops(work, train=True).total


def model_flops(method, mode="train"):
    found = flops_of(StepCase(batch=2, mode=mode), StepProvider(name="", method=method))
    assert found is not None
    return found[0]


def test_model_flops_are_the_methods_and_hardware_flops_the_forms():
    case = StepCase(batch=2)
    plain = flops_of(case, StepProvider(name="", savings=Savings.none()))
    fast = flops_of(case, StepProvider(name=""))
    assert plain is not None and fast is not None
    assert plain[0] == fast[0] < fast[1] < plain[1]
    # ViT-B/16: 86 M weights, 2 FLOPs each and token, forward and backward, beside attention.
    assert fast[0] == pytest.approx(2 * 197 * 2 * 2 * 86e6, rel=0.1)
    assert model_flops("linear") == pytest.approx(fast[0] / 2, rel=0.1)
    assert model_flops("tcpa", "eval") < fast[0] * 0.55


def test_flops_of_prompts_on_images():
    # Forward and backward through all blocks, attention with 5 products for 2; DAM-VP first needs
    # the plain feature.
    linear = model_flops("linear")
    assert model_flops("vp") == model_flops("autovp") == pytest.approx(2 * linear, rel=0.03)
    assert model_flops("dam-vp") == pytest.approx(3 * linear, rel=0.03)
    assert model_flops("vp") < model_flops("vp+tcpa") < 1.1 * model_flops("vp")


def test_blocks_that_the_formulas_do_not_know_have_no_flops():
    # Its MLP has a gate, its blocks another number of FLOPs.
    assert backbone_sizes("eva02_tiny_patch14_224") is None
    assert backbone_sizes("vit_tiny_patch16_224") == (BACKBONES["ti16"], 196)
    case = StepCase(model="eva02_tiny_patch14_224")
    assert flops_of(case, StepProvider(name="")) is None
