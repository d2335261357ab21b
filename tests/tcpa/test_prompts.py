"""Promise: the prompt modules compute what their papers and the official code define."""

import math

import pytest
import torch
from models import ARCHITECTURES
from torch.autograd import gradcheck

from tcpa import TCPAConfig, VPTConfig
from tcpa.methods.tcpa import ConvImagePrompt, PromptPools, SimAM, ValueAffine
from tcpa.methods.vpt import VPTPrompts, fourier_transform

F64 = torch.float64
BACKBONE = ARCHITECTURES["vit-tiny"].create()


def cosine_sine(n):
    angle = 2 * math.pi * torch.outer(torch.arange(n), torch.arange(n)).to(F64) / n
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("shape", [(36, 24), (1, 8), (7, 9), (2, 3, 5, 6)])
def test_fourier_transform_is_two_pairs_of_real_products(shape):
    prompts = torch.randn(shape, dtype=F64)
    (cos_p, sin_p), (cos_c, sin_c) = cosine_sine(shape[-2]), cosine_sine(shape[-1])
    expected = cos_p @ prompts @ cos_c - sin_p @ prompts @ sin_c
    torch.testing.assert_close(fourier_transform(prompts), expected, rtol=1e-12, atol=1e-12)
    only_hidden = fourier_transform(prompts, (-1,))
    torch.testing.assert_close(only_hidden, prompts @ cos_c, rtol=1e-12, atol=1e-12)


# opcheck itself reads the .grad of a tensor that is not a leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_fourier_transform_is_a_differentiable_operation():
    prompts = torch.randn(3, 4, 5, dtype=F64, requires_grad=True)
    assert gradcheck(fourier_transform, (prompts,))
    torch.library.opcheck(torch.ops.tcpa.fourier_transform, (prompts, [-2, -1]))
    low = torch.randn(4, 8).bfloat16()
    exact = fourier_transform(low.float())
    assert torch.equal(fourier_transform(low), exact.bfloat16())
    assert fourier_transform(torch.empty(2, 0, 5)).shape == (2, 0, 5)


def test_pools_give_cls_rows_first_and_transform_jointly_or_per_pool():
    sizes = {"cls_pool_size": 3, "image_pool_size": 4, "cls_prompt_length": 2}
    options = sizes | {"prompt_dropout": 0.0, "cls_top_k": 1, "image_top_k": 1}
    pools = PromptPools(TCPAConfig(prompt_transform="identity", **options), BACKBONE)
    rows = pools(5)
    assert rows.shape == (2, 3 * 2 + 4, 192)
    assert torch.equal(rows[1, 2:4], pools.cls_prompts[1, 1])
    assert torch.equal(rows[0, 6], pools.image_prompts[0, 0, 0])
    for scope, parts in (("joint", [rows]), ("pool", [rows[:, :6], rows[:, 6:]])):
        pools.config = TCPAConfig(fourier_scope=scope, **options)
        expected = torch.cat([torch.fft.fft2(part).real for part in parts], dim=1)
        torch.testing.assert_close(pools(5), expected)


def test_vfpt_transforms_a_fraction_of_the_tokens():
    tokens = VPTPrompts(VPTConfig(length=5, fourier_fraction=0.5), BACKBONE)
    out = tokens(3)
    expected = torch.fft.fft2(tokens.prompts[:, :2]).real
    torch.testing.assert_close(out[:, :2], expected)
    assert torch.equal(out[:, 2:], tokens.prompts[:, 2:])


def test_vpt_shallow_has_one_set_of_prompts():
    assert VPTPrompts(VPTConfig(length=5, deep=False), BACKBONE).prompts.shape == (1, 5, 192)
    assert VPTPrompts(VPTConfig(length=5), BACKBONE).prompts.shape == (2, 5, 192)


def test_value_affine_scales_and_shifts_every_row():
    affine = ValueAffine(4, BACKBONE)
    values = torch.randn(2, 4, 3, 64)
    expected = values.flatten(-2) * affine.scale + affine.shift
    torch.testing.assert_close(affine(values).flatten(-2), expected)
    assert abs(affine.scale.mean() - 1) < 0.01 and 0 < affine.shift.std() < 0.01


def test_simam_weights_pixels_by_their_deviation():
    images = torch.randn(2, 3, 5, 4, dtype=F64)
    for b, c in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        channel = images[b, c]
        squared = (channel - channel.mean()) ** 2
        energy = squared / (4 * (squared.sum() / (5 * 4 - 1) + 1e-3)) + 0.5
        expected = channel * torch.sigmoid(energy)
        torch.testing.assert_close(SimAM()(images)[b, c], expected, rtol=1e-12, atol=1e-12)


def test_image_prompt_is_a_residual_of_6547_parameters():
    prompt = ConvImagePrompt()
    assert sum(p.numel() for p in prompt.parameters()) == 6_547
    torch.nn.init.zeros_(prompt.contract.weight)
    torch.nn.init.zeros_(prompt.contract.bias)
    images = torch.randn(2, 3, 20, 24)
    assert torch.equal(prompt(images), images)
    both = TCPAConfig(simam=True, image_prompt=True).build(BACKBONE, None)["image_prompt"]
    assert [type(layer) for layer in both.children()] == [SimAM, ConvImagePrompt]
    assert not list(TCPAConfig().build(BACKBONE, None)["image_prompt"].children())
