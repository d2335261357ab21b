"""Promise: `impl` chooses what computes, and the model is the same function through the kernels.

Here the kernels run in Triton's interpreter, on a GPU where there is one.
"""

import subprocess
import sys

import pytest
import sanitize_kernels
import torch
import torch.nn.functional as F
from models import ARCHITECTURES
from timm.models.vision_transformer import VisionTransformer

from tcpa import (
    TCPAConfig,
    VPTConfig,
    choose_impl,
    gated_attention,
    gated_attention_reference,
    kernels,
    match_prompts,
    match_prompts_reference,
    norm_match,
    pack_gate,
    wrap,
)
from tcpa.kernels import launch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TINY = ARCHITECTURES["vit-tiny"]
SIZES = {"cls_pool_size": 5, "image_pool_size": 7, "cls_top_k": 2, "image_top_k": 3}
TCPA = TCPAConfig(**SIZES, random_selection_epochs=0, prompt_dropout=0.0)
METHODS = {
    "tcpa": TCPA,
    "tcpa-visible-per-sample": TCPA.replace(
        prompt_dropout=0.1, normalize_over="visible", value_affine=True, token_noise=0.01
    ),
    "random-selection": TCPA.replace(random_selection_epochs=10),
    "role": TCPA.replace(coordination="role"),
    "vpt-deep": VPTConfig(length=4),
}
needs_kernels = pytest.mark.skipif(
    not GPU and not launch.interpreting(), reason="needs a GPU or TRITON_INTERPRET=1"
)


def make_model(key="vit-tiny", method="tcpa", impl="triton", dtype=torch.float32):
    """Return a model with the same weights and prompts whatever `impl` is."""
    backbone = ARCHITECTURES[key].create(dtype)
    torch.manual_seed(3)
    return wrap(backbone, METHODS[method], impl=impl).to(DEVICE)


def step(model, images, seed=4):
    """Return logits, distance and the gradients of one training step."""
    torch.manual_seed(seed)
    logits, distance = model(images.to(DEVICE), return_distance=True)
    labels = torch.arange(len(images), device=DEVICE) % 5
    loss = F.cross_entropy(logits.float(), labels) + 0.3 * distance
    parameters = model.trainable_named_parameters()
    grads = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
    return logits.detach(), distance.detach(), dict(zip(parameters, grads, strict=True))


def both(method="tcpa", key="vit-tiny", images=None):
    """Return the steps through the kernels and the reference."""
    images = ARCHITECTURES[key].images(1) if images is None else images
    return [step(make_model(key, method, impl), images) for impl in ("triton", "reference")]


def assert_same_step(got, expected, tolerance):
    for mine, truth in zip(got[:2], expected[:2], strict=True):
        assert (mine - truth).norm() <= tolerance * truth.norm().clamp_min(1e-3)
    for name, truth in expected[2].items():
        assert (got[2][name] is None) == (truth is None), name
        if truth is not None and truth.numel():
            error = (got[2][name] - truth).norm() / truth.norm().clamp_min(1e-5)
            assert error <= tolerance, f"{name}: {error:.1e}"


@needs_kernels
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_through_the_kernels(method):
    assert_same_step(*both(method, images=TINY.images()), 2e-5)


@needs_kernels
@pytest.mark.parametrize("key", ["deit-distilled", "dinov2-registers", "gap-without-cls", "dinov3"])
def test_architectures_run_through_the_kernels(key):
    assert_same_step(*both(key=key), 2e-5)


@needs_kernels
def test_evaluation_and_checkpointing_run_through_the_kernels():
    images = TINY.images().to(DEVICE)
    model, expected = (make_model(impl=impl) for impl in ("triton", "reference"))
    plain = step(model, images)
    model.set_grad_checkpointing()
    assert_same_step(step(model, images), plain, 0)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), expected.eval()(images))
    for mine, truth in zip(model.selection(images), expected.selection(images), strict=True):
        assert torch.equal(mine, truth)


@needs_kernels
def test_the_kernels_are_what_runs(monkeypatch):
    called = []

    def spy(name):
        function = getattr(kernels, name)

        def wrapper(*arguments, **options):
            called.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(kernels, name, wrapper)

    for name in ("norm_match", "match_prompts", "gated_attention"):
        spy(name)
    step(make_model(), TINY.images(1))
    assert called == ["norm_match", "gated_attention"] * 2
    called.clear()
    # Noise comes between matching and norm: they cannot share a read.
    noisy = TCPA.replace(token_noise=0.1)
    step(wrap(TINY.create(), noisy, impl="triton").to(DEVICE), TINY.images(1))
    assert called == ["match_prompts", "gated_attention"] * 2


@needs_kernels
def test_fifty_steps_give_the_loss_curve_of_the_reference():
    curves = {}
    for impl in ("triton", "reference"):
        torch.manual_seed(1)
        vit = VisionTransformer(32, 16, embed_dim=32, depth=1, num_heads=1, num_classes=2)
        model = wrap(vit, METHODS["tcpa"], impl=impl).to(DEVICE)
        optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.02)
        images, labels = torch.randn(2, 3, 32, 32).to(DEVICE), torch.arange(2, device=DEVICE)
        losses = []
        for _ in range(50):
            logits, distance = model(images, return_distance=True)
            loss = F.cross_entropy(logits, labels) + 0.1 * distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves[impl] = torch.tensor(losses)
    assert curves["reference"][-1] < 0.5 * curves["reference"][0]
    torch.testing.assert_close(curves["triton"], curves["reference"], rtol=1e-3, atol=1e-3)


@needs_kernels
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model, images = make_model(), TINY.images(2)
    expected = step(model, images)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, distance = forward(images.to(DEVICE), return_distance=True)
    torch.testing.assert_close(logits, expected[0])
    torch.testing.assert_close(distance, expected[1])


@needs_kernels
def test_an_evaluation_model_exports():
    model, images = make_model().eval(), TINY.images(2).to(DEVICE)
    program = torch.export.export(model, (images,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images))
    names = {str(node.target) for node in program.graph.nodes}
    assert {"tcpa.norm_match.default", "tcpa.gated_attention.default"} <= names


@needs_kernels
def test_autocast_keeps_parameters_in_float32():
    with torch.autocast(DEVICE.type, torch.bfloat16 if GPU else torch.float16):
        got, expected = both(images=TINY.images(2))
    assert all(grad is None or grad.dtype == torch.float32 for grad in got[2].values())
    assert_same_step(got, expected, 0.05)


# Public operations.


def matching_inputs(tokens=9, width=32, pool=6, dtype=torch.float32):
    x = torch.randn(2, tokens, width, device=DEVICE, dtype=dtype)
    return x, *(torch.randn(size, width, device=DEVICE, dtype=dtype) for size in (4, pool))


TOP_K = {"cls_top_k": 2, "image_top_k": 3}


@needs_kernels
def test_public_operations_reach_the_kernels():
    x, *keys = matching_inputs()
    weight, bias = torch.randn(2, 32, device=DEVICE)
    found = [match_prompts(x, *keys, **TOP_K, impl=impl) for impl in ("triton", "reference")]
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    found = [
        norm_match(x, weight, bias, 1e-6, *keys, **TOP_K, impl=impl)
        for impl in ("triton", "reference")
    ]
    assert torch.equal(found[0][1], found[1][1])
    for index in (0, 2):
        torch.testing.assert_close(found[0][index], found[1][index], rtol=1e-5, atol=1e-6)
    q = torch.randn(2, 5, 2, 16, device=DEVICE)
    prompts = torch.randn(3, 2, 16, device=DEVICE)
    gate = pack_gate(torch.rand(2, 5, 3, device=DEVICE) < 0.5)
    found = [gated_attention(q, q, q, prompts, prompts, gate, impl=i) for i in ("triton", "auto")]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_auto_chooses_by_device_and_dtype():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert choose_impl("auto", cpu) == (
        "sdpa",
        "tensors are on 'cpu'; Triton kernels need a CUDA or ROCm device",
    )
    assert choose_impl("auto", cpu, dtype=torch.bfloat16, num_tokens=65)[0] == "dense"
    assert choose_impl("auto", meta)[0] == "reference"
    cuda = torch.device("cuda")
    assert choose_impl("auto", cuda) == ("triton", "kernels can run here")
    name, reason = choose_impl("auto", cuda, dtype=torch.float64)
    assert name == "reference" and "float32" in reason


def test_triton_on_request_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr("tcpa.kernels.host.interpreting", lambda: False)
    x, *keys = (tensor.cpu() for tensor in matching_inputs())
    reason = r"impl='triton' cannot run: tensors are on 'cpu'.*TRITON_INTERPRET=1.*impl='auto'"
    with pytest.raises(RuntimeError, match=reason):
        match_prompts(x, *keys, **TOP_K, impl="triton")
    with pytest.raises(RuntimeError, match=reason):
        wrap(TINY.create(), METHODS["tcpa"], impl="triton")(TINY.images(1))


def test_triton_on_request_without_triton_names_the_package(monkeypatch):
    monkeypatch.setattr("tcpa.kernels._missing", True)
    with pytest.raises(RuntimeError, match="triton is not installed; pip install triton"):
        choose_impl("triton", torch.device("cuda"))
    assert choose_impl("auto", torch.device("cuda"))[0] == "reference"


@needs_kernels
def test_what_the_kernels_cannot_take_is_refused_on_request():
    x, *keys = matching_inputs()
    weight = torch.ones(32, device=DEVICE, requires_grad=True)
    q = torch.randn(1, 5, 2, 8, device=DEVICE)
    many, exact = matching_inputs(pool=65), matching_inputs(dtype=torch.float64)
    for call, kind, name in (
        (lambda: match_prompts(*many, **TOP_K, impl="triton"), ValueError, "image_keys"),
        (lambda: match_prompts(*exact, **TOP_K, impl="triton"), TypeError, "x"),
        (lambda: gated_attention(q, q, q, q[0], q[0], None, impl="triton"), ValueError, "q"),
        (
            lambda: norm_match(x, weight, None, 1e-6, *keys, **TOP_K, impl="triton"),
            ValueError,
            "weight",
        ),
    ):
        with pytest.raises(kind, match=f"{name}: got"):
            call()


def test_auto_falls_back_beyond_the_sizes_of_the_kernels(monkeypatch):
    """As on a GPU: `auto` would choose the kernels, were the pool, the head dim not too large."""
    monkeypatch.setattr("tcpa.dispatch._choose", lambda *_: ("triton", "can run here"))
    x, *keys = (tensor.cpu() for tensor in matching_inputs(pool=65))
    found = match_prompts(x, *keys, **TOP_K)
    expected = match_prompts_reference(x, *keys, **TOP_K)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    q, gate = torch.randn(1, 5, 2, 8), pack_gate(torch.rand(1, 5, 5) < 0.5)
    inputs = (q, q, q, q[0], q[0], gate)
    assert torch.equal(gated_attention(*inputs), gated_attention_reference(*inputs))


def test_norm_match_is_layer_norm_and_match_prompts():
    x, *keys = matching_inputs(dtype=torch.float64)
    weight, bias = torch.randn(2, 32, dtype=torch.float64, device=DEVICE).requires_grad_()
    normed, gate, distance = norm_match(x, weight, bias, 1e-3, *keys, **TOP_K)
    assert torch.equal(normed, F.layer_norm(x, (32,), weight, bias, 1e-3))
    expected = match_prompts(x, *keys, **TOP_K)
    assert torch.equal(gate, expected[0]) and torch.equal(distance, expected[1])
    normed.sum().backward()


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", torch.ones(31)), ("bias", [0.0]), ("eps", -1.0), ("image_top_k", 7)],
)
def test_bad_arguments_of_norm_match_are_named(name, value):
    x, cls_keys, image_keys = (tensor.cpu() for tensor in matching_inputs())
    arguments = {"x": x, "weight": None, "bias": None, "eps": 1e-6, **TOP_K, name: value}
    with pytest.raises((TypeError, ValueError), match=f"{name}: got"):
        norm_match(cls_keys=cls_keys, image_keys=image_keys, **arguments)


@needs_kernels
def test_trains_inside_distributed_data_parallel(tmp_path):
    backend = "nccl" if GPU else "gloo"
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        images = TINY.images(2)
        expected = step(make_model(), images)
        model = make_model()
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        torch.manual_seed(4)
        logits, distance = parallel(images.to(DEVICE), return_distance=True)
        labels = torch.arange(2, device=DEVICE)
        (F.cross_entropy(logits, labels) + 0.3 * distance).backward()
        for name, parameter in model.trainable_named_parameters().items():
            torch.testing.assert_close(parameter.grad, expected[2][name], msg=name)
    finally:
        torch.distributed.destroy_process_group()


@needs_kernels
def test_every_kernel_runs_on_awkward_shapes():
    sanitize_kernels.main()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_choose_the_device():
    second = torch.device("cuda:1")
    x, *keys = (tensor.to(second) for tensor in matching_inputs())
    gate, distance = match_prompts(x, *keys, **TOP_K, impl="triton")
    expected = match_prompts(x, *keys, **TOP_K, impl="reference")
    assert gate.device == distance.device == second
    assert torch.equal(gate, expected[0])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_step_is_captured_in_a_cuda_graph():
    model, images = make_model(), TINY.images(2).to(DEVICE)
    labels = torch.arange(2, device=DEVICE)

    def run():
        logits, distance = model(images, return_distance=True)
        (F.cross_entropy(logits, labels) + 0.3 * distance).backward()
        return logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad()
            run()
    torch.cuda.current_stream().wait_stream(stream)
    expected = {n: p.grad.clone() for n, p in model.trainable_named_parameters().items()}
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    for name, parameter in model.trainable_named_parameters().items():
        assert torch.equal(parameter.grad, expected[name]), name


def test_everything_but_the_kernels_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch, tcpa
x, keys = torch.randn(2, 5, 8), torch.randn(3, 8)
tcpa.match_prompts(x, keys, keys, cls_top_k=1, image_top_k=1)
tcpa.norm_match(x, None, None, 1e-6, keys, keys, cls_top_k=1, image_top_k=1)
q = torch.randn(2, 5, 2, 16)
tcpa.gated_attention(q, q, q, q[0], q[0], None)
assert tcpa.choose_impl("auto", torch.device("cuda"))[0] == "reference"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
