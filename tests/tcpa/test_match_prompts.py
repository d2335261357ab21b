"""Promise: the public `match_prompts` checks its arguments and keeps samples apart."""

import pytest
import torch
import torch.nn.functional as F

from tcpa import match_prompts, match_prompts_reference, norm_match, pack_gate

OPTIONS = {"cls_top_k": 2, "image_top_k": 3}


def make_inputs(batch=3, tokens=9, width=16, dtype=torch.float32):
    x = torch.randn(batch, tokens, width, dtype=dtype)
    return x, torch.randn(4, width, dtype=dtype), torch.randn(6, width, dtype=dtype)


def test_equals_the_reference_also_under_autocast():
    inputs = make_inputs()
    gate, distance = match_prompts(*inputs, **OPTIONS)
    expected_gate, expected = match_prompts_reference(*inputs, **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        same_gate, same = match_prompts(*inputs, **OPTIONS)
    assert torch.equal(gate, expected_gate) and torch.equal(distance, expected)
    assert torch.equal(same_gate, gate) and torch.equal(same, distance)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 0.0])
def test_a_non_finite_or_zero_sample_leaves_the_others_alone(poison):
    x, cls_keys, image_keys = make_inputs()
    clean = match_prompts(x, cls_keys, image_keys, **OPTIONS)[0]
    x[1] = poison
    x.requires_grad_()
    gate, distance = match_prompts(x, cls_keys, image_keys, **OPTIONS)
    assert torch.equal(gate[[0, 2]], clean[[0, 2]])
    (grad,) = torch.autograd.grad(distance, x)
    assert grad[[0, 2]].isfinite().all() and (poison != 0 or grad.isfinite().all())


def test_permuted_samples_permute_the_gate():
    x, cls_keys, image_keys = make_inputs()
    order = torch.tensor([2, 0, 1])
    gate = match_prompts(x, cls_keys, image_keys, **OPTIONS)[0]
    assert torch.equal(match_prompts(x[order], cls_keys, image_keys, **OPTIONS)[0], gate[order])


def test_selection_ignores_the_scale_of_tokens_and_keys():
    x, cls_keys, image_keys = make_inputs(dtype=torch.float64)
    gate, distance = match_prompts(x, cls_keys, image_keys, **OPTIONS)
    scaled = match_prompts(1e-5 * x, 1e4 * cls_keys, 3 * image_keys, **OPTIONS)
    assert torch.equal(scaled[0], gate)
    torch.testing.assert_close(scaled[1], distance, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"cls_top_k": 5}, ValueError, "cls_top_k: got 5, expected an integer from 0 to 4"),
        ({"image_top_k": -1}, ValueError, "image_top_k: got -1, expected an integer from 0 to 6"),
        ({"image_top_k": 2.0}, TypeError, "image_top_k: got 2.0, expected an integer"),
        ({"num_prefix_tokens": 10}, ValueError, "num_prefix_tokens: got 10.*from 0 to 9"),
        ({"lengths": (1, 0)}, ValueError, r"lengths\[1\]: got 0, expected an integer >= 1"),
        ({"lengths": (1,)}, ValueError, r"lengths: got \(1,\), expected two integers"),
        ({"lengths": (1, 1, 1)}, ValueError, r"lengths: got \(1, 1, 1\), expected two integers"),
        ({"lengths": 2}, TypeError, r"lengths: got 2, expected two integers.*lengths=\(1, 1\)"),
        ({"lengths": (1, 2.0)}, TypeError, r"lengths\[1\]: got 2\.0, expected an integer"),
        ({"selection": "near"}, ValueError, "selection: got 'near'.*did you mean 'nearest'"),
        ({"impl": "cuda"}, ValueError, "impl: got 'cuda', expected 'auto' or 'triton'"),
        (
            {"gate": pack_gate(torch.ones(3, 9, 40, dtype=torch.bool))},
            ValueError,
            r"gate: got shape \[3, 9, 2\], expected \[3, 9, 1\]",
        ),
        ({"gate": [1]}, TypeError, r"gate: got list, expected int32.*pack_gate"),
        ({"gate": torch.tensor(1).int()}, ValueError, "gate: got a tensor without axes"),
        ({"selection": torch.ones(2)}, ValueError, "selection: got tensor.*'nearest'"),
    ],
)
def test_bad_options_are_refused_by_name(change, kind, message):
    x, *keys = make_inputs()
    with pytest.raises(kind, match=message):
        match_prompts(x, *keys, **(OPTIONS | change))
    with pytest.raises(kind, match=message):
        norm_match(x, None, None, 1e-6, *keys, **(OPTIONS | change))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm_match_takes_the_affine_parameters_that_layer_norm_takes(dtype, autocast):
    x, *keys = make_inputs()
    for own in {dtype, torch.float32 if dtype == torch.bfloat16 else dtype}:
        weight, bias = torch.randn(2, 16).to(own)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            normed, *_ = norm_match(x.to(dtype), weight, bias, 1e-6, *keys, **OPTIONS)
            expected = F.layer_norm(x.to(dtype), (16,), weight, bias, 1e-6)
        assert torch.equal(normed, expected)


AFFINE = {
    "weight-float64": (
        torch.float64,
        None,
        ValueError,
        r"weight: got torch\.float64.*torch\.float3",
    ),
    "bias-float64": (torch.float32, torch.float64, ValueError, r"bias: got .*bias\.to\(x\.dtype\)"),
    "bias-bfloat16": (None, torch.bfloat16, ValueError, r"bias: got torch\.bfloat16"),
    "weight-integer": (torch.int64, None, TypeError, r"weight: got torch\.int64, expected float16"),
}


@pytest.mark.parametrize(("weight", "bias", "kind", "message"), AFFINE.values(), ids=AFFINE)
def test_affine_parameters_of_another_dtype_are_refused(weight, bias, kind, message):
    x, *keys = make_inputs()
    affine = [None if dtype is None else torch.ones(16, dtype=dtype) for dtype in (weight, bias)]
    with pytest.raises(kind, match=message):
        norm_match(x, *affine, 1e-6, *keys, **OPTIONS)


def test_affine_parameters_of_two_dtypes_are_refused():
    x, *keys = make_inputs(dtype=torch.bfloat16)
    affine = torch.ones(16), torch.ones(16).bfloat16()
    with pytest.raises(ValueError, match=r"bias: got torch\.bfloat16.*as weight.*weight\.dtype"):
        norm_match(x, *affine, 1e-6, *keys, **OPTIONS)


def test_bad_tensors_are_refused_by_name():
    x, cls_keys, image_keys = make_inputs()
    with pytest.raises(ValueError, match=r"x: got shape \[9, 16\], expected \[B, L, C\]"):
        match_prompts(x[0], cls_keys, image_keys, **OPTIONS)
    with pytest.raises(ValueError, match=r"image_keys: got shape \[6, 8\], expected \[6, 16\]"):
        match_prompts(x, cls_keys, image_keys[:, :8], **OPTIONS)
    with pytest.raises(ValueError, match=r"cls_keys: got device meta, expected cpu"):
        match_prompts(x, cls_keys.to("meta"), image_keys, **OPTIONS)
    with pytest.raises(TypeError, match=r"x: got torch\.int64, expected float16"):
        match_prompts(x.long(), cls_keys, image_keys, **OPTIONS)
    with pytest.raises(ValueError, match=r"x: got shape \[3, 9, 0\], expected .* C >= 1"):
        match_prompts(x[..., :0], cls_keys[:, :0], image_keys[:, :0], **OPTIONS)
    with pytest.raises(ValueError, match=r"x: got torch\.sparse_coo, expected a dense tensor"):
        match_prompts(x.to_sparse(), cls_keys, image_keys, **OPTIONS)
