"""The Triton kernels of gated attention compute what the reference specifies.

Truth is the reference in float64 on the same low-precision inputs. A kernel's largest error may be
twice the one that the reference makes at the kernel's precision; for the promised shapes in half
precision its root mean square may not be larger than the reference's. Both errors are printed on
failure. Without a GPU the kernels run in Triton's interpreter, which computes bfloat16 wrongly:
float32 and float16 are tested here, bfloat16 on a GPU.
"""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitize_kernels
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpa.kernels import launch
from tcpa.kernels.attention import inputs as attention_inputs
from tcpa.kernels.attention.inputs import MAX_ROW_STRIDE, addressable
from tcpa.kernels.attention.op import gated_attention
from tcpa.reference import gated_attention_reference, pack_gate

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAMES = ("q", "k", "v", "k_prompt", "v_prompt")
# Rounding of sums in another order, in units of float32's epsilon times a few terms.
FLOOR = {torch.float32: 2e-6, torch.float16: 0.0, torch.bfloat16: 0.0}
pytestmark = pytest.mark.skipif(
    not GPU and not launch.interpreting(), reason="needs a GPU or TRITON_INTERPRET=1"
)
# In the interpreter numpy warns of the infinities and NaNs that a test puts in on purpose.
non_finite = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

# id: batch, queries, tokens, prompts, heads, head dim, prompts per sample
SHAPES = {
    "vit_b": (1, 197, 197, 36, 2, 64, False),
    "no_prompts": (2, 17, 17, 0, 1, 32, False),
    "prompts_only": (2, 5, 0, 40, 2, 16, False),
    "cls_only": (3, 1, 197, 36, 1, 64, False),
    "tail_of_16": (1, 80, 63, 1, 1, 32, False),
    "tail_of_17": (1, 81, 65, 31, 1, 32, True),
    "gap_of_63": (2, 15, 1, 64, 1, 16, False),
    "gap_of_0": (1, 16, 28, 36, 1, 16, True),
    "sign_bit": (2, 9, 33, 32, 2, 32, False),
    "three_words": (1, 33, 100, 70, 1, 64, False),
    "eight_words": (1, 7, 3, 256, 1, 16, False),
    "head_dim_80": (2, 20, 45, 36, 1, 80, True),
    "head_dim_128": (1, 10, 40, 8, 2, 128, False),
    "head_dim_20": (1, 10, 40, 8, 2, 20, False),
    "more_queries": (1, 70, 3, 5, 1, 16, False),
    "long": (1, 40, 300, 36, 1, 32, False),
}


def make_inputs(batch, queries, tokens, prompts, heads, head_dim, per_sample, dtype=torch.float32):
    """Return q, k, v, k_prompt, v_prompt and a gate that shows a third of the prompts."""
    lead = (batch,) if per_sample else ()
    shapes = [
        (batch, queries),
        (batch, tokens),
        (batch, tokens),
        (*lead, prompts),
        (*lead, prompts),
    ]
    tensors = [torch.randn(*shape, heads, head_dim).to(DEVICE, dtype) for shape in shapes]
    return tensors, pack_gate(torch.rand(batch, queries, prompts) < 0.3).to(DEVICE)


def run(function, tensors, gate, grad=None, **options):
    """Return the output, the upstream gradient and the gradients of all five tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, gate, **options)
    if grad is None:
        grad = torch.randn(out.shape).to(out)
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return out.detach(), grad, grads


def check_against_reference(tensors, gate, *, strict=False, grad=None, **options):
    """Compare output and gradients with float64, relative to the reference's own error."""
    out, grad, grads = run(gated_attention, tensors, gate, grad, **options)
    plain = run(gated_attention_reference, tensors, gate, grad, **options)
    exact_inputs = [tensor.double() for tensor in tensors]
    exact = run(gated_attention_reference, exact_inputs, gate, grad.double(), **options)
    ours, theirs, truths = (out, *grads), (plain[0], *plain[2]), (exact[0], *exact[2])
    names = ("o", *(f"d{name}" for name in NAMES))
    for name, mine, other, truth in zip(names, ours, theirs, truths, strict=True):
        assert mine.shape == truth.shape and mine.dtype == out.dtype, name
        if truth.numel() == 0:
            continue
        error, budget = ((t.double() - truth).abs() for t in (mine, other))
        floor = FLOOR[out.dtype] * max(truth.abs().max().item(), 1.0)
        both = f"{name}: largest error {error.max():.3e}, plain PyTorch {budget.max():.3e}"
        assert error.max() <= 2 * budget.max() + floor, both
        error, budget = (t.square().mean().sqrt() for t in (error, budget))
        both = f"{name}: root mean square error {error:.3e}, plain PyTorch {budget:.3e}"
        assert not strict or error <= budget, both


@pytest.mark.parametrize("normalize_over", ["all", "visible"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [pytest.param(s, id=i) for i, s in SHAPES.items()])
@non_finite
def test_matches_float64(shape, dtype, normalize_over):
    tensors, gate = make_inputs(*shape, dtype=dtype)
    if normalize_over == "visible" and shape[2] == 0:
        # With no token at all, a query that sees no prompt has no output: 0 / 0 in the reference.
        gate = torch.full_like(gate, 5)
    strict = shape == SHAPES["vit_b"] and dtype == torch.float16
    check_against_reference(tensors, gate, strict=strict, normalize_over=normalize_over)


@pytest.mark.parametrize("queries", [1, 69, 128, 133, 197], ids=lambda n: f"Lq{n}")
def test_launches_of_sm_90(monkeypatch, queries):
    monkeypatch.setattr(attention_inputs, "architecture_of", lambda device: "sm_90")
    tensors, gate = make_inputs(1, queries, 70, 36, 1, 64, False, torch.float16)
    check_against_reference(tensors, gate)


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 2), queries=st.integers(1, 40), tokens=st.integers(1, 70),
    prompts=st.integers(0, 70), heads=st.integers(1, 2), head_dim=st.integers(16, 40),
    per_sample=st.booleans(), shared_gate=st.booleans(), seed=st.integers(0, 99),
    scale=st.sampled_from([None, 0.0, 0.03, 1.0]),
    normalize_over=st.sampled_from(["all", "visible"]),
)  # fmt: skip
def test_any_shape(
    batch, queries, tokens, prompts, heads, head_dim, per_sample, shared_gate, seed, scale,
    normalize_over,
):  # fmt: skip
    torch.manual_seed(seed)
    tensors, gate = make_inputs(batch, queries, tokens, prompts, heads, head_dim, per_sample)
    gate = gate[:1] if shared_gate else gate
    check_against_reference(tensors, gate, scale=scale, normalize_over=normalize_over)


def _sdpa(q, k, v):
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2).double() for t in (q, k, v)))
    return out.transpose(1, 2)


def test_without_prompts_is_sdpa():
    (q, k, v, kp, vp), _ = make_inputs(2, 33, 50, 0, 2, 32, False)
    assert torch.allclose(
        gated_attention(q, k, v, kp, vp, None).double(), _sdpa(q, k, v), atol=2e-6
    )


@pytest.mark.parametrize("normalize_over", ["all", "visible"])
@pytest.mark.parametrize("gated", [False, True], ids=["no_gate", "all_bits"])
def test_all_prompts_visible_is_sdpa_over_the_concatenation(gated, normalize_over):
    (q, k, v, kp, vp), gate = make_inputs(2, 33, 50, 40, 2, 32, True)
    full = torch.full_like(gate, -1) if gated else None
    out = gated_attention(q, k, v, kp, vp, full, normalize_over=normalize_over)
    expected = _sdpa(q, torch.cat((kp, k), 1), torch.cat((vp, v), 1))
    assert torch.allclose(out.double(), expected, atol=2e-6)


def test_is_linear_in_the_gate():
    tensors, first = make_inputs(2, 20, 30, 50, 2, 32, False)
    second = torch.randint_like(first, -(2**31), 2**31 - 1)
    either, both, one, other = (
        gated_attention(*tensors, g) for g in (first | second, first & second, first, second)
    )
    assert torch.allclose(either + both, one + other, atol=2e-6)


def test_permuted_batch_heads_and_prompts():
    tensors, _ = make_inputs(3, 20, 30, 40, 3, 32, False)
    visible = torch.rand(3, 20, 40, device=DEVICE) < 0.5
    out = gated_attention(*tensors, pack_gate(visible))
    batch, heads, prompts = torch.randperm(3), torch.randperm(3), torch.randperm(40)
    q, k, v, kp, vp = (t[..., heads, :] for t in tensors)
    permuted = gated_attention(
        q[batch],
        k[batch],
        v[batch],
        kp[prompts],
        vp[prompts],
        pack_gate(visible[batch][..., prompts]),
    )
    assert torch.allclose(permuted, out[batch][:, :, heads], atol=2e-6)


def test_hidden_prompt_counts_in_the_denominator_of_all_only():
    tensors, gate = make_inputs(1, 8, 12, 8, 1, 16, False)
    hidden = torch.zeros_like(gate)
    tokens = _sdpa(*tensors[:3])
    visible, _, grads = run(gated_attention, tensors, hidden, normalize_over="visible")
    assert torch.allclose(visible.double(), tokens, atol=2e-6)
    assert all(grad.abs().max() == 0 for grad in grads[3:])
    out, _, grads = run(gated_attention, tensors, hidden)
    assert (out.abs() < visible.abs()).all()
    assert grads[3].abs().max() > 0 and grads[4].abs().max() == 0


@non_finite
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_bad_sample_stays_alone(name, bad):
    tensors, gate = make_inputs(3, 20, 30, 36, 2, 32, True)
    clean, grad, clean_grads = run(gated_attention, tensors, gate)
    tensors[NAMES.index(name)][1, 3] = bad
    out, _, grads = run(gated_attention, tensors, gate, grad)
    assert not out[1].isfinite().all()
    for mine, expected in zip((out, *grads), (clean, *clean_grads), strict=True):
        assert torch.equal(mine[[0, 2]], expected[[0, 2]])


@non_finite
@pytest.mark.parametrize("normalize_over", ["all", "visible"])
def test_extreme_scores_stay_finite(normalize_over):
    tensors, gate = make_inputs(1, 20, 30, 36, 1, 16, False, torch.float16)
    tensors[0] *= 60
    tensors[1] *= 60
    # Every score is far below 0, so that a masked key with score 0 would be the largest.
    tensors[0], tensors[1] = tensors[0].abs(), -tensors[1].abs()
    tensors[3] = -tensors[3].abs() * 60
    out, grad, grads = run(gated_attention, tensors, gate, normalize_over=normalize_over)
    exact = [tensor.double() for tensor in tensors]
    truth, _, truths = run(
        gated_attention_reference, exact, gate, grad.double(), normalize_over=normalize_over
    )
    # Softmax is saturated: gradients are differences of large equal terms, of the size of q and k.
    assert torch.allclose(out.double(), truth, atol=2e-3)
    for mine, expected in zip(grads, truths, strict=True):
        assert torch.allclose(mine.double(), expected, atol=1e-3 * 60)


def test_reads_packed_projection_in_place():
    qkv = torch.randn(2, 37, 3, 2, 32, device=DEVICE)
    q, k, v = qkv.unbind(2)
    assert all(addressable(t) is t for t in (q, k, v))
    (_, _, _, kp, vp), gate = make_inputs(2, 37, 37, 36, 2, 32, False)
    check_against_reference([q, k, v, kp, vp], gate)
    check_against_reference([q[:, :1], k, v, kp, vp], gate[:, :1])


@pytest.mark.parametrize("layout", ["heads_first", "tokens_first", "columns_strided", "expanded"])
def test_any_strides(layout):
    tensors, gate = make_inputs(2, 20, 20, 36, 2, 32, True)
    q, k, v, kp, vp = tensors
    if layout == "heads_first":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    elif layout == "tokens_first":
        q, k, v = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v))
    elif layout == "columns_strided":
        q, k, kp = (t.repeat_interleave(2, -1)[..., ::2] for t in (q, k, kp))
    else:
        k, v = (t[:1, :, :1].expand(2, -1, 2, -1) for t in (k, v))
        kp = kp[:1].expand(2, -1, -1, -1)
    strided = gate.repeat_interleave(2, -1)[..., ::2]
    check_against_reference([q, k, v, kp, vp], strided)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced", "scalar"])
def test_upstream_gradient_of_any_strides(layout):
    tensors, gate = make_inputs(2, 20, 20, 36, 2, 32, False)
    grad = {
        "expanded": torch.randn(2, 1, 2, 32).expand(2, 20, 2, 32),
        "transposed": torch.randn(32, 2, 20, 2).permute(3, 2, 1, 0),
        "sliced": torch.randn(2, 40, 4, 64)[:, ::2, 1:3, 16:48],
        "scalar": torch.ones(()).expand(2, 20, 2, 32),
    }[layout]
    check_against_reference(tensors, gate, grad=grad.to(DEVICE))


def test_far_rows_are_copied():
    far = torch.empty(4, 2**23, 1, 16, device="meta").transpose(0, 1)[:2]
    near = far[:, :1]
    assert addressable(far).is_contiguous() and not far.is_contiguous()
    assert addressable(near) is near
    assert far.stride(1) > MAX_ROW_STRIDE


@pytest.mark.parametrize("prompts", [(36, False), (36, True), (70, False)], ids=str)
@pytest.mark.parametrize("wanted", [*NAMES, "prompts", "tokens", "no_prompts"])
def test_computes_only_the_gradients_that_are_needed(wanted, prompts):
    groups = {"prompts": NAMES[3:], "tokens": NAMES[1:3], "no_prompts": NAMES[:3]}
    names = groups.get(wanted, (wanted,))
    tensors, gate = make_inputs(2, 9, 40, prompts[0], 1, 16, prompts[1])
    _, grad, full = run(gated_attention, tensors, gate)
    leaves = [t.requires_grad_(n in names) for t, n in zip(tensors, NAMES, strict=True)]
    out = gated_attention(*leaves, gate)
    grads = torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad)
    expected = [full[NAMES.index(name)] for name in names]
    for name, mine, truth in zip(names, grads, expected, strict=True):
        assert torch.allclose(mine, truth, atol=2e-6), name


def test_repeats_are_bitwise_identical():
    tensors, gate = make_inputs(2, 33, 50, 36, 2, 32, False, torch.float16)
    out, grad, grads = run(gated_attention, tensors, gate)
    again, _, grads_again = run(gated_attention, tensors, gate, grad)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 0)], ids=str)
def test_empty(shape):
    tensors, gate = make_inputs(*shape, 2, 16, False)
    out, _, grads = run(gated_attention, tensors, gate)
    assert out.shape == (shape[0], shape[1], 2, 16)
    for mine, tensor in zip((out, *grads), (out, *tensors), strict=True):
        assert mine.shape == tensor.shape and not mine.any()


# opcheck itself looks at .grad of the copies that it makes of the inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
@pytest.mark.parametrize("gated", [False, True], ids=["no_gate", "gated"])
def test_opcheck(per_sample, gated):
    tensors, gate = make_inputs(2, 5, 7, 36, 2, 16, per_sample)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    arguments = (*leaves, gate if gated else None, 0.25, False)
    torch.library.opcheck(torch.ops.tcpa.gated_attention.default, arguments)
    plain = [tensor.detach() for tensor in tensors]
    o, lse = torch.ops.tcpa.gated_attention(*plain, gate, 0.25, False)
    needs = [True, False, True, True, False]
    arguments = (torch.randn_like(o), *plain, gate, o, lse, 0.25, False, needs)
    torch.library.opcheck(torch.ops.tcpa.gated_attention_backward.default, arguments)


def test_compiles_without_a_graph_break():
    tensors, gate = make_inputs(2, 5, 7, 36, 2, 16, False)
    compiled = torch.compile(gated_attention, fullgraph=True, backend="aot_eager")
    out, grad, grads = run(compiled, tensors, gate)
    expected, _, expected_grads = run(gated_attention, tensors, gate, grad)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_second_derivative_is_refused():
    tensors, gate = make_inputs(1, 3, 4, 5, 1, 16, False)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    (dq,) = torch.autograd.grad(gated_attention(*leaves, gate).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dq.sum().backward()


BAD_INPUTS = {
    "dtype": {"q": lambda t: t.double()},
    "mixed_dtype": {"v": lambda t: t.half()},
    "head_dim": {n: lambda t: t[..., :8] for n in NAMES},
    "rank": {"q": lambda t: t[0]},
    "heads": {"k_prompt": lambda t: t[:, :1]},
    "tokens": {"v": lambda t: t[:, :2]},
    "batch": {n: lambda t: t.expand(2, -1, -1, -1) for n in NAMES[3:]},
    "prompts": {n: lambda t: t.repeat(60, 1, 1) for n in NAMES[3:]},
    "gate_words": {"gate": lambda t: t.repeat(1, 1, 2)},
    "gate_dtype": {"gate": lambda t: t.long()},
    "scale": {"scale": lambda _: float("nan")},
    "normalize": {"normalize_over": lambda _: "some"},
}


@pytest.mark.parametrize("changes", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_what_would_read_past_a_tensor_is_not_launched(changes):
    tensors, gate = make_inputs(1, 3, 4, 5, 2, 16, False)
    arguments = {**dict(zip(NAMES, tensors, strict=True)), "gate": gate, "scale": None}
    arguments["normalize_over"] = "all"
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(AssertionError):
        gated_attention(**arguments)


def test_refuses_a_device_without_kernels(monkeypatch):
    monkeypatch.setattr("tcpa.kernels.host.interpreting", lambda: False)
    tensors, gate = make_inputs(1, 3, 4, 5, 2, 16, False)
    with pytest.raises(RuntimeError, match=r"'cpu'.*TRITON_INTERPRET=1.*impl='reference'"):
        gated_attention(*(t.cpu() for t in tensors), gate.cpu())


def test_unknown_hardware_gets_the_default_launch_and_one_log_line(caplog):
    launch.choose_launch.cache_clear()
    launch._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="tcpa.kernels"):
        for bucket in ("d64", "d128"):
            chosen = launch.choose_launch(
                "gated_attention_fwd", architecture="sm_77", dtype=torch.float16, bucket=bucket
            )
            assert chosen.blocks["BLOCK_N"] > 0 and chosen.max_registers is None
    assert [record.message for record in caplog.records] == [
        "no launch table for sm_77: using the default launches"
    ]
    with pytest.raises(LookupError, match="no row for 'dance'"):
        launch.choose_launch("dance", architecture="sm_90", dtype=torch.float16, bucket="d64")


gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")]


class TestOnGpu:
    """What only real hardware shows."""

    pytestmark = gpu

    @pytest.mark.parametrize("normalize_over", ["all", "visible"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
    @pytest.mark.parametrize("tokens", [197, 261, 577])
    def test_accuracy(self, tokens, per_sample, dtype, normalize_over):
        tensors, gate = make_inputs(4, tokens, tokens, 36, 6, 64, per_sample, dtype)
        strict = dtype != torch.float32
        check_against_reference(tensors, gate, strict=strict, normalize_over=normalize_over)

    def test_a_hundred_repeats_are_bitwise_identical(self):
        tensors, gate = make_inputs(16, 197, 197, 36, 12, 64, False, torch.bfloat16)
        out, grad, grads = run(gated_attention, tensors, gate)
        for _ in range(100):
            again, _, grads_again = run(gated_attention, tensors, gate, grad)
            assert torch.equal(out, again)
            assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))

    def test_views_beyond_2_to_the_31_elements(self):
        batch = 2**31 // (197 * 3 * 12 * 64) + 2
        if torch.cuda.mem_get_info()[0] < 40e9:
            pytest.skip("needs 40 GB of free memory")
        qkv = torch.randn(batch, 197, 3, 12, 64, device=DEVICE, dtype=torch.bfloat16)
        (_, _, _, kp, vp), gate = make_inputs(1, 197, 197, 36, 12, 64, False, torch.bfloat16)
        leaves = [t.requires_grad_() for t in qkv.unbind(2)]
        out = gated_attention(*leaves, kp, vp, gate)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        last = [t.detach()[-1:] for t in leaves]
        expected, _, expected_grads = run(
            gated_attention, [*last, kp, vp], gate, torch.ones_like(out[-1:])
        )
        assert torch.equal(out[-1:], expected)
        for mine, truth in zip(grads, expected_grads, strict=False):
            assert torch.equal(mine[-1:], truth)

    @pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
    @pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
    def test_compute_sanitizer_finds_nothing(self, tool):
        program = [sys.executable, str(Path(sanitize_kernels.__file__))]
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
