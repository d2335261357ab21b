"""Promise: a step is the official one - schedule, mixing, loss, AdamW - and waits for nothing."""

import contextlib
import copy
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch.utils._python_dispatch import TorchDispatchMode
from train_runs import CLASSES, SIZE, MemoryBatch, make_config, make_splits

import tcpa
from tcpa.cli import UsageError
from tcpa.train.engine import step as step_module
from tcpa.train.engine.distributed import World
from tcpa.train.engine.model import build_model
from tcpa.train.engine.precision import NUMERICS, choose_numerics, require_graph
from tcpa.train.engine.step import losses
from tcpa.train.engine.trainer import Mixer, Trainer, derive, numpy_seeded, seed_model
from tcpa.train.recipes.runspec import resolve

GOLDEN = Path(__file__).parents[1] / "golden" / "lr_schedule.npz"
CPU = World(torch.device("cpu"))


def make_trainer(tmp_path, *, total=6, world=CPU, **options):
    config = make_config(tmp_path, **options)
    settings = resolve(config)
    built = build_model(settings, world, CLASSES)
    trainer = Trainer(built.model, settings, world, built.numerics, total_steps=total)
    trainer.begin(0)
    return trainer, settings


def one_batch(number=8, device="cpu"):
    source = make_splits(number).train
    return MemoryBatch(source.images.to(device), source.labels.to(device), number)


def fresh(batch):
    return MemoryBatch(batch.images.clone(), batch.labels, batch.size)


# Learning rate.


def test_learning_rates_equal_the_golden_file(tmp_path):
    golden = np.load(GOLDEN)
    total = int(golden["steps_per_epoch"] * golden["epochs"])
    assert total == golden["lr"].size
    trainer, _ = make_trainer(tmp_path, total=total, learning_rate=float(golden["base_lr"]))
    found = np.array([trainer.learning_rate(step) for step in range(total)])
    np.testing.assert_allclose(found, golden["lr"].reshape(-1), rtol=1e-12, atol=0)


def test_a_step_uses_the_rate_of_its_number(tmp_path):
    trainer, _ = make_trainer(tmp_path, total=40)
    for step in (0, 3, 17, 39):
        trainer.step(fresh(one_batch()), 0, step, step)
        (group,) = trainer.optimizer.param_groups
        assert group["lr"] == trainer.learning_rate(step)


# The step against a plain one.


def test_steps_equal_a_plain_implementation(tmp_path):
    trainer, settings = make_trainer(tmp_path, random_selection_epochs=0, prompt_dropout=0.0)
    model = copy.deepcopy(trainer.model)
    optimizer = torch.optim.AdamW(
        model.trainable_parameters(), weight_decay=settings.weight_decay, fused=False, foreach=False
    )
    mixup = Mixup(0.8, 0.0, prob=0.5, label_smoothing=0.1, num_classes=CLASSES)
    weights = []
    for step in range(6):
        batch = one_batch()
        trainer.step(fresh(batch), 0, step, step)
        with numpy_seeded(settings.seed, 0, step):
            images, targets = mixup(batch.images.clone(), batch.labels)
        weights.append(float((targets > 0.1).sum(1).max()))
        for group in optimizer.param_groups:
            group["lr"] = trainer.learning_rate(step)
        logits, distance = model(images, return_distance=True)
        loss = -(targets * logits.log_softmax(1)).sum(1).mean() + 0.01 * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 1 in weights and 2 in weights, "some batches are mixed and some are not"
    expected = model.trainable_named_parameters()
    for name, value in trainer.model.trainable_named_parameters().items():
        moved = (value - 0).norm()
        assert (value - expected[name]).norm() <= 1e-4 * moved, name


def test_losses_are_those_of_the_step(tmp_path):
    trainer, _ = make_trainer(tmp_path, random_selection_epochs=0, prompt_dropout=0.0)
    model, batch = copy.deepcopy(trainer.model), one_batch(6)
    mixer = Mixer(resolve(make_config(tmp_path)), CLASSES)
    trainer.step(fresh(batch), 0, 0, 0)
    images, targets = mixer(batch.images.clone(), batch.labels, epoch=0, step=0)
    with torch.no_grad():
        logits, distance = model(images, return_distance=True)
    cross_entropy = F.cross_entropy(logits, targets)
    sums, count = trainer.take_losses()
    assert count == 6
    means = [value / 6 for value in sums]
    expected = [cross_entropy + 0.01 * distance, cross_entropy, distance]
    assert means == pytest.approx([value.item() for value in expected], rel=1e-5)
    assert trainer.take_losses() == ([0.0, 0.0, 0.0], 0)


def test_weight_decay_reaches_every_trained_value_and_nothing_else(tmp_path):
    trainer, settings = make_trainer(tmp_path)
    (group,) = trainer.optimizer.param_groups
    named = trainer.model.trainable_named_parameters()
    assert {id(p) for p in group["params"]} == {id(p) for p in named.values()}
    assert "backbone.head.bias" in named and group["weight_decay"] == settings.weight_decay == 0.5
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    before = {name: value.detach().clone() for name, value in named.items()}
    for step in range(3):
        trainer.step(fresh(one_batch()), 0, step, step)
    parameters = dict(trainer.model.named_parameters())
    assert len(frozen) > 50 and all(torch.equal(parameters[n], p) for n, p in frozen.items())
    assert all(not torch.equal(named[name], value) for name, value in before.items())


def test_the_official_loss_in_float32():
    logits, targets = torch.randn(5, 3).half(), torch.rand(5, 3)
    found = losses(logits, torch.tensor(2.0), targets, 0.25)
    cross_entropy = -(targets * logits.float().log_softmax(1)).sum(1).mean()
    expected = torch.stack((cross_entropy + 0.5, cross_entropy, torch.tensor(2.0)))
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32


# Mixing and random numbers.


def test_mixing_leaves_numpys_generator_alone(tmp_path):
    mixer = Mixer(resolve(make_config(tmp_path)), CLASSES)
    np.random.seed(5)
    expected = np.random.rand(3)
    np.random.seed(5)
    batch = one_batch()
    found = [mixer(batch.images.clone(), batch.labels, epoch=1, step=2)[0] for _ in range(2)]
    assert np.array_equal(np.random.rand(3), expected)
    assert torch.equal(*found)


def test_half_of_the_batches_are_mixed_by_beta_weights(tmp_path):
    settings = replace(resolve(make_config(tmp_path)), label_smoothing=0.0)
    mixer = Mixer(settings, CLASSES)
    images, labels = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    found = [
        float(mixer(images, labels, epoch=step // 50, step=step % 50)[1][0].max())
        for step in range(1000)
    ]
    mixed = [weight for weight in found if weight < 1]
    assert 0.45 < len(mixed) / 1000 < 0.55
    # Beta(0.8, 0.8) folded to [0.5, 1].
    expected = np.random.default_rng(0).beta(0.8, 0.8, 100_000)
    expected = np.maximum(expected, 1 - expected)
    assert np.mean(mixed) == pytest.approx(expected.mean(), abs=0.02)


def test_smoothing_without_mixing(tmp_path):
    settings = replace(resolve(make_config(tmp_path)), mixup_alpha=0.0)
    images, labels = torch.randn(3, 3, 2, 2), torch.tensor([0, 3, 1])
    same, targets = Mixer(settings, CLASSES)(images, labels, epoch=0, step=0)
    assert torch.equal(same, images)
    expected = torch.full((3, CLASSES), 0.025)
    expected[range(3), labels] = 0.925
    torch.testing.assert_close(targets, expected)


def test_streams_are_told_apart():
    found = [derive(*position) for position in itertools.product((1, 2), repeat=4)]
    assert len(set(found)) == len(found) and all(0 <= seed < 2**63 for seed in found)
    assert derive(3407, 2, 5, 7, 0) == derive(3407, 2, 5, 7, 0)
    draws = []
    for rank in (0, 1, 0):
        seed_model(1, 2, 3, rank)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


# Waiting.


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: values that the host reads."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.READS:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-autocast"])
@pytest.mark.parametrize("method", ["vfpt+tcpa", "vfpt", "linear"])
def test_a_step_reads_nothing_from_the_device(method, precision, tmp_path):
    trainer, _ = make_trainer(tmp_path, method=method, precision=precision)
    batch = one_batch()
    with Waits() as waits:
        for step in range(2):
            trainer.step(fresh(batch), 0, step, step)
        assert waits.found == []
        float(trainer.optimizer.param_groups[0]["params"][0].detach().sum())
    assert waits.found, "this was a wait"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-autocast", "fp16"])
def test_a_step_does_not_wait_for_the_gpu(precision, tmp_path):
    world = World(torch.device("cuda"))
    trainer, _ = make_trainer(tmp_path, world=world, precision=precision, device="cuda")
    batch = one_batch(device="cuda")
    trainer.step(fresh(batch), 0, 0, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 3):
            trainer.step(fresh(batch), 0, step, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Precisions.


def test_precisions_store_and_compute_as_they_say(tmp_path):
    expected = {
        "fp32": (torch.float32, None),
        "bf16": (torch.bfloat16, None),
        "bf16-autocast": (torch.float32, torch.bfloat16),
        "fp16": (torch.float32, torch.float16),
    }
    for name, (weights, autocast) in expected.items():
        trainer, _ = make_trainer(tmp_path, precision=name)
        named = trainer.model.trainable_named_parameters()
        assert {p.dtype for p in named.values()} == {torch.float32}
        assert trainer.model.backbone.blocks[0].mlp.fc1.weight.dtype == weights
        assert NUMERICS[name].autocast == autocast
        assert trainer.scaler.is_enabled() == (name == "fp16")
        trainer.step(fresh(one_batch()), 0, 0, 0)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in named.values())


def test_a_low_precision_starts_from_the_same_values(tmp_path):
    first, second = (make_trainer(tmp_path, precision=name)[0] for name in ("fp32", "bf16"))
    ours = second.model.trainable_named_parameters()
    for name, value in first.model.trainable_named_parameters().items():
        assert torch.equal(value, ours[name]), name


def test_loss_scaling_skips_an_overflow_and_halves_the_scale(tmp_path):
    trainer, _ = make_trainer(tmp_path, precision="fp16", weight_decay=0.0)
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 1e30})
    before = trainer.tensors()["model/backbone.head.bias"].clone()
    trainer.step(fresh(one_batch()), 0, 0, 0)
    assert torch.equal(trainer.tensors()["model/backbone.head.bias"], before)
    assert trainer.scaler.get_scale() == pytest.approx(5e29)


def test_auto_is_bf16_where_that_is_native(monkeypatch):
    from tcpa.train.engine import precision

    for native in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(precision, "fast_dtype", lambda device, native=native: native)
        name = "bf16" if native == torch.bfloat16 else "fp32"
        assert choose_numerics("auto", torch.device("cpu")).name == name
    assert choose_numerics("fp16", torch.device("cpu")).name == "fp16"


# CUDA graphs.


def test_a_graph_is_refused_where_it_cannot_be(tmp_path):
    cuda = torch.device("cuda")
    with pytest.raises(UsageError, match="--cuda-graph: got --device cpu, expected a CUDA device"):
        build_model(resolve(make_config(tmp_path, cuda_graph=True)), CPU, 3)
    with pytest.raises(UsageError, match="--cuda-graph: got 2 processes, expected one process"):
        require_graph(NUMERICS["bf16"], World(cuda, 0, 2))
    with pytest.raises(UsageError, match="--cuda-graph: got --precision fp16, expected bf16"):
        require_graph(NUMERICS["fp16"], World(cuda))
    require_graph(NUMERICS["bf16"], World(cuda))


def run_steps(trainer, device="cpu"):
    """Two epochs of two full batches and a smaller one; the selection is random in the first."""
    found = []
    for step in range(6):
        trainer.begin(step // 3)
        batch = one_batch(4 if step % 3 == 2 else 8, device)
        trainer.step(fresh(batch), step // 3, step % 3, step)
        found.append(trainer.take_losses())
    return found


class StandInGraph:
    """Runs again what was captured; capturing leaves all values as they were, as on a device."""

    captured = 0

    def __init__(self, trainer):
        self._trainer = trainer

    @contextlib.contextmanager
    def capture(self):
        before = {name: value.clone() for name, value in self._trainer.tensors().items()}
        state = torch.get_rng_state()
        yield
        torch.set_rng_state(state)
        for name, value in self._trainer.tensors().items():
            value.detach().copy_(before[name])
        StandInGraph.captured += 1

    def replay(self):
        step = self._trainer.optimizer_step
        inputs, kept = step._graph._inputs, step._graph._found
        kept.losses.copy_(step.update(*inputs).losses)


def test_replayed_steps_equal_eager_ones(tmp_path, monkeypatch):
    """The logic around the graph, with stand-ins for what needs a device."""
    eager, _ = make_trainer(tmp_path)
    expected = run_steps(eager)
    trainer, _ = make_trainer(tmp_path)
    trainer.optimizer_step._graph = step_module._StepGraph(trainer.optimizer_step)
    graphs = []

    def new_graph():
        graphs.append(StandInGraph(trainer))
        return graphs[-1]

    fakes = {
        "CUDAGraph": new_graph,
        "graph": lambda graph: graph.capture(),
        "Stream": lambda: contextlib.nullcontext(),
        "stream": lambda stream: stream,
        "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: torch.set_rng_state(state),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(step_module, "_wait_for", lambda stream: None)
    assert run_steps(trainer) == expected
    assert StandInGraph.captured == 2, "once for each way to select"
    for name, value in eager.tensors().items():
        assert torch.equal(trainer.tensors()[name], value), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-autocast"])
def test_graphs_on_a_gpu_equal_eager_steps(precision, tmp_path):
    world = World(torch.device("cuda"))
    options = {"world": world, "precision": precision, "device": "cuda"}
    eager, _ = make_trainer(tmp_path, **options)
    graphed, _ = make_trainer(tmp_path, cuda_graph=True, **options)
    for a, b in zip(run_steps(eager, "cuda"), run_steps(graphed, "cuda"), strict=True):
        assert a[1] == b[1]
        assert a[0] == pytest.approx(b[0], rel=1e-5)
    for name, value in eager.tensors().items():
        error = (graphed.tensors()[name] - value).norm()
        assert error <= 1e-4 * value.norm() + 1e-8, name


def test_the_model_is_the_recipes(tmp_path):
    config = make_config(tmp_path, normalize="half")
    built = build_model(resolve(config), CPU, CLASSES)
    assert built.model.config == resolve(config).prompts
    assert built.model.normalization == tcpa.Normalization((0.5,) * 3, (0.5,) * 3)
    assert built.model.num_classes == CLASSES
    assert tuple(built.model.backbone.patch_embed.img_size) == (SIZE, SIZE)
    assert built.model.savings == tcpa.Savings() and built.model.impl == "auto"


def test_a_backbone_that_is_not_covered_is_named(tmp_path):
    assert timm.is_model("resnet18")
    config = make_config(tmp_path, backbone="resnet18", image_size=224)
    with pytest.raises(UsageError, match=r"--backbone resnet18: .*ResNet is not a timm model of a"):
        build_model(resolve(config), CPU, CLASSES)
