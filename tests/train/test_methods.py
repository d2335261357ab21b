"""Promise: every row of the tables trains, in one engine, what it says and nothing else, and a run
that stops resumes to bitwise the same end."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from train_runs import CLASSES, MemoryBatch, MemorySource, make_config, make_splits

import tcpa
from tcpa.cli import UsageError
from tcpa.train.backbones import load_backbone
from tcpa.train.engine.checkpoint import CURRENT
from tcpa.train.engine.data import Splits
from tcpa.train.engine.distributed import World
from tcpa.train.engine.loop import Loop
from tcpa.train.engine.model import build_model
from tcpa.train.engine.precision import NUMERICS
from tcpa.train.engine.stages import Stages, mask_importance
from tcpa.train.engine.trainer import Trainer
from tcpa.train.jobs.run import run
from tcpa.train.recipes.recipe import METHODS
from tcpa.train.recipes.runspec import resolve

CPU = World(torch.device("cpu"))
LARGE = {"sidetune": 64}
"""Side of the images, pixels, where 32 are too few for AlexNet."""

RATES = {"full": 1e-4, "vp": 1.0, "bias": 5e-4, "gated-prompt": 3e-3}
"""Rates for six small random blocks where those of the recipe are for another batch or backbone."""


def splits_for(method, **options):
    splits, size = make_splits(**options), LARGE.get(method)
    if size is None:
        return splits

    def enlarge(source):
        images = F.interpolate(source.images, size)
        shuffle = {"shuffle": source._shuffle, "even": source._even}
        return MemorySource(images, source.labels, batch_size=source._size, **shuffle)

    evaluation = {name: enlarge(source) for name, source in splits.evaluation.items()}
    return dataclasses.replace(splits, train=enlarge(splits.train), evaluation=evaluation)


def config_for(method, tmp_path, **options):
    if method in LARGE:
        options |= {"image_size": LARGE[method]}
    if method in RATES:
        options = {"learning_rate": RATES[method]} | options
    return make_config(tmp_path, method=method, **options)


def metrics(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_trains_and_comes_back(method, tmp_path):
    config = config_for(method, tmp_path, protocol="last", epochs=2)
    settings = resolve(config)
    result = run(config, splits_for(method))
    folder = settings.folder
    losses = [line["loss"] for line in metrics(folder, "epoch")]
    assert len(losses) == 2 and losses[1] < losses[0]
    torch.manual_seed(settings.seed)
    backbone, _ = load_backbone("test_vit", "none", image_size=settings.crop)
    # What is trained of the backbone comes from the adapter.
    model = tcpa.from_pretrained(folder / "adapter", backbone=backbone)
    test = splits_for(method).evaluation["test"]
    with torch.no_grad():
        logits = model(test.images)
    (line,) = metrics(folder, "evaluation")
    assert float(F.cross_entropy(logits, test.labels)) == pytest.approx(line["loss"], rel=1e-5)
    assert result.method == method and result.trainable == model.num_trainable


def make_trainer(method, tmp_path, total=6, **options):
    config = config_for(method, tmp_path, **options)
    settings = resolve(config)
    built = build_model(settings, CPU, CLASSES)
    return Trainer(built.model, settings, CPU, built.numerics, total_steps=total)


def one_batch(method):
    source = splits_for(method, count=8).train
    return MemoryBatch(source.images.clone(), source.labels, 8)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_what_is_trained_and_nothing_else(method, tmp_path):
    # Gates of sigmoid(-10) have small gradients.
    large = {"learning_rate": 1.0} if method == "gated-prompt" else {}
    trainer = make_trainer(method, tmp_path, **large)
    model = trainer.model
    if isinstance(model.input_config, tcpa.DAMVPConfig):
        model.fit_clusters(splits_for(method).train.images)
        # Every cluster of it has an image in the batch.
        model.input_prompt.fit(model.plain_features(one_batch(method).images).repeat(2, 1))
        trainer.restart()
    trainer.begin(0)
    named = model.trainable_named_parameters()
    assert set(named) <= set(model.trained_tensors())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(3):
        trainer.step(one_batch(method), 0, step, step)
    after = model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved <= set(model.trained_tensors())
    assert moved >= set(named), sorted(set(named) - moved)
    assert all(bool((p.grad != 0).any()) for p in named.values())


def test_settings_of_groups_reach_their_values(tmp_path):
    trainer = make_trainer("dam-vp", tmp_path, learning_rate=3.0)
    trainer.begin(0)
    trainer.model.fit_clusters(splits_for("dam-vp").train.images)
    trainer.restart()
    trainer.step(one_batch("dam-vp"), 0, 0, 0)
    named = trainer.model.trainable_named_parameters()
    found = {}
    for group in trainer.optimizer.param_groups:
        for name, parameter in named.items():
            if any(parameter is p for p in group["params"]):
                found[name] = (group["lr"], group["weight_decay"], group["momentum"])
    assert found["backbone.head.bias"] == found["backbone.head.weight"] == (0.1, 0.0, 0.9)
    assert found["input_prompt.up"] == (3.0, 1e-4, 0.9)
    official = make_trainer("dam-vp", tmp_path, learning_rate=3.0, parity=True)
    for group in official.optimizer.param_groups:
        assert group["peak"] == 3.0 and group["momentum"] == 0.0


def rates(method, tmp_path, total, **options):
    trainer = make_trainer(method, tmp_path, total=total, **options)
    return [trainer.learning_rate(step) for step in range(total)]


def test_schedules(tmp_path):
    # VPT: per epoch, the first at 0, ten of a hundred to warm up.
    found = rates("vpt-deep", tmp_path, 200, epochs=100, batch_size=128)
    assert found[0] == found[1] == 0 and found[2] == found[3] == pytest.approx(0.05)
    assert found[20] == pytest.approx(0.5) and found[-1] < 1e-3
    assert found[110] == found[111] == pytest.approx(0.25)
    # AutoVP: a tenth at 50 % and at 72 %.
    found = rates("autovp", tmp_path, 100)
    assert found[:50] == [1e-3] * 50 and found[50:72] == pytest.approx([1e-4] * 22)
    assert found[72:] == pytest.approx([1e-5] * 28)
    # Rewinding: the whole schedule twice.
    pruned = rates("e2vpt", tmp_path, 8, epochs=4, prune_tokens=0.5)
    assert pruned[:4] == pruned[4:] and pruned[0] > pruned[3]


# Stages, and going on.


class Stop(Exception):
    pass


class StoppingSource(MemorySource):
    """Images of which no more than so many batches can be had."""

    def __init__(self, source, batches):
        self.__dict__.update(source.__dict__)
        self._left = batches

    def epoch(self, epoch, start=0):
        for batch in super().epoch(epoch, start):
            if self._left == 0:
                raise Stop
            self._left -= 1
            yield batch


def stop_after(splits: Splits, batches: int) -> Splits:
    return dataclasses.replace(splits, train=StoppingSource(splits.train, batches))


def tensors_of(folder):
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return adapter, load_file(folder / CURRENT)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in METHODS),
        ("dam-vp+tcpa", {"precision": "bf16"}),
        ("e2vpt", {"prune_tokens": 0.4, "prune_segments": 0.5, "epochs": 1}),
    ],
)
def test_a_run_that_stops_goes_on_as_if_it_had_not(method, options, tmp_path):
    whole, stopped = (
        config_for(method, tmp_path / name, protocol="val", **options) for name in ("a", "b")
    )
    run(whole, splits_for(method))
    # The pipeline's timing and the stages take batches too: this stops at several places.
    for batches in (5, 6, 8, 11):
        try:
            run(stopped, stop_after(splits_for(method), batches))
        except Stop:
            continue
        break
    run(stopped, splits_for(method))
    expected = tensors_of(resolve(whole).folder)
    found = tensors_of(resolve(stopped).folder)
    for got, truth in zip(found, expected, strict=True):
        assert got.keys() == truth.keys()
        assert all(torch.equal(got[name], value) for name, value in truth.items())


def test_clusters_are_found_before_the_first_step(tmp_path):
    config = config_for("dam-vp", tmp_path, protocol="last", epochs=1)
    result = run(config, splits_for("dam-vp"))
    folder = resolve(config).folder
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert adapter["input_prompt.prototypes"].shape == (16, 64)
    assert adapter["input_prompt.up"].shape[0] == 16 and result.trainable > 16
    three = config_for("dam-vp", tmp_path, clusters=3)
    assert resolve(three).input_prompt.num_clusters == 3
    with pytest.raises(UsageError, match="--clusters: got 1, expected an integer from 2 to 1000"):
        resolve(config_for("dam-vp", tmp_path, clusters=1))
    with pytest.raises(UsageError, match="--clusters: got 3 with --method vfpt, expected a method"):
        resolve(config_for("vfpt", tmp_path, clusters=3))
    few = config_for("dam-vp", tmp_path / "few", protocol="last", batch_size=4)
    with pytest.raises(UsageError, match="images: got 12, expected at least 16, one for each"):
        run(few, splits_for("dam-vp", count=12, batch_size=4))


def test_pruning_rewinds_what_is_left(tmp_path):
    shares = {"prune_tokens": 0.4, "prune_segments": 0.5}
    config = config_for("e2vpt", tmp_path, epochs=1, **shares)
    settings, splits = resolve(config), splits_for("e2vpt")
    assert (settings.epochs, settings.rounds) == (2, 2)
    trainer = make_trainer("e2vpt", tmp_path, epochs=1, **shares)
    stages = Stages(settings, CPU, trainer, splits.train)
    first = {name: value.clone() for name, value in trainer.model.trained_tensors().items()}
    assert stages.before(0) is None
    trainer.begin(0)
    for step in range(3):
        trainer.step(one_batch("e2vpt"), 0, step, step)
    said = stages.before(1)
    assert said == "pruned to 3 of 5 tokens with 24 segments in all; training restarts"
    masks = {"tokens.token_mask", "tokens.segment_mask"}
    for name, value in trainer.model.trained_tensors().items():
        assert torch.equal(value, first[name]) == (name not in masks), name
        assert value.requires_grad == (name not in masks)
    assert not trainer.optimizer.state


def test_only_the_pruned_model_can_be_chosen(tmp_path, monkeypatch):
    """Whatever the accuracies before the last pruning were."""
    real, epochs = Loop.evaluate, []

    def falling(self, split, *, epoch, **rest):
        epochs.append(epoch)
        return dataclasses.replace(real(self, split, epoch=epoch, **rest), accuracy=100.0 / epoch)

    monkeypatch.setattr(Loop, "evaluate", falling)
    config = config_for("e2vpt", tmp_path, epochs=2, prune_tokens=0.4, prune_segments=0.5)
    result = run(config, splits_for("e2vpt"))
    assert epochs == [1, 2, 3, 4] and result.epoch == 3
    folder = resolve(config).folder
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert saved["tokens.token_mask"].sum() == 3


def test_importance_is_how_the_loss_changes_with_a_mask(tmp_path):
    trainer = make_trainer("e2vpt", tmp_path)
    trainer.begin(0)
    for step in range(6):
        trainer.step(one_batch("e2vpt"), 0, step, step)
    model, source = trainer.model.eval(), splits_for("e2vpt", count=8).train
    batch = MemoryBatch(source.images, source.labels, 8)
    once = SimpleNamespace(epoch=lambda epoch, start=0: iter([batch]))
    of_tokens, of_segments = mask_importance(model, once, CPU, NUMERICS["fp32"])

    def loss():
        with torch.no_grad():
            return F.cross_entropy(exact(batch.images.double()), batch.labels)

    # In float32 the loss is too coarse for a difference.
    exact = copy.deepcopy(model).double().eval()
    for mask, importance in (
        (exact.tokens.token_mask, of_tokens),
        (exact.tokens.segment_mask, of_segments),
    ):
        where, step = tuple(torch.unravel_index(importance.abs().argmax(), mask.shape)), 0.02
        values = []
        for sign in (1, -1):
            mask[where] = 1 + sign * step
            values.append(loss())
        mask[where] = 1.0
        slope = float((values[0] - values[1]) / (2 * step))
        assert slope == pytest.approx(float(importance[where]), rel=0.05)


def test_stages_are_refused_where_they_mean_nothing(tmp_path):
    with pytest.raises(UsageError, match=r"--prune-tokens: got 0.5 with --method vfpt, expected a"):
        resolve(config_for("vfpt", tmp_path, prune_tokens=0.5))
    with pytest.raises(UsageError, match=r"--prune-segments: got 1.5"):
        config_for("e2vpt", tmp_path, prune_segments=1.5)
    frame = tmp_path / "frame.safetensors"
    with pytest.raises(
        UsageError, match=r"--meta-prompt: got .* with --method vp, expected a method"
    ):
        resolve(config_for("vp", tmp_path, meta_prompt=frame))
    with pytest.raises(UsageError, match=r"--meta-prompt: got .*expected a file of meta-training"):
        resolve(config_for("dam-vp", tmp_path, meta_prompt=frame))


def test_weights_that_are_trained_are_not_stored_in_bfloat16(tmp_path):
    config = config_for("bias", tmp_path, precision="bf16")
    with pytest.raises(UsageError, match="--precision: got bf16, expected bf16-autocast, fp16 or"):
        build_model(resolve(config), CPU, CLASSES)
    config = config_for("bias", tmp_path, precision="auto")
    built = build_model(resolve(config), CPU, CLASSES)
    assert built.numerics.weights == torch.float32


def test_precisions_keep_what_is_counted(tmp_path):
    built = {}
    for precision in ("fp32", "bf16"):
        config = config_for("adaptformer", tmp_path, precision=precision)
        built[precision] = build_model(resolve(config), CPU, CLASSES).model
    found = built["bf16"].trained_tensors()
    for name, value in built["fp32"].trained_tensors().items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value), name
    assert built["bf16"].backbone.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("mapping", ["full", "frequency", "iterative"])
def test_autovp_maps_the_heads_logits_and_goes_on(mapping, tmp_path):
    options = {"mapping": mapping, "protocol": "last"}
    if mapping != "full":
        options["mapping_sources"] = 2
    whole, stopped = (config_for("autovp", tmp_path / name, **options) for name in ("a", "b"))
    result = run(whole, splits_for("autovp"))
    # test_vit has 1000 source classes.
    linear = (1000 + 1) * CLASSES if mapping == "full" else 0
    assert result.trainable == 3 * 32 * 32 + linear
    with pytest.raises(Stop):
        run(stopped, stop_after(splits_for("autovp"), 3 if mapping == "full" else 8))
    run(stopped, splits_for("autovp"))
    expected = tensors_of(resolve(whole).folder)
    found = tensors_of(resolve(stopped).folder)
    for got, truth in zip(found, expected, strict=True):
        assert got.keys() == truth.keys()
        assert all(torch.equal(got[name], value) for name, value in truth.items())
    index = expected[0].get("mapping.index")
    assert (index is None) == (mapping == "full")
    assert index is None or (index.shape == (CLASSES, 2) and len(index.unique()) == 2 * CLASSES)


def test_mappings_are_refused_where_they_mean_nothing(tmp_path):
    with pytest.raises(UsageError, match="--mapping: got full with --method vp, expected a method"):
        resolve(config_for("vp", tmp_path, mapping="full"))
    with pytest.raises(UsageError, match="--mapping-sources: got 3 with --mapping full, expected "):
        resolve(config_for("autovp", tmp_path, mapping="full", mapping_sources=3))
    with pytest.raises(UsageError, match="--mapping-sources: got 0, expected an integer"):
        resolve(config_for("autovp", tmp_path, mapping="frequency", mapping_sources=0))
    many = config_for("autovp", tmp_path, mapping="frequency", mapping_sources=300)
    with pytest.raises(UsageError, match="source classes: got 1000, expected at least 1200, 300"):
        build_model(resolve(many), CPU, CLASSES)
    file = config_for("autovp", tmp_path, mapping="full", weights="vit.npz")
    with pytest.raises(UsageError, match=r"--weights: got vit.npz with --mapping, expected pre"):
        build_model(resolve(file), CPU, CLASSES)
