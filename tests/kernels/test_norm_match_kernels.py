"""The fused LayerNorm and matching kernels equal both of them run apart, gradients included.

They run on a GPU where there is one and in the Triton interpreter elsewhere. The truth is
`norm_match_reference` in float64 on the same low-precision inputs; errors are compared with those
of the same function at that precision.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
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
from torch import Tensor

from tcpa.kernels.host import launch_error
from tcpa.kernels.matching.op import _norm_match, match_prompts, norm_match
from tcpa.reference import match_prompts_reference, random_gate

pytestmark = pytest.mark.skipif(
    launch_error(DEVICE) is not None, reason="needs a GPU or TRITON_INTERPRET=1"
)
EPS = 1e-6
# What the fused kernel adds over matching alone: widths, rows and roles, with and without a pool.
NAMES = (
    "small",
    "farthest",
    "paper",
    "width-100",
    "width-30",
    "width-192",
    "width-384",
    "width-1280",
    "tokens-1",
    "tokens-17",
    "tokens-18",
    "prefix-0",
    "prefix-all",
    "no-cls-pool",
    "no-pool",
    "pool-64",
    "lengths",
)


def norm_match_reference(x, weight, bias, eps, cls_keys, image_keys, **kwargs):
    """LayerNorm, then matching of the rows before it."""
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return normed, *match_prompts_reference(x, cls_keys, image_keys, **kwargs)


def make_affine(width: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, width, generator=generator)
    return (1 + 0.3 * weight).to(DEVICE), bias.to(DEVICE)


def make_upstream(case: Case, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    shape = case.batch, case.tokens, case.width
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def run(function, inputs, affine, case: Case, gate=None, upstream=None, double=False, slope=30.0):
    """Return normed rows, gate, distance and the gradients by name of a scalar of both outputs."""
    tensors = [None if t is None else t.double() if double else t for t in (*inputs, *affine)]
    x, *keys = (t.detach().clone().requires_grad_() for t in tensors[:3])
    normed, made, distance = function(x, *tensors[3:], EPS, *keys, gate=gate, **case.settings)
    upstream = make_upstream(case, inputs[0].dtype) if upstream is None else upstream
    outputs, grads = [normed], [upstream.to(normed.dtype)]
    if distance.requires_grad:
        outputs.append(distance)
        grads.append(torch.full_like(distance, slope))
    grads = torch.autograd.grad(outputs, (x, *keys), grads, allow_unused=True)
    grads = [
        torch.zeros_like(t) if g is None else g for t, g in zip((x, *keys), grads, strict=True)
    ]
    names = ("x", "cls_keys", "image_keys")
    return normed.detach(), made, distance.detach(), dict(zip(names, grads, strict=True))


def check(case: Case, dtype: torch.dtype, affine) -> None:
    """Compare every output and gradient with the reference."""
    inputs = make_inputs(case, dtype)
    truth = run(norm_match_reference, inputs, affine, case, double=True)
    plain = run(norm_match_reference, inputs, affine, case, gate=truth[1])
    gate = run(norm_match, inputs, affine, case)[1]
    assert wrong_margin(gate, truth[1], inputs, case) <= bound(case.width)
    # The same selection for all three, so that a near tie is no error of a value.
    normed, _, distance, grads = run(norm_match, inputs, affine, case, gate=truth[1])
    assert normed.dtype == dtype and normed.is_contiguous()
    assert_close("normed", normed, plain[0], truth[0])
    assert abs(distance.item() - truth[2].item()) <= 2 * abs(plain[2] - truth[2]).item() + 4e-7
    # LayerNorm's gradient is a difference of vectors of this length.
    terms = 4 / inputs[0].double().std(-1, unbiased=False).min().item()
    for name, grad in grads.items():
        assert_close(name, grad, plain[3][name], truth[3][name], terms * (name == "x"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_normed_rows_selection_distance_and_gradients(name, dtype):
    check(CASES[name], dtype, make_affine(CASES[name].width))


@pytest.mark.parametrize(
    ("name", "tile"),
    [("paper", "taller")]
    + [(n, "tall") for n in ("small", "width-100", "width-30", "prefix-0", "no-pool")],
)
def test_tall_tiles(name, tile):
    # The launch table has them for half rows only.
    with tiles(tile):
        check(CASES[name], torch.float16, make_affine(CASES[name].width))


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [("held", torch.float32), ("held", torch.float16), ("tall", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("affine", ["weight", "bias", "none", "half"])
def test_affine_parameters_may_be_absent_or_half(affine, tile, dtype):
    weight, bias = make_affine(64)
    choices = {
        "weight": (weight, None),
        "bias": (None, bias),
        "none": (None, None),
        "half": (weight.half(), bias.half()),
    }
    with tiles(tile):
        check(Case(), dtype, choices[affine])


@pytest.mark.parametrize("tile", TILES)
def test_the_deviation_of_a_row_does_not_cancel(tile):
    # The first columns, about which a tall tile sums squares, are as far from the rest as can be.
    case = Case(width=768, tokens=5)
    x, *keys = make_inputs(case, torch.float32 if tile == "held" else torch.float16)
    x[..., :32] += 1000
    x[0, :, 32:] *= 1e-3
    inputs, affine = (x, *keys), make_affine(768)
    truth = run(norm_match_reference, inputs, affine, case, double=True)
    plain = run(norm_match_reference, inputs, affine, case, gate=truth[1])
    with tiles(tile):
        ours = run(norm_match, inputs, affine, case, gate=truth[1])
    assert_close("normed", ours[0], plain[0], truth[0])


@pytest.mark.parametrize("tile", TILES)
def test_the_norm_of_a_row_does_not_cancel(tile):
    # A mean a thousand times the deviation: sums of squares about zero would lose the variance.
    case = Case(width=96)
    x, *keys = make_inputs(case, torch.float32)
    inputs, affine = (x * 0.01 + 10, *keys), make_affine(96)
    truth = run(norm_match_reference, inputs, affine, case, double=True)
    plain = run(norm_match_reference, inputs, affine, case, gate=truth[1])
    with tiles(tile):
        ours = run(norm_match, inputs, affine, case, gate=truth[1])
    assert_close("normed", ours[0], plain[0], truth[0], 1e3)
    assert abs(ours[2].item() - truth[2].item()) < 1e-6


def test_selection_and_distance_are_those_of_match_prompts():
    case = Case(batch=3, tokens=37, width=128, pool=(18, 18), top_k=(9, 9))
    inputs, affine = make_inputs(case, torch.float16), make_affine(128)
    _, gate, distance, _ = run(norm_match, inputs, affine, case)
    expected, alone = match_prompts(*inputs, **case.settings)
    assert torch.equal(gate, expected)
    assert abs(distance.item() - alone.item()) < 4e-7


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Numpy announces NaN in the interpreter.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_sample_selects_as_the_reference_and_stays_alone(value, dtype):
    case = Case(batch=3)
    inputs, affine = make_inputs(case, dtype), make_affine(64)
    clean = run(norm_match, inputs, affine, case)
    inputs[0][1, 7, 5] = value
    spoilt = run(norm_match, inputs, affine, case)
    expected, _ = match_prompts_reference(*inputs, **case.settings)
    assert torch.equal(spoilt[1], expected)
    for index in (0, 1):
        assert torch.equal(spoilt[index][[0, 2]], clean[index][[0, 2]])
    assert torch.equal(spoilt[3]["x"][[0, 2]], clean[3]["x"][[0, 2]])
    assert spoilt[0][1, 7].isnan().all() and spoilt[0][1, :7].isfinite().all()


def test_upstream_gradients_of_any_strides():
    case = Case()
    inputs, affine = make_inputs(case, torch.float32), make_affine(64)
    dense = make_upstream(case, torch.float32)
    wide = torch.zeros(2, 21, 80, device=DEVICE)
    wide[..., 8:72] = dense
    layouts = {
        "sliced": wide[..., 8:72],
        "batch inside": dense.transpose(0, 1).contiguous().transpose(0, 1),
        "width outside": dense.mT.contiguous().mT,
        "one row": dense[:1, :1].expand(2, 21, 64),
        "one number": dense[:1, :1, :1].expand(2, 21, 64),
    }
    for name, upstream in layouts.items():
        expected = run(norm_match, inputs, affine, case, upstream=upstream.contiguous())
        ours = run(norm_match, inputs, affine, case, upstream=upstream)
        assert torch.equal(ours[3]["x"], expected[3]["x"]), name


def test_each_output_alone_has_its_own_gradient():
    case = Case()
    (x, *keys), affine = make_inputs(case, torch.float32), make_affine(64)
    x.requires_grad_()
    normed, gate, distance = norm_match(x, *affine, EPS, *keys, **case.settings)
    upstream = make_upstream(case, torch.float32)
    (from_normed,) = torch.autograd.grad(normed, x, upstream, retain_graph=True)
    (from_distance,) = torch.autograd.grad(distance * 30, x, retain_graph=True)
    reference = norm_match_reference(x, *affine, EPS, *keys, gate=gate, **case.settings)
    (expected,) = torch.autograd.grad(reference[0], x, upstream, retain_graph=True)
    torch.testing.assert_close(from_normed, expected, rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(reference[2] * 30, x)
    torch.testing.assert_close(from_distance, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needed", ["x", "cls_keys", "image_keys"])
def test_only_what_is_needed_gets_a_gradient(needed):
    case = Case()
    inputs, affine = make_inputs(case, torch.float32), make_affine(64)
    upstream = make_upstream(case, torch.float32)
    expected = run(norm_match, inputs, affine, case)[3]
    named = dict(zip(expected, inputs, strict=True))
    named[needed].requires_grad_()
    normed, gate, distance = norm_match(
        named["x"], *affine, EPS, named["cls_keys"], named["image_keys"], **case.settings
    )
    ((normed * upstream).sum() + 30 * distance).backward()
    assert not gate.requires_grad
    assert torch.equal(named[needed].grad, expected[needed])
    assert [name for name, t in named.items() if t.grad is not None] == [needed]


def test_a_given_gate_is_only_measured():
    case = Case(lengths=(2, 3))
    inputs, affine = make_inputs(case, torch.float32), make_affine(64)
    gate = random_gate(
        2, 21, num_pool=case.pool, top_k=case.top_k, lengths=case.lengths,
        generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE,
    )  # fmt: skip
    truth = run(norm_match_reference, inputs, affine, case, gate=gate, double=True)
    ours = run(norm_match, inputs, affine, case, gate=gate)
    assert ours[1] is gate
    assert abs(ours[2].item() - truth[2].item()) < 1e-6
    for name, grad in ours[3].items():
        torch.testing.assert_close(grad.double(), truth[3][name], rtol=1e-5, atol=1e-5)


def test_an_empty_batch():
    case = Case(batch=0)
    inputs, affine = make_inputs(case, torch.float32), make_affine(64)
    normed, gate, distance, _ = run(norm_match, inputs, affine, case)
    assert normed.shape == (0, 21, 64) and gate.shape == (0, 21, 1) and distance.item() == 0.0


def test_repeated_runs_give_the_same_bits():
    case = Case(batch=3, tokens=37)
    inputs, affine = make_inputs(case, torch.float16), make_affine(64)
    first, again = (run(norm_match, inputs, affine, case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert all(torch.equal(first[3][name], again[3][name]) for name in first[3])


# No shrinking: it would take minutes in the interpreter, and the cases are small as drawn.
@settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@hypothesis_given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(8, 140)),
    pool=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, pool, share, dtype):
    top_k = round(share[0] * pool[0]), round(share[1] * pool[1])
    case = Case(*shape, pool, top_k, round(share[2] * shape[1]))
    check(case, dtype, make_affine(case.width))


# opcheck itself looks at .grad of the copies that it makes of the inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("with_gate", [False, True])
def test_opcheck(with_gate):
    case = Case(batch=1, tokens=9)
    x, *keys = (t.requires_grad_() for t in make_inputs(case, torch.float32))
    _, gate, _ = norm_match(x, None, None, EPS, *keys, **case.settings)
    numbers = [*case.pool, *case.top_k, case.prefix, *case.lengths, 0]
    args = (x, *make_affine(64), EPS, *keys, gate if with_gate else None, numbers)
    torch.library.opcheck(_norm_match, args)


def test_full_graph_compile():
    case = Case(batch=1, tokens=9)
    inputs, affine = make_inputs(case, torch.float32), make_affine(64)

    def function(*args, **kwargs):
        return norm_match(*args, **kwargs)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, ours = (run(f, inputs, affine, case) for f in (norm_match, compiled))
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], expected[:3], strict=True))
    assert all(torch.equal(ours[3][name], expected[3][name]) for name in ours[3])


BAD = {
    "rows-dtype": lambda x, weight, bias: (x.double(), weight, bias),
    "weight-dtype": lambda x, weight, bias: (x, weight.double(), bias),
    "bias-shape": lambda x, weight, bias: (x, weight, bias[1:]),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_what_would_read_past_a_tensor_is_not_launched(change):
    case = Case()
    x, *keys = make_inputs(case, torch.float32)
    with pytest.raises(AssertionError):
        norm_match(*change(x, *make_affine(64)), EPS, *keys, **case.settings)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
class TestOnGpu:
    case = Case(batch=16, tokens=197, width=768, pool=(18, 18), top_k=(10, 10))

    @pytest.mark.parametrize("tile", TILES)
    def test_bfloat16(self, tile):
        with tiles(tile):
            check(self.case, torch.bfloat16, make_affine(768))

    def test_a_hundred_runs_give_the_same_bits(self):
        inputs, affine = make_inputs(self.case, torch.bfloat16), make_affine(768)
        first = run(norm_match, inputs, affine, self.case)
        for _ in range(100):
            again = run(norm_match, inputs, affine, self.case)
            assert all(torch.equal(a, b) for a, b in zip(again[:3], first[:3], strict=True))
            assert all(torch.equal(again[3][name], grad) for name, grad in first[3].items())

    def test_rows_beyond_two_to_the_31_elements(self):
        case, affine = replace(self.case, batch=2), make_affine(768)
        x, *keys = make_inputs(case, torch.bfloat16)
        far = x.new_zeros(2, 2**31 // 2 + 197 * 768)
        view = far[:, -197 * 768 :].view(2, 197, 768)
        view.copy_(x)
        expected, ours = (
            norm_match(rows, *affine, EPS, *keys, **case.settings) for rows in (x, view)
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
