"""`model.capture()` tells what a pass computed and changes nothing in it."""

import pytest
import torch
from models import ARCHITECTURES
from torch import Tensor, nn

import tcpa.block
from tcpa import (
    E2VPTConfig,
    GatedPromptConfig,
    Savings,
    TCPAConfig,
    VPTConfig,
    unpack_gate,
    wrap,
)

TCPA = TCPAConfig(
    cls_pool_size=4, image_pool_size=33, cls_top_k=2, image_top_k=5, random_selection_epochs=0
)
METHODS = {
    "tcpa": TCPA,
    # More than one gate word, several rows an entry, the other softmax.
    "tcpa-visible": TCPA.replace(
        image_pool_size=4, image_prompt_length=9, normalize_over="visible", image_top_k=2
    ),
    "role": TCPAConfig(cls_pool_size=2, image_pool_size=3, coordination="role"),
    "vpt-deep": VPTConfig(length=3),
    "vpt-shallow": VPTConfig(length=3, deep=False),
    "e2vpt": E2VPTConfig(),
    "gated": GatedPromptConfig(),
    "linear": None,
}
IMPLS = ("sdpa", "dense", "reference", "triton", "auto")
ARCHITECTURE = ARCHITECTURES["vit-tiny"]


def make(method: str = "tcpa", dtype: torch.dtype = torch.float32, name="vit-tiny", **options):
    architecture = ARCHITECTURES[name]
    torch.manual_seed(3)
    model = wrap(architecture.create(dtype), METHODS[method], **options).eval()
    return model, architecture.images(2, dtype)


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return logits and the gradients of all that is trained, with fixed dropout."""
    torch.manual_seed(5)
    logits, distance = model(images, return_distance=True)
    loss = logits.square().sum() + distance
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [logits, distance, *(g for g in found if g is not None)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_bit_equal(method: str, impl: str) -> None:
    model, images = make(method, impl=impl)
    if impl == "triton":
        images = images[:1]
    plain = model(images)
    with model.capture(features=True) as record:
        recorded = model(images)
    assert torch.equal(recorded, plain)
    assert len(record) == 2
    if impl != "triton":
        # The interpreter's backward takes seconds and is reached by the same calls.
        model.train()
        plain = gradients(model, images)
        with model.capture(features=True):
            recorded = gradients(model, images)
        assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


@pytest.mark.parametrize("savings", [Savings(), Savings.none()], ids=["fast", "plain"])
@pytest.mark.parametrize("method", METHODS)
def test_probabilities_are_those_of_the_pass(method: str, savings: Savings, monkeypatch) -> None:
    """With the values of the pass they give the attention output of the pass."""
    model, images = make(method, torch.float64, savings=savings)
    seen = []

    def spy(function):
        def call(q, k, v, k_prompt, v_prompt, gate, **options):
            out = function(q, k, v, k_prompt, v_prompt, gate, **options)
            shared = v_prompt.expand(len(v), *v_prompt.shape[-3:])
            seen.append((torch.cat((v, shared), dim=1), out))
            return out

        return call

    for name in ("gated_attention_unchecked", "dense_gated_attention"):
        monkeypatch.setattr(tcpa.block, name, spy(getattr(tcpa.block, name)))
    with torch.no_grad(), model.capture() as record:
        model.forward_features(images)
    assert len(seen) == len(record) == 2
    for block, (values, out) in zip(record.values(), seen, strict=True):
        assert block.attention.shape == (2, 3, record.num_tokens, values.shape[1])
        got = (block.attention @ values.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(got, out[:, : record.num_tokens], rtol=1e-12, atol=1e-12)


def test_rows_sum_to_less_than_one_only_where_prompts_are_hidden() -> None:
    for method, least in (("tcpa", False), ("tcpa-visible", True), ("vpt-deep", True)):
        model, images = make(method, torch.float64)
        with torch.no_grad(), model.capture() as record:
            model(images)
        for block in record.values():
            total = block.attention.sum(-1)
            assert bool((total - 1).abs().max() < 1e-12) == least
            assert float(total.max()) < 1 + 1e-12


def test_gates_are_those_of_the_selection() -> None:
    model, images = make()
    expected = model.selection(images)
    with torch.no_grad(), model.capture(attention=False) as record:
        model(images)
    for number, gate in enumerate(expected):
        found = record[number].gate
        assert record[number].attention is None
        assert torch.equal(found, gate)
        visible = unpack_gate(found, TCPA.num_prompts)
        assert visible[:, 0].sum(-1).eq(2).all() and visible[:, 1:].sum(-1).eq(5).all()
    for method in ("vpt-deep", "linear"):
        model, images = make(method)
        with torch.no_grad(), model.capture() as record:
            model(images)
        assert record[0].gate is None
    model, images = make("role")
    with torch.no_grad(), model.capture() as record:
        model(images)
    gate = record[1].gate
    assert gate.shape[0] == len(images)


def test_hidden_prompts_have_no_weight_and_seen_ones_have() -> None:
    model, images = make()
    with torch.no_grad(), model.capture(blocks=[0]) as record:
        model(images)
    gate, attention = record[0].gate, record[0].attention
    prompts = attention[..., record.num_tokens :]
    visible = unpack_gate(gate, TCPA.num_prompts)[:, None].expand_as(prompts)
    assert prompts[~visible].eq(0).all() and prompts[visible].gt(0).all()


def test_blocks_queries_and_what_the_last_block_computes() -> None:
    model, images = make()
    with torch.no_grad(), model.capture() as everything:
        model(images)
    last = everything[1].attention
    assert last.shape[2] == 1
    assert everything[1].queries.tolist() == [0]
    with torch.no_grad(), model.capture(blocks=[-1, -2], queries=[5, 0, 5]) as record:
        model(images)
    assert list(record) == [0, 1]
    first, full = record[0], everything[0].attention
    assert first.queries.tolist() == [0, 5]
    torch.testing.assert_close(first.attention, full[:, :, [0, 5]], rtol=1e-5, atol=1e-7)
    # The last block computes the class token alone here, and all tokens there.
    assert record[1].attention.shape[2] == 1
    with torch.no_grad(), model.capture(blocks=[-1], queries=[3]) as record:
        model(images)
        assert record[1].attention.shape[2] == 0
        model.forward_features(images)
        assert record[1].attention.shape[2] == 1


def test_tokens_before_and_after_a_block() -> None:
    for method in ("tcpa", "vpt-shallow"):
        model, images = make(method, torch.float64)
        with torch.no_grad(), model.capture(attention=False, features=True) as record:
            features = model.forward_features(images)
        first, last = record[0], record[1]
        assert torch.equal(first.outputs, last.inputs)
        assert torch.equal(model.backbone.norm(last.outputs), features)
        assert not last.outputs.requires_grad


@pytest.mark.parametrize("name", ["dinov2-registers", "gap-without-cls", "eva02", "rope-mixed"])
def test_other_architectures(name: str) -> None:
    """Registers, no class token, rotary positions."""
    model, images = make("tcpa", torch.float64, name)
    plain = model(images)
    with model.capture() as record:
        assert torch.equal(model(images), plain)
    attention = record[0].attention
    prompts = METHODS["tcpa"].num_prompts - TCPA.cls_rows * (name == "gap-without-cls")
    assert attention.shape[-1] == record.num_tokens + prompts


def test_under_autocast_and_with_recomputed_blocks() -> None:
    model, images = make()
    model.train().set_grad_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model, images)
        with model.capture() as record:
            recorded = gradients(model, images)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    attention = record[0].attention
    assert attention.dtype == torch.float32
    assert not attention.requires_grad and attention.isfinite().all()


def test_a_further_pass_replaces_the_record_and_the_end_stops_it() -> None:
    model, images = make()
    with torch.no_grad(), model.capture() as record:
        model(images)
        first = record[0].gate
        model(-images)
        second = record[0].gate
    model(images)
    assert record[0].gate is second and not torch.equal(first, second)
    with pytest.raises(ZeroDivisionError), model.capture():
        raise ZeroDivisionError
    with model.capture() as record:
        pass
    assert len(record) == 0


def test_compiled_models_stay_whole_and_refuse_to_record() -> None:
    from torch._dynamo.testing import CompileCounter

    model, images = make(impl="reference")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        expected = compiled(images)
        with model.capture():
            model(images)
        assert torch.equal(compiled(images), expected)
        assert counter.frame_count == 1
        with model.capture(), pytest.raises(Exception, match="capture: got a compiled pass"):
            compiled(images)
        assert torch.equal(compiled(images), expected)
        assert counter.frame_count == 1
        torch.compiler.reset()
        broken = torch.compile(model, backend="eager")
        with model.capture(), pytest.raises(RuntimeError, match="call the model itself"):
            broken(images)
        torch.compiler.reset()


BAD = [
    ({"blocks": [2]}, ValueError),
    ({"blocks": []}, ValueError),
    ({"blocks": 1}, TypeError),
    ({"queries": [-1]}, ValueError),
    ({"queries": ["0"]}, TypeError),
    ({"attention": 1}, TypeError),
    ({"features": None}, TypeError),
]


@pytest.mark.parametrize(("arguments", "kind"), BAD)
def test_bad_arguments_are_refused_by_name(arguments, kind) -> None:
    model, images = make()
    with pytest.raises(kind, match=f"{next(iter(arguments))}: got"), model.capture(**arguments):
        pass
    # The next one works.
    with model.capture() as record:
        model(images)
    assert len(record) == 2


def test_what_only_the_pass_can_tell() -> None:
    model, images = make()
    with model.capture(queries=[17]), pytest.raises(ValueError, match="queries: got 17"):
        model(images)
    with model.capture(), pytest.raises(RuntimeError, match="got a second one"), model.capture():
        pass
