"""The matching kernels select what float64 selects and hand back its distance and gradients.

They run on a GPU where there is one and in the Triton interpreter elsewhere. Errors are measured
against `match_prompts_reference` in float64 on the same low-precision inputs and compared with the
errors of the same function at that precision.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from matching import (
    CASES,
    DEVICE,
    DTYPES,
    TILES,
    Case,
    assert_close,
    bound,
    make_inputs,
    tiles,
    wrong_margin,
)

from tcpa.kernels.host import launch_error
from tcpa.kernels.matching.op import _match_prompts, match_prompts
from tcpa.reference import match_prompts_reference, pack_gate, random_gate, split_gate

pytestmark = pytest.mark.skipif(
    launch_error(DEVICE) is not None, reason="needs a GPU or TRITON_INTERPRET=1"
)
INPUTS = ("x", "cls_keys", "image_keys")
# The interpreter is numpy, which announces what it computes with NaN.
allow_nan = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def run(function, inputs, case: Case, gate=None, double: bool = False):
    """Return gate, distance and the gradients by name of 100 times the distance."""
    leaves = [t.double() if double else t for t in inputs]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    made, distance = function(*leaves, gate=gate, **case.settings)
    # An empty pool leaves the reference without a graph.
    grads = torch.autograd.grad(distance * 100, leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    grads = [zero if grad is None else grad for grad, zero in zip(grads, zeros, strict=True)]
    return made, distance.detach(), dict(zip(INPUTS, grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_selection_distance_and_gradients(case, dtype):
    inputs = make_inputs(case, dtype)
    truth_gate, truth, truth_grads = run(match_prompts_reference, inputs, case, double=True)
    _, plain, plain_grads = run(match_prompts_reference, inputs, case, gate=truth_gate)
    gate, _, _ = run(match_prompts, inputs, case)
    assert gate.dtype == torch.int32 and gate.shape == truth_gate.shape
    assert wrong_margin(gate, truth_gate, inputs, case) <= bound(case.width)
    # The same selection for all three, so that a near tie is no error of a value.
    _, distance, grads = run(match_prompts, inputs, case, gate=truth_gate)
    assert distance.dtype == torch.float32 and distance.shape == ()
    assert abs(distance.item() - truth.item()) <= 2 * abs(plain.item() - truth.item()) + 4e-7
    for name, grad in grads.items():
        assert grad.dtype == (dtype if name == "x" else torch.float32)
        # d cos / dx is the difference of two vectors of length 1 / |x|.
        terms = 100 / case.batch / inputs[0].double().norm(dim=-1).min().item()
        assert_close(name, grad, plain_grads[name], truth_grads[name], terms * (name == "x"))


@pytest.mark.parametrize(
    ("name", "tile"),
    [("paper", "taller")]
    + [(n, "tall") for n in ("small", "width-100", "width-30", "prefix-5", "no-pool", "pool-64")],
)
def test_tall_tiles(name, tile):
    # The launch table has them for half rows only.
    with tiles(tile):
        test_selection_distance_and_gradients(CASES[name], torch.float16)


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [("held", torch.float32), ("held", torch.float16), ("tall", torch.float16)],
    ids=str,
)
def test_selection_is_right_at_margins_of_a_few_ulp(tile, dtype):
    with tiles(tile):
        _check_narrow_margins(dtype)


def _check_narrow_margins(dtype):
    # 18 keys that differ by 1e-6 only: margins between 1e-9 and 1e-6, as in the golden files.
    case = Case(batch=1, tokens=64, width=768, pool=(18, 18), top_k=(9, 9))
    x, *_ = make_inputs(case, dtype)
    base = torch.randn(1, 768, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    noise = torch.randn(18, 768, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    inputs = x, base + 3e-5 * noise, base + 3e-5 * noise.flip(0)
    truth, _ = match_prompts_reference(*(t.double() for t in inputs), **case.settings)
    gate, _ = match_prompts(*inputs, **case.settings)
    margin = wrong_margin(gate, truth, inputs, case)
    assert margin <= 6e-8, f"a margin of {margin:.3g} was lost"


def test_ties_go_to_the_lower_index():
    # Small integers against +-1: equal cosines are equal in any order of summation.
    case = Case(pool=(6, 20), top_k=(3, 7))
    x, cls_keys, image_keys = (t.mul(2).round() for t in make_inputs(case, torch.float32))
    x[:, 3:6] = 0.0
    cls_keys, image_keys = (torch.where(t < 0, -1.0, 1.0) for t in (cls_keys, image_keys))
    inputs = x, cls_keys[:1].expand(6, -1), image_keys[:2].repeat(10, 1)
    for selection in ("nearest", "farthest"):
        settings_ = replace(case, selection=selection).settings
        gate, _ = match_prompts(*inputs, **settings_)
        expected, _ = match_prompts_reference(*(t.double() for t in inputs), **settings_)
        assert torch.equal(gate, expected)


@allow_nan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selection", ["nearest", "farthest"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_rows_select_as_the_reference_and_stay_alone(value, selection, dtype):
    case = Case(batch=3, selection=selection)
    x, cls_keys, image_keys = make_inputs(case, dtype)
    clean, _ = match_prompts(x, cls_keys, image_keys, **case.settings)
    x[1, 0, 3], x[1, 7, 5] = value, value
    gate, distance = match_prompts(x, cls_keys, image_keys, **case.settings)
    expected, _ = match_prompts_reference(x, cls_keys, image_keys, **case.settings)
    assert torch.equal(gate, expected)
    assert torch.equal(gate[[0, 2]], clean[[0, 2]])
    assert distance.isnan()


@allow_nan
def test_a_non_finite_sample_leaves_the_gradient_of_others_alone():
    case = Case(batch=3)
    inputs = make_inputs(case, torch.float32)
    _, _, clean = run(match_prompts, inputs, case)
    inputs[0][1] = float("nan")
    _, _, grads = run(match_prompts, inputs, case)
    assert torch.equal(grads["x"][[0, 2]], clean["x"][[0, 2]])


@allow_nan
def test_a_nan_key_counts_as_most_similar():
    case = Case()
    x, cls_keys, image_keys = make_inputs(case, torch.float32)
    image_keys[4, 2] = float("nan")
    for selection in ("nearest", "farthest"):
        settings_ = replace(case, selection=selection).settings
        gate, _ = match_prompts(x, cls_keys, image_keys, **settings_)
        expected, _ = match_prompts_reference(x, cls_keys, image_keys, **settings_)
        assert torch.equal(gate, expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 6e4 / 5])
def test_the_scale_of_a_row_does_not_change_its_selection(scale):
    # Up to the largest float16 numbers.
    case = Case(width=96)
    x, cls_keys, image_keys = make_inputs(case, torch.float32)
    x = x.clamp(-5, 5)
    gate, distance = match_prompts((x * scale).half(), cls_keys, image_keys, **case.settings)
    inputs = (x * scale).half(), cls_keys, image_keys
    truth, expected = match_prompts_reference(*(t.double() for t in inputs), **case.settings)
    assert wrong_margin(gate, truth, inputs, case) <= bound(96)
    assert abs(distance.item() - expected.item()) < 4e-7


def test_zero_rows_and_zero_keys_have_the_gradient_of_the_clamp():
    case = Case(batch=1, tokens=5)
    inputs = make_inputs(case, torch.float32)
    inputs[0][0, 2] = 0.0
    inputs[2][3] = 0.0
    gate, _, expected = run(match_prompts_reference, inputs, case, double=True)
    _, _, grads = run(match_prompts, inputs, case, gate=gate)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_given_gate_is_only_measured():
    case = Case(lengths=(2, 3))
    inputs = make_inputs(case, torch.float32)
    drawn = random_gate(
        case.batch, case.tokens, num_pool=case.pool, top_k=case.top_k, lengths=case.lengths,
        generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE,
    )  # fmt: skip
    shared = drawn[:1].expand(case.batch, -1, -1)
    strided = drawn.repeat_interleave(2, -1)[..., ::2]
    # More than top_k entries, and bits of the other role, which do not count.
    visible = torch.rand(case.batch, case.tokens, 37, device=DEVICE) < 0.5
    for gate in (drawn, shared, strided, pack_gate(visible)):
        made, distance, grads = run(match_prompts, inputs, case, gate=gate)
        _, expected, truth = run(match_prompts_reference, inputs, case, gate=gate, double=True)
        assert made is gate
        assert abs(distance.item() - expected.item()) < 1e-6
        for name, grad in grads.items():
            torch.testing.assert_close(grad.double(), truth[name], rtol=1e-5, atol=1e-6)


def test_strided_rows_give_the_same_bits():
    case = Case(batch=4, width=40)
    x, cls_keys, image_keys = make_inputs(case, torch.float32)
    expected = run(match_prompts, (x, cls_keys, image_keys), case)
    wide = torch.zeros(4, 30, 56, device=DEVICE)
    wide[:, 3:24, 9:49] = x
    layouts = {
        "sliced": wide[:, 3:24, 9:49],
        "batch inside": x.transpose(0, 1).contiguous().transpose(0, 1),
        "width outside": x.mT.contiguous().mT,
    }
    for name, layout in layouts.items():
        leaf = layout.detach().requires_grad_()
        gate, distance = match_prompts(leaf, cls_keys, image_keys, **case.settings)
        (distance * 100).backward()
        assert torch.equal(gate, expected[0]), name
        assert torch.equal(distance.detach(), expected[1]), name
        assert torch.equal(leaf.grad, expected[2]["x"]), name
    keys = cls_keys.mT.contiguous().mT, image_keys.repeat(1, 2)[:, :40]
    _, distance = match_prompts(x, *keys, **case.settings)
    assert torch.equal(distance, expected[1])


def test_half_keys_get_half_gradients():
    case = Case()
    x, *keys = make_inputs(case, torch.float32)
    inputs = x, *(k.half() for k in keys)
    gate, _, truth = run(match_prompts_reference, inputs, case, double=True)
    _, _, plain = run(match_prompts_reference, inputs, case, gate=gate)
    _, _, grads = run(match_prompts, inputs, case, gate=gate)
    for name, grad in grads.items():
        assert_close(name, grad, plain[name], truth[name])


def test_samples_and_entries_may_be_permuted():
    case = Case(batch=4)
    x, cls_keys, image_keys = make_inputs(case, torch.float32)
    gate, _ = match_prompts(x, cls_keys, image_keys, **case.settings)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    moved, _ = match_prompts(x[order], cls_keys, image_keys, **case.settings)
    assert torch.equal(moved, gate[order])
    entries = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    renamed, _ = match_prompts(x, cls_keys, image_keys[entries], **case.settings)
    ours = split_gate(renamed, case.pool, case.lengths, 1)[1]
    assert torch.equal(ours, split_gate(gate, case.pool, case.lengths, 1)[1][..., entries])


@pytest.mark.parametrize("needed", INPUTS)
def test_only_what_is_needed_gets_a_gradient(needed):
    case = Case()
    inputs = dict(zip(INPUTS, make_inputs(case, torch.float32), strict=True))
    _, _, expected = run(match_prompts, tuple(inputs.values()), case)
    inputs[needed].requires_grad_()
    gate, distance = match_prompts(*inputs.values(), **case.settings)
    assert not gate.requires_grad
    (distance * 100).backward()
    assert torch.equal(inputs[needed].grad, expected[needed])
    assert [name for name, t in inputs.items() if t.grad is not None] == [needed]


def test_an_empty_batch_has_distance_zero():
    case = Case(batch=0)
    inputs = make_inputs(case, torch.float32)
    gate, distance, grads = run(match_prompts, inputs, case)
    assert gate.shape == (0, 21, 1) and distance.item() == 0.0
    assert all((grad == 0).all() for grad in grads.values())


def test_repeated_runs_give_the_same_bits():
    case = Case(batch=3, tokens=37)
    inputs = make_inputs(case, torch.float16)
    gate, distance, grads = run(match_prompts, inputs, case)
    again = run(match_prompts, inputs, case)
    assert torch.equal(gate, again[0]) and torch.equal(distance, again[1])
    assert all(torch.equal(grads[name], again[2][name]) for name in grads)


# No shrinking: it would take minutes in the interpreter, and the cases are small as drawn.
@settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@hypothesis_given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 140)),
    pool=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    lengths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    selection=st.sampled_from(["nearest", "farthest"]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, pool, share, lengths, selection, dtype):
    top_k = round(share[0] * pool[0]), round(share[1] * pool[1])
    case = Case(*shape, pool, top_k, round(share[2] * shape[1]), lengths, selection)
    test_selection_distance_and_gradients(case, dtype)


# opcheck itself looks at .grad of the copies that it makes of the inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("with_gate", [False, True])
def test_opcheck(with_gate):
    case = Case(batch=1, tokens=9)
    inputs = [t.requires_grad_() for t in make_inputs(case, torch.float32)]
    gate, _ = match_prompts(*inputs, **case.settings)
    numbers = [*case.pool, *case.top_k, case.prefix, *case.lengths, 0]
    torch.library.opcheck(_match_prompts, (*inputs, gate if with_gate else None, numbers))


def test_full_graph_compile():
    case = Case(batch=1, tokens=9)
    inputs = make_inputs(case, torch.float32)

    def function(*tensors, **kwargs):
        return match_prompts(*tensors, **kwargs)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, ours = run(match_prompts, inputs, case), run(compiled, inputs, case)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert all(torch.equal(ours[2][name], expected[2][name]) for name in ours[2])


BAD = {
    "x-dtype": ({"x": lambda t: t.double()}, {}),
    "key-dtype": ({"cls_keys": lambda t: t.long()}, {}),
    "rank": ({"x": lambda t: t[0]}, {}),
    "width": ({"image_keys": lambda t: t[:, 1:]}, {}),
    "pool": ({"cls_keys": lambda t: t[:1].repeat(65, 1)}, {}),
    "wide": (dict.fromkeys(INPUTS, lambda t: t.new_zeros(*t.shape[:-1], 4097)), {}),
    "top-k": ({}, {"cls_top_k": 6}),
    "prefix": ({}, {"num_prefix_tokens": 22}),
    "length": ({}, {"lengths": (1, 0)}),
    "selection": ({}, {"selection": "best"}),
    "gate-dtype": ({}, {"gate": torch.zeros(2, 21, 1, dtype=torch.int64)}),
    "gate-words": ({}, {"gate": torch.zeros(2, 21, 2, dtype=torch.int32)}),
}


@pytest.mark.parametrize(("changes", "settings"), BAD.values(), ids=BAD.keys())
def test_what_would_read_past_a_tensor_is_not_launched(changes, settings):
    case = Case()
    inputs = dict(zip(INPUTS, make_inputs(case, torch.float32), strict=True))
    inputs |= {name: change(inputs[name]) for name, change in changes.items()}
    with pytest.raises(AssertionError):
        match_prompts(**inputs, **{**case.settings, **settings})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
class TestOnGpu:
    case = Case(batch=16, tokens=197, width=768, pool=(18, 18), top_k=(10, 10))

    @pytest.mark.parametrize("tile", TILES)
    def test_bfloat16(self, tile):
        with tiles(tile):
            test_selection_distance_and_gradients(self.case, torch.bfloat16)

    @pytest.mark.parametrize("tile", TILES)
    def test_bfloat16_margins(self, tile):
        test_selection_is_right_at_margins_of_a_few_ulp(tile, torch.bfloat16)

    def test_a_hundred_runs_give_the_same_bits(self):
        inputs = make_inputs(self.case, torch.bfloat16)
        first = run(match_prompts, inputs, self.case)
        for _ in range(100):
            again = run(match_prompts, inputs, self.case)
            assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
            assert all(torch.equal(again[2][name], grad) for name, grad in first[2].items())

    def test_rows_beyond_two_to_the_31_elements(self):
        case = replace(self.case, batch=2)
        x, *keys = make_inputs(case, torch.bfloat16)
        far = x.new_zeros(2, 2**31 // 2 + 197 * 768)
        view = far[:, -197 * 768 :].view(2, 197, 768)
        view.copy_(x)
        expected, ours = (
            run(match_prompts, (x, *keys), case),
            match_prompts(view, *keys, **case.settings),
        )
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
