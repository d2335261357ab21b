"""Promise: `gated_attention` equals its reference in every implementation that runs here.

An error is compared with the error of the reference at the same precision, both against float64.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tcpa import choose_impl, gated_attention, gated_attention_reference, pack_gate

NAMES = ("q", "k", "v", "k_prompt", "v_prompt")
SHAPES = {
    "vit": (2, 197, 197, 2, 64, 36),
    "one-token": (16, 1, 1, 4, 16, 3),
    "cls-row": (2, 1, 197, 2, 64, 36),
    "one-prompt": (3, 17, 17, 1, 16, 1),
    "full-word": (1, 65, 65, 2, 32, 32),
    "three-words": (2, 15, 15, 3, 80, 70),
}
"""B, Lq, L, H, D, P; the head dim 80 is ViT-H's."""


def make_inputs(shape, shared=True, dtype=torch.float32):
    """Low precision first, so that every precision sees the same numbers."""
    batch, queries, tokens, heads, dim, prompts = shape
    qkv = torch.randn(batch, tokens, 3, heads, dim).to(dtype)
    q, k, v = qkv.unbind(2)
    size = (prompts, heads, dim) if shared else (batch, prompts, heads, dim)
    k_prompt, v_prompt = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    gate = pack_gate(torch.rand(batch, queries, prompts) < 0.4)
    return [q[:, :queries], k, v, k_prompt, v_prompt], gate


def run(attend, tensors, gate, **options):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = attend(*leaves, gate, **options)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    grads = torch.autograd.grad((out.double() * upstream).sum(), leaves)
    return dict(zip(("out", *NAMES), (out, *grads), strict=True))


def errors_of(result: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative root-mean-square error of the output and of each gradient."""
    return {
        name: float(((result[name].double() - truth).norm() / truth.norm()).detach())
        for name, truth in exact.items()
        if truth.numel()
    }


@pytest.mark.parametrize("normalize_over", ["all", "visible"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["sdpa", "dense"])
def test_compositions_are_as_accurate_as_the_reference(impl, shape, shared, normalize_over, dtype):
    tensors, gate = make_inputs(shape, shared, dtype)
    options = {"normalize_over": normalize_over}
    exact = run(gated_attention_reference, [t.double() for t in tensors], gate, **options)
    plain = errors_of(run(gated_attention_reference, tensors, gate, **options), exact)
    ours = errors_of(run(gated_attention, tensors, gate, impl=impl, **options), exact)
    # The floor: PyTorch's fused CPU kernel has a fast exponential, good to a few units.
    rounding = 4 * torch.finfo(dtype).eps
    for name, error in ours.items():
        assert error <= 2 * plain[name] + 2 * rounding, (name, error, plain[name])


@pytest.mark.parametrize("impl", ["sdpa", "dense"])
@pytest.mark.parametrize("normalize_over", ["all", "visible"])
def test_compositions_equal_the_reference_in_float64(normalize_over, impl):
    tensors, gate = make_inputs(SHAPES["vit"])
    tensors = [t.double() for t in tensors]
    options = {"normalize_over": normalize_over}
    exact = run(gated_attention_reference, tensors, gate, **options)
    ours = errors_of(run(gated_attention, tensors, gate, impl=impl, **options), exact)
    assert max(ours.values()) < 1e-13, ours


@pytest.mark.parametrize("impl", ["reference", "sdpa", "dense"])
@pytest.mark.parametrize("gate", ["none", "all-bits", "no-prompts"])
def test_an_open_gate_is_plain_attention_over_all_keys(impl, gate):
    tensors, _ = make_inputs(SHAPES["vit"])
    q, k, v, k_prompt, v_prompt = (t.double() for t in tensors)
    if gate == "no-prompts":
        k_prompt, v_prompt = k_prompt[:0], v_prompt[:0]
    keys = torch.cat((k, k_prompt.expand(2, -1, -1, -1)), 1).transpose(1, 2)
    values = torch.cat((v, v_prompt.expand(2, -1, -1, -1)), 1).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)
    words = None
    if gate != "none":
        words = pack_gate(torch.ones(1, 197, len(k_prompt), dtype=torch.bool))
    got = gated_attention(q, k, v, k_prompt, v_prompt, words, impl=impl)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "dense"])
def test_the_gate_acts_linearly(impl):
    tensors, _ = make_inputs(SHAPES["full-word"])
    tensors = [t.double() for t in tensors]
    a, b = torch.rand(2, 1, 65, 32) < 0.5

    def out(visible):
        return gated_attention(*tensors, pack_gate(visible), impl=impl)

    torch.testing.assert_close(out(a | b) + out(a & b), out(a) + out(b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "dense"])
def test_permuted_samples_heads_and_prompts_permute_the_result(impl):
    tensors, _ = make_inputs((3, 9, 9, 4, 16, 7))
    q, k, v, k_prompt, v_prompt = (t.double() for t in tensors)
    visible = torch.rand(3, 9, 7) < 0.5
    out = gated_attention(q, k, v, k_prompt, v_prompt, pack_gate(visible), impl=impl)
    b, h, p = torch.randperm(3), torch.randperm(4), torch.randperm(7)
    shuffled = [t[b][:, :, h] for t in (q, k, v)] + [t[p][:, h] for t in (k_prompt, v_prompt)]
    got = gated_attention(*shuffled, pack_gate(visible[b][..., p]), impl=impl)
    torch.testing.assert_close(got, out[b][:, :, h], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "dense"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_sample_does_not_reach_another(impl, poison):
    tensors, gate = make_inputs((3, 9, 9, 2, 16, 5), shared=False)
    clean = gated_attention(*tensors, gate, impl=impl)
    for tensor in tensors[:3]:
        tensor[1] = poison
    out = gated_attention(*tensors, gate, impl=impl)
    assert torch.equal(out[[0, 2]], clean[[0, 2]]) and not out[1].isfinite().any()


@pytest.mark.parametrize("impl", ["reference", "sdpa", "dense"])
def test_strided_inputs_and_upstream_gradients(impl):
    tensors, gate = make_inputs((2, 9, 9, 2, 16, 5))
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = gated_attention(*leaves, gate, impl=impl)
    (expected,) = torch.autograd.grad(out.sum(), leaves[0], retain_graph=True)
    (expanded,) = torch.autograd.grad(out, leaves[0], torch.ones(()).expand_as(out), True)
    torch.testing.assert_close(expanded, expected)
    # Last dimension not contiguous.
    odd = [t.detach().mT.contiguous().mT for t in leaves]
    assert odd[0].stride(-1) != 1
    torch.testing.assert_close(gated_attention(*odd, gate, impl=impl), out)


@pytest.mark.parametrize("impl", ["sdpa", "dense"])
@pytest.mark.parametrize("needed", range(5))
def test_only_what_needs_a_gradient_gets_one(needed, impl):
    tensors, gate = make_inputs((2, 9, 9, 2, 16, 5))
    tensors[needed].requires_grad_()
    out = gated_attention(*tensors, gate, impl=impl)
    # Not the plain sum: the probabilities of a row have no gradient to its total.
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, tensors[needed], upstream)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    full = gated_attention(*leaves, gate, impl=impl)
    torch.testing.assert_close(grad, torch.autograd.grad(full, leaves[needed], upstream)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    tensors, gate = make_inputs((2, 9, 9, 2, 16, 5))
    with torch.autocast("cpu", dtype):
        out = gated_attention(*tensors, gate)
    assert out.dtype == dtype
    expected = gated_attention(*(t.to(dtype) for t in tensors), gate)
    assert torch.equal(out, expected)


def test_auto_takes_what_can_run_and_says_why():
    assert choose_impl("auto", torch.device("cpu"))[0] == "sdpa"
    name, reason = choose_impl("auto", torch.device("meta"))
    assert name == "reference" and "meta" in reason
    for dtype, tokens, expected in (
        (torch.bfloat16, 197, "dense"),
        (torch.bfloat16, 577, "sdpa"),
        (torch.float32, 65, "sdpa"),
    ):
        name, reason = choose_impl("auto", torch.device("cpu"), dtype=dtype, num_tokens=tokens)
        assert name == expected and "Triton" in reason


def test_an_explicit_impl_is_never_replaced():
    tensors, gate = make_inputs((2, 9, 9, 2, 16, 5))
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: tensors are on 'meta'"):
        gated_attention(*(t.to("meta") for t in tensors), gate.to("meta"), impl="triton")
    with pytest.raises(RuntimeError, match="impl='sdpa' cannot run: tensors are on 'meta'"):
        gated_attention(*(t.to("meta") for t in tensors), gate.to("meta"), impl="sdpa")
    with pytest.raises(ValueError, match=r"impl: got 'tritn'.*did you mean 'triton'"):
        gated_attention(*tensors, gate, impl="tritn")


BAD = {
    "not-a-tensor": (0, lambda t: t.numpy(), TypeError, r"q: got ndarray.*torch\.as_tensor"),
    "no-channels": (0, lambda t: t[..., :0], ValueError, r"q: got shape .*D >= 1"),
    "sparse": (1, lambda t: t.to_sparse(), ValueError, r"k: got torch\.sparse_coo.*dense"),
    "list": (4, lambda t: [1.0], TypeError, r"v_prompt: got list, expected a torch\.Tensor"),
    "rank": (1, lambda t: t[0], ValueError, r"k: got shape \[9, 2, 16\], expected \[B, L, H, D\]"),
    "integers": (0, lambda t: t.int(), TypeError, r"q: got torch\.int32, expected float16"),
    "dtype": (
        2,
        lambda t: t.double(),
        ValueError,
        r"v: got torch\.float64.*torch\.float32.*autocast",
    ),
    "device": (1, lambda t: t.to("meta"), ValueError, r"k: got device meta, expected cpu; move k"),
    "heads": (3, lambda t: t[:, :1], ValueError, r"k_prompt: got shape \[5, 1, 16\].*\[5, 2, 16\]"),
    "head-dim": (2, lambda t: t[..., :8], ValueError, r"v: got shape .*expected \[2, 9, 2, 16\]"),
    "prompts": (4, lambda t: t[:3], ValueError, r"v_prompt: got shape \[3, 2, 16\].*\[5, 2, 16\]"),
}


@pytest.mark.parametrize(("index", "change", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_tensors_are_refused_by_name(index, change, kind, message):
    tensors, gate = make_inputs((2, 9, 9, 2, 16, 5))
    tensors[index] = change(tensors[index])
    with pytest.raises(kind, match=message):
        gated_attention(*tensors, gate)
    if kind is TypeError:
        # Autocast converts precision, not other things into tensors.
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(kind, match=message):
            gated_attention(*tensors, gate)


def test_bad_gates_and_options_are_refused_by_name():
    tensors, gate = make_inputs((2, 9, 9, 2, 16, 5))
    with pytest.raises(ValueError, match=r"gate: got shape \[2, 9, 2\], expected \[2, 9, 1\]"):
        gated_attention(*tensors, gate.repeat(1, 1, 2))
    with pytest.raises(TypeError, match=r"gate: got torch\.bool, expected int32.*pack_gate"):
        gated_attention(*tensors, gate.bool())
    with pytest.raises(TypeError, match=r"gate: got list, expected int32.*pack_gate"):
        gated_attention(*tensors, [1])
    with pytest.raises(ValueError, match="gate: got a tensor without axes"):
        gated_attention(*tensors, torch.tensor(1).int())
    with pytest.raises(ValueError, match=r"normalize_over: got 'al', expected 'all' or 'visible'"):
        gated_attention(*tensors, gate, normalize_over="al")
    with pytest.raises(ValueError, match=r"scale: got -1\.0, expected a finite number >= 0"):
        gated_attention(*tensors, gate, scale=-1.0)


@pytest.mark.parametrize("normalize_over", ["all", "visible"])
@pytest.mark.parametrize(("queries", "tokens"), [(5, 0), (0, 5)])
def test_no_token_or_no_query(queries, tokens, normalize_over):
    q, k = torch.randn(2, queries, 2, 16), torch.randn(2, tokens, 2, 16)
    prompts = torch.randn(6, 2, 16)
    gate = pack_gate(torch.ones(2, queries, 6, dtype=torch.bool))
    inputs = (q, k, k, prompts, prompts, gate)
    expected = gated_attention_reference(*inputs, normalize_over=normalize_over)
    for impl in ("auto", "sdpa"):
        found = gated_attention(*inputs, normalize_over=normalize_over, impl=impl)
        torch.testing.assert_close(found, expected)
