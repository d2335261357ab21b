"""Promise: the public `match_prompts` checks its arguments and keeps samples apart."""

import pytest
import torch

from tcpa import match_prompts, match_prompts_reference, pack_gate

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
        ({"selection": "near"}, ValueError, "selection: got 'near'.*did you mean 'nearest'"),
        ({"impl": "cuda"}, ValueError, "impl: got 'cuda', expected 'auto' or 'triton'"),
        (
            {"gate": pack_gate(torch.ones(3, 9, 40, dtype=torch.bool))},
            ValueError,
            r"gate: got shape \[3, 9, 2\], expected \[3, 9, 1\]",
        ),
    ],
)
def test_bad_options_are_refused_by_name(change, kind, message):
    with pytest.raises(kind, match=message):
        match_prompts(*make_inputs(), **(OPTIONS | change))


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
