"""Promise: who takes part in the race computes the operation, values and all gradients."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tcpa import pack_gate, unpack_gate
from tcpa.bench.harness.case import Shape
from tcpa.bench.harness.check import WrongResultError, compare
from tcpa.bench.harness.provider import Prepared
from tcpa.bench.providers import attention_case, compositions
from tcpa.bench.providers import matching as match_providers
from tcpa.bench.providers.attention import PROVIDERS
from tcpa.bench.providers.attention_case import AttentionCase
from tcpa.bench.providers.compositions import (
    CPU_FLASH,
    CUDA_FLASH,
    CUDNN,
    lse_merge,
    merged_statistics,
)
from tcpa.bench.providers.matching import NORM_PROVIDERS, MatchCase
from tcpa.kernels import launch

CPU = torch.device("cpu")
# 9 patches and a class token; an odd number of prompts.
SHARED, OWN = Shape("ti16", 48, 5, 2), Shape("ti16", 48, 5, 2, per_sample=True)
SHAPES = {
    "shared": SHARED,
    "per-sample": OWN,
    "registers": Shape("dinov2_s14", 44, 7, 1),
    "one-prompt": Shape("ti16", 48, 1, 2),
    "two-words": Shape("ti16", 48, 35, 1),
    "no-prompts": Shape("ti16", 48, 0, 2),
}
GATES = {"closed": torch.zeros, "open": torch.ones, "random": None}


def is_compiled(provider):
    return "compiled" in provider.label or "flex" in provider.label


def attend(shape, dtype, provider, training=True, gate=None):
    """Hold one provider against the reference."""
    case = AttentionCase(shape, dtype, CPU, gate=gate)
    case.check(provider, provider.prepare(case, training).results(training), training)


def able(shape, dtype):
    """Return the attention providers that need neither a compiler nor the kernels."""
    fits = (p for p in PROVIDERS if p.unavailable(shape, dtype, CPU, "both") is None)
    return [p for p in fits if not is_compiled(p) and "triton" not in p.name]


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_attention_provider_equals_the_reference(shape, dtype):
    tried = able(shape, dtype)
    assert len(tried) >= (7 if shape.prompts else 5)
    for provider in tried:
        for training in (True, False):
            attend(shape, dtype, provider, training)


@pytest.mark.parametrize("shape", [SHARED, OWN], ids=["shared", "per-sample"])
@pytest.mark.parametrize("gate", ["closed", "open"])
def test_every_attention_provider_takes_every_gate(gate, shape):
    visible = GATES[gate](shape.batch, shape.tokens, shape.prompts, dtype=torch.bool)
    tried = able(shape, "fp64")
    assert len(tried) >= 7
    for provider in tried:
        attend(shape, "fp64", provider, gate=pack_gate(visible))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "label", [p.label for p in PROVIDERS if is_compiled(p) and "cpu" in p.devices]
)
def test_compiled_attention_providers_equal_the_reference(label):
    provider = next(p for p in PROVIDERS if p.label == label)
    training = provider.unavailable(OWN, "fp32", CPU, "both") is None
    attend(OWN, "fp32", provider, training)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shape", [SHARED, OWN], ids=["shared", "per-sample"])
def test_on_a_gpu_every_provider_that_runs_equals_the_reference(shape):
    device, ran = torch.device("cuda"), set()
    case = AttentionCase(shape, "bf16", device)
    for provider in PROVIDERS:
        if provider.unavailable(shape, "bf16", device, "both") is None:
            try:
                found = provider.prepare(case, True).results(True)
            except RuntimeError as error:
                # A back end may refuse a device or a size; what it computes has to be right.
                print(provider.label, error)
            else:
                case.check(provider, found, True)
                ran.add(provider.name)
    assert ran == {p.name for p in PROVIDERS} - {"tcpa sdpa"}


@pytest.mark.skipif(not launch.interpreting(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["tcpa triton", "tcpa triton, no gate"])
def test_the_kernels_take_part_in_the_interpreter_and_are_not_timed_there(name, dtype):
    provider = next(p for p in PROVIDERS if p.name == name)
    reason = provider.unavailable(OWN, dtype, CPU, "forward")
    assert reason is not None and "interpreter" in reason
    attend(OWN, dtype, provider)


@pytest.mark.parametrize("shape", [SHARED, OWN], ids=["shared", "per-sample"])
def test_the_lse_merge_is_exact_where_the_lse_has_a_gradient(shape):
    """FlexAttention returns such a one on a GPU only; here plain algebra stands in for it."""

    def attention_with_lse(q, k, v, scale):
        scores = (q @ k.mT) * scale
        return torch.softmax(scores, -1) @ v, scores.logsumexp(-1)

    case = AttentionCase(shape, "fp64", CPU)
    merge = functools.partial(lse_merge, attention_with_lse, case.visible, case.scale)
    prepared = attention_case.prepared(case, True, merge)
    provider = next(p for p in PROVIDERS if p.name.startswith("composition A"))
    case.check(provider, prepared.results(True), True)


@pytest.mark.parametrize("pair", [CUDA_FLASH, CUDNN], ids=["flash", "cudnn"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
def test_composition_d_calls_the_kernels_of_a_gpu_as_their_schemas_say(pair, shared):
    """Without a GPU: PyTorch checks arguments and shapes and computes nothing."""
    context: Any = SimpleNamespace()
    with FakeTensorMode():
        make = functools.partial(torch.zeros, dtype=torch.bfloat16, device="cuda")
        q, k, v = (make(2, 7, 3, 3, 16)[:, :, i].transpose(1, 2) for i in range(3))
        prompts = make(*(() if shared else (2,)), 3, 5, 16)
        visible = torch.ones(2, 1, 7, 5, dtype=torch.bool, device="cuda")
        # The engine of autograd asks for the device itself; its two halves do not.
        merged: Any = merged_statistics(pair, visible, 0.25)
        function, tensors = merged.__self__, (q, k, v, prompts, prompts.clone())
        context.save_for_backward = lambda *saved: setattr(context, "saved_tensors", saved)
        out = function.forward(context, *tensors)
        assert out.shape == (2, 3, 7, 16) and out.dtype == torch.bfloat16
        grads = function.backward(context, torch.zeros_like(out))
        assert [g.shape for g in grads] == [t.shape for t in tensors]
        assert {g.dtype for g in grads} == {torch.bfloat16}


def test_the_arguments_of_stock_attention_are_those_that_are_passed():
    """Names and order, as composition D passes them."""
    aten = torch.ops.aten
    expected = {
        aten._scaled_dot_product_flash_attention: "query key value dropout_p is_causal "
        "return_debug_mask scale",
        aten._scaled_dot_product_flash_attention_backward: "grad_out query key value out logsumexp "
        "cum_seq_q cum_seq_k max_q max_k dropout_p is_causal philox_seed philox_offset scale",
        aten._scaled_dot_product_cudnn_attention: "query key value attn_bias compute_log_sumexp "
        "dropout_p is_causal return_debug_mask scale",
        aten._scaled_dot_product_cudnn_attention_backward: "grad_out query key value out logsumexp "
        "philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
        "scale",
    }
    for operation, names in expected.items():
        assert [a.name for a in operation.default._schema.arguments] == names.split()


def test_composition_d_needs_the_merged_statistics():
    """With the statistics of the tokens alone the gradients are wrong, and that is seen."""
    case = AttentionCase(SHARED, "fp64", CPU)

    def own_statistics(tensors, state, scale):
        out, lse, _ = CPU_FLASH.forward(*tensors[1:4], scale)
        return CPU_FLASH.backward((*tensors[:4], out, lse), state, scale)

    wrong = CPU_FLASH._replace(backward=own_statistics)
    prepared = compositions.prepare_merged_statistics(wrong, lambda f: f, case, True)
    provider = next(p for p in PROVIDERS if p.name.startswith("composition D"))
    with pytest.raises(WrongResultError, match=r"^q: largest error .*, allowed"):
        case.check(provider, prepared.results(True), True)


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("norm", [False, True], ids=["match_prompts", "norm_match"])
@pytest.mark.parametrize("key", ["shared", "registers", "one-prompt", "two-words"])
def test_every_matching_provider_equals_the_reference(key, norm, dtype):
    case = MatchCase(norm, SHAPES[key], dtype, CPU)
    for provider in NORM_PROVIDERS:
        if is_compiled(provider) or (provider.role == "floor" and not norm):
            continue
        # Triton's interpreter computes no bfloat16, the kernels no float64.
        can = launch.interpreting() and dtype in ("fp32", "fp16")
        if provider.name == "tcpa triton" and not can:
            continue
        for training in (True, False):
            case.check(provider, provider.prepare(case, training).results(training), training)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_compiled_official_matching_equals_the_reference():
    case = MatchCase(True, SHARED, "fp32", CPU)
    provider = next(p for p in NORM_PROVIDERS if is_compiled(p))
    case.check(provider, provider.prepare(case, True).results(True), True)


def test_the_official_matching_hands_over_the_mask_of_the_official_attention():
    case = MatchCase(False, SHARED, "fp32", CPU)
    distance, mask = NORM_PROVIDERS[0].prepare(case, False).forward()
    assert distance.shape == () and mask.dtype == torch.float32
    assert mask.shape == (2, SHARED.vit.heads, SHARED.tokens, SHARED.tokens + 5)
    assert set(mask.unique().tolist()) == {0.0, 1.0} and bool(mask[..., : SHARED.tokens].all())


def selection(change):
    """Return the gate of the reference with a change to its rows [B, L, P]."""
    shape = Shape("ti16", 48, 24, 1)
    case = MatchCase(False, shape, "fp32", CPU)
    provider = next(p for p in NORM_PROVIDERS if p.name == "tcpa reference")
    gate = provider.prepare(case, False).results(False)["gate"]
    visible = unpack_gate(gate, shape.prompts)
    change(visible)
    return case, pack_gate(visible)


def swap_one(visible):
    """Let the last token see the prompts that it does not see, as many as before."""
    row = visible[0, -1, 12:]
    seen, hidden = row.nonzero()[0], (~row).nonzero()[0]
    row[seen], row[hidden] = False, True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda visible: visible[0, -1].fill_(False), "does not see 10 prompts of its pool"),
        (lambda visible: visible[0, 0, 12:].fill_(True), "prompts of the other pool"),
        (swap_one, "not among its nearest"),
    ],
    ids=["too-few", "other-pool", "not-nearest"],
)
def test_a_wrong_selection_is_seen(change, message):
    case, gate = selection(change)
    with pytest.raises(WrongResultError, match=message):
        case.check_selection(gate)
    case.check_selection(selection(lambda visible: None)[1])


def test_wrong_results_are_seen():
    truth = {"out": torch.ones(4, dtype=torch.float64), "q": torch.ones(2, dtype=torch.float64)}
    plain = {name: t.float() for name, t in truth.items()}
    compare(plain, truth, plain)
    with pytest.raises(WrongResultError, match=r"^q: got nothing, expected \[2\]"):
        compare({"out": plain["out"]}, truth, plain)
    with pytest.raises(WrongResultError, match=r"^q: got \[1\], expected \[2\]"):
        compare(plain | {"q": torch.ones(1)}, truth, plain)
    with pytest.raises(WrongResultError, match=r"^q: largest error nan, allowed"):
        compare(plain | {"q": torch.tensor([1.0, float("nan")])}, truth, plain)
    with pytest.raises(WrongResultError, match=r"^out: largest error 1\.0e-05, allowed 1\.9e-06"):
        compare(plain | {"out": plain["out"] * 1.00001}, truth, plain)
    # A rival may err as plain PyTorch does.
    compare(plain | {"out": plain["out"] * 1.00001}, truth, plain | {"out": plain["out"] * 1.00001})


def test_the_verdict_is_on_gradients_too():
    case = AttentionCase(SHARED, "fp64", CPU)
    provider = next(p for p in PROVIDERS if p.name == "tcpa reference")
    prepared = provider.prepare(case, True)

    def halved(outputs, grads):
        found = case.read(outputs, grads)
        return found | {"v_prompt": found["v_prompt"] / 2}

    wrong = dataclasses.replace(prepared, read=halved)
    assert isinstance(wrong, Prepared)
    with pytest.raises(WrongResultError, match=r"^v_prompt: "):
        case.check(provider, wrong.results(True), True)
    # An ungated provider is held against the ungated reference, and only that.
    floor = next(p for p in PROVIDERS if p.name == "sdpa, no gate")
    with pytest.raises(WrongResultError, match=r"^out: "):
        case.check(floor, prepared.results(True), True)


def test_reasons_are_given():
    named = {provider.label: provider for provider in PROVIDERS}
    flex, merge = named["composition C, duplicated keys [flex]"], named["tcpa sdpa"]
    assert flex.unavailable(SHARED, "fp32", CPU, "forward") is None
    for mode in ("backward", "both"):
        assert "no backward on the CPU" in str(flex.unavailable(SHARED, "fp32", CPU, mode))
    assert "without prompts" in str(flex.unavailable(SHAPES["no-prompts"], "fp32", CPU, "both"))
    assert "computes in bf16 or fp16" in str(
        named["composition D, merged statistics [cudnn]"].unavailable(
            SHARED, "fp32", torch.device("cuda"), "both"
        )
    )
    assert "not on the CPU" in str(merge.unavailable(SHARED, "bf16", torch.device("cuda"), "both"))
    assert "runs on cuda" in str(
        named["composition A, LSE merge [flex]"].unavailable(SHARED, "fp32", CPU, "both")
    )


def test_labels_tell_providers_apart():
    for providers in (PROVIDERS, NORM_PROVIDERS, match_providers.MATCH_PROVIDERS):
        labels = [provider.label for provider in providers]
        assert len(set(labels)) == len(labels) and labels[0] == "official"
