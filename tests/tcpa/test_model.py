"""Promise: `wrap` works on every covered timm model, trains only prompts and head, and composes
with checkpointing, autocast and torch.compile."""

import copy
import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from models import ARCHITECTURES
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import nn
from torch._dynamo.testing import CompileCounter

import tcpa
from tcpa import Savings, TCPAConfig, VPTConfig, unpack_gate, wrap

TCPA = TCPAConfig(
    cls_pool_size=5, image_pool_size=6, cls_top_k=2, image_top_k=3, prompt_dropout=0.0
)
QUIET = TCPA.replace(random_selection_epochs=0)
TINY = ARCHITECTURES["vit-tiny"]


def step(model, images, through=None):
    """One backward pass, `through` a compiled form; returns logits, distance and gradients."""
    logits, distance = (model if through is None else through)(images, return_distance=True)
    labels = torch.arange(len(images)) % model.num_classes
    (F.cross_entropy(logits.float(), labels) + 0.1 * distance).backward()
    grads = {n: p.grad for n, p in model.trainable_named_parameters().items()}
    return logits.detach(), distance.detach(), grads


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_without_prompts_the_model_is_the_backbone(key):
    backbone = ARCHITECTURES[key].create(torch.float64).eval()
    images = ARCHITECTURES[key].images(dtype=torch.float64)
    expected, features = backbone(images), backbone.forward_features(images)
    for savings in (Savings(), Savings.none()):
        model = wrap(backbone, None, savings=savings)
        torch.testing.assert_close(model(images), expected, rtol=1e-11, atol=1e-11)
        got = model.forward_features(images)
        torch.testing.assert_close(got, features, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(model.forward_head(got), expected, rtol=1e-11, atol=1e-11)


def timm_with_prompt_tokens(backbone, prompts, images, deep):
    """Let timm itself run prompts as further prefix tokens, which it does not rotate."""
    prefix, count = backbone.num_prefix_tokens, prompts.shape[1]
    x, ropes = tcpa.vit.embed_images(backbone, images)
    for index, (block, rope) in enumerate(zip(backbone.blocks, ropes, strict=True)):
        if deep or index == 0:
            rows = prompts[index].expand(len(x), -1, -1)
            x = torch.cat((x[:, :prefix], rows, x[:, prefix:]), dim=1)
        if rope is None:
            x = block(x)
        else:
            block.attn.num_prefix_tokens = prefix + count
            x = block(x, rope=rope)
            block.attn.num_prefix_tokens = prefix
        if deep:
            x = torch.cat((x[:, :prefix], x[:, prefix + count :]), dim=1)
    if not deep:
        x = torch.cat((x[:, :prefix], x[:, prefix + count :]), dim=1)
    return backbone.forward_head(backbone.norm(x))


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("key", ARCHITECTURES)
def test_prompts_are_further_tokens_of_the_timm_model(key, deep):
    backbone = ARCHITECTURES[key].create(torch.float64).eval()
    images = ARCHITECTURES[key].images(dtype=torch.float64)
    model = wrap(copy.deepcopy(backbone), VPTConfig(length=4, deep=deep, init="uniform"))
    with torch.no_grad():
        expected = timm_with_prompt_tokens(backbone, model.tokens.prompts, images, deep)
        torch.testing.assert_close(model(images), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_a_step_trains_prompts_and_head_and_nothing_else(key):
    backbone = ARCHITECTURES[key].create()
    before = copy.deepcopy(backbone.state_dict())
    model = wrap(backbone, QUIET, num_classes=7)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.1)
    logits, distance, grads = step(model, ARCHITECTURES[key].images())
    assert logits.shape == (3, 7) and distance > 0
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    trained = {n: p.detach().clone() for n, p in model.trainable_named_parameters().items()}
    optimizer.step()
    for name, old in trained.items():
        new = model.get_parameter(name)
        assert old.numel() == 0 or not torch.equal(new, old), name
    after = backbone.state_dict()
    heads = ("head.", "head_dist.")
    assert all(torch.equal(after[n], v) for n, v in before.items() if not n.startswith(heads))
    layers = [backbone.head] + ([backbone.head_dist] if hasattr(backbone, "head_dist") else [])
    head_size = sum(p.numel() for layer in layers for p in layer.parameters())
    cls_pool = 5 if backbone.num_prefix_tokens else 0
    assert model.num_trainable == head_size + 2 * 2 * backbone.embed_dim * (cls_pool + 6)


@pytest.mark.parametrize("key", ["vit-base", "dinov3", "gap-without-cls"])
def test_selection_has_top_k_bits_of_the_token_s_pool(key):
    backbone = ARCHITECTURES[key].create()
    model = wrap(backbone, QUIET)
    prefix, cls_rows = backbone.num_prefix_tokens, model.config.cls_rows
    gates = model.selection(ARCHITECTURES[key].images())
    assert len(gates) == 2 and model.training
    for gate in gates:
        visible = unpack_gate(gate, model.config.num_prompts)
        assert (visible[:, :prefix, :cls_rows].sum(-1) == (2 if prefix else 0)).all()
        assert (visible[:, prefix:, cls_rows:].sum(-1) == 3).all()
        assert not visible[:, :prefix, cls_rows:].any() and not visible[:, prefix:, :cls_rows].any()


def test_a_model_without_prefix_tokens_drops_the_cls_pool():
    model = wrap(ARCHITECTURES["gap-without-cls"].create(), QUIET)
    assert model.config == QUIET.replace(cls_pool_size=0, cls_top_k=0)


def test_role_coordination_selects_nothing_and_measures_nothing():
    model = wrap(TINY.create(), QUIET.replace(coordination="role"))
    _, distance, grads = step(model, TINY.images())
    assert distance == 0
    assert grads["pools.cls_keys"] is None and grads["pools.cls_prompts"].abs().max() > 0


def test_normalize_over_farthest_and_fourier_scope_change_the_function():
    images, logits = TINY.images(), []
    for change in (
        {},
        {"normalize_over": "visible"},
        {"selection": "farthest"},
        {"fourier_scope": "pool"},
        {"prompt_transform": "identity"},
        {"simam": True},
        {"value_affine": True},
        {"image_prompt": True},
    ):
        backbone = TINY.create()
        torch.manual_seed(3)
        logits.append(wrap(backbone, QUIET.replace(**change)).eval()(images))
    assert len({tuple(x.flatten().tolist()) for x in logits}) == len(logits)


def test_random_selection_lasts_for_its_epochs_in_training_only():
    config = TCPA.replace(random_selection_epochs=2)
    model, images = wrap(TINY.create(), config), TINY.images()

    def logits(epoch, seed):
        model.set_epoch(epoch)
        torch.manual_seed(seed)
        return model(images).detach()

    assert torch.equal(logits(0, 1), logits(0, 1)) and not torch.equal(logits(0, 1), logits(0, 2))
    assert not torch.equal(logits(1, 1), logits(1, 2))
    assert torch.equal(logits(2, 1), logits(2, 2))
    model.eval()
    assert torch.equal(logits(0, 1), logits(5, 2))


def test_dropout_and_noise_act_in_training_only_and_per_sample():
    images = TINY.images(1).expand(4, -1, -1, -1)
    for change, per_sample in (
        ({"prompt_dropout": 0.5}, True),
        ({"prompt_dropout": 0.5, "prompt_dropout_shared": True}, False),
        ({"token_noise": 0.1}, True),
    ):
        model = wrap(TINY.create(torch.float64), QUIET.replace(**change))
        out = model(images.double()).detach()
        again = model(images.double()).detach()
        assert not torch.allclose(out, again), change
        spread = (out - out[0]).abs().max()
        assert (spread > 1e-6) == per_sample, change
        model.eval()
        assert torch.equal(model(images.double()), model(images.double()))


def test_prompt_dropout_keeps_the_expected_value():
    config = QUIET.replace(prompt_dropout=0.25, prompt_transform="identity")
    model = wrap(TINY.create(), config)
    drawn = model.pools(2000)[0]
    clean = model.pools.eval()(1)[0]
    kept = drawn != 0
    assert abs(kept.float().mean() - 0.75) < 0.01
    torch.testing.assert_close(drawn[kept], (clean / 0.75).expand_as(drawn)[kept])


@pytest.mark.parametrize("key", ["vit-tiny", "dinov3"])
def test_checkpointing_changes_nothing(key):
    config = TCPA.replace(prompt_dropout=0.2, token_noise=0.01)
    results = []
    for enable in (False, True):
        backbone = ARCHITECTURES[key].create(torch.float64)
        torch.manual_seed(3)
        model = wrap(backbone, config)
        model.set_grad_checkpointing(enable)
        results.append(step(model, ARCHITECTURES[key].images(dtype=torch.float64)))
    (logits, distance, grads), (logits2, distance2, grads2) = results
    assert torch.equal(logits, logits2) and torch.equal(distance, distance2)
    assert all(torch.equal(grads[n], grads2[n]) for n in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", ["vit-tiny", "dinov3", "clip", "dinov2-registers"])
def test_autocast_trains_float32_parameters(key, dtype):
    exact = wrap(ARCHITECTURES[key].create(), QUIET)
    low = wrap(ARCHITECTURES[key].create(), QUIET)
    low.load_state_dict(exact.state_dict())
    logits, distance, grads = step(exact, ARCHITECTURES[key].images())
    with torch.autocast("cpu", dtype):
        low_logits, low_distance, low_grads = step(low, ARCHITECTURES[key].images())
    assert low_logits.dtype == dtype and low_distance.dtype == torch.float32
    assert (low_logits.float() - logits).norm() < 0.1 * logits.norm()
    torch.testing.assert_close(low_distance, distance, rtol=0.02, atol=0)
    for name, grad in grads.items():
        assert low_grads[name].dtype == torch.float32 and low_grads[name].isfinite().all()
        assert grad.numel() == 0 or (low_grads[name] - grad).norm() < 0.5 * grad.norm(), name


def test_frozen_weights_may_be_bfloat16():
    model = wrap(TINY.create().bfloat16(), QUIET.replace(image_prompt=True))
    assert model.pools.cls_keys.dtype == torch.float32
    logits, _, grads = step(model, TINY.images().bfloat16())
    # Prompts and head, which are trained, stay in float32.
    assert logits.dtype == torch.float32
    assert grads["pools.image_prompts"].dtype == torch.float32
    assert grads["image_prompt.0.expand.weight"].dtype == torch.float32


# Older torch warns of its own tracing of autograd functions.
OWN_WARNING = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@OWN_WARNING
@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("vit-tiny", TCPA.replace(prompt_dropout=0.1)),
        ("vit-tiny", VPTConfig.vfpt(length=4)),
        ("dinov3", QUIET),
    ],
    ids=["tcpa-random-dropout", "vfpt", "dinov3"],
)
def test_torch_compile_captures_the_whole_model(key, config):
    torch._dynamo.reset()
    torch.manual_seed(3)
    model = wrap(ARCHITECTURES[key].create(), config)
    images = ARCHITECTURES[key].images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    expected = step(model, images)
    model.zero_grad()
    torch.manual_seed(4)
    got = step(model, images, compiled)
    torch.testing.assert_close(got, expected)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))


def test_a_new_epoch_is_compiled_only_when_selection_is_no_longer_random():
    torch._dynamo.reset()
    model = wrap(TINY.create(), TCPA.replace(random_selection_epochs=3)).train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    frames = []
    for epoch in range(6):
        model.set_epoch(epoch)
        compiled(TINY.images())
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1, 2, 2, 2]


def test_random_selection_compiles_with_dynamic_shapes():
    torch._dynamo.reset()
    model = wrap(TINY.create(), TCPA.replace(random_selection_epochs=3)).train()
    model.set_epoch(0)
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    for batch in (2, 3):
        assert compiled(TINY.images()[:1].expand(batch, -1, -1, -1)).shape[0] == batch


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_torch_compile_generates_code():
    torch._dynamo.reset()
    model = wrap(TINY.create(), QUIET).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(TINY.images()), model(TINY.images()))


def test_dynamic_image_sizes():
    architecture = ARCHITECTURES["dynamic-size"]
    model = wrap(architecture.create(), QUIET).eval()
    for size in (64, 96):
        assert model(torch.randn(2, 3, size, size + 16)).shape == (2, 5)


def test_a_non_finite_image_does_not_reach_another():
    model = wrap(TINY.create(), QUIET).eval()
    images = TINY.images()
    clean = model(images)
    images[1, 0, 3, 3] = float("nan")
    out = model(images)
    assert torch.equal(out[[0, 2]], clean[[0, 2]]) and out[1].isnan().all()


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = wrap(TINY.create(), TCPAConfig.official("cub"), num_classes=200)
    for values in (model.pools.cls_keys, model.pools.image_prompts):
        assert values.min() < -0.998 and values.max() > 0.998 and values.abs().max() <= 1
    vpt = wrap(TINY.create(), VPTConfig(length=50))
    bound = (6 / (3 * 16 * 16 + 192)) ** 0.5
    assert 0.99 * bound < vpt.tokens.prompts.max() <= bound
    head = model.backbone.head.weight
    assert 0.98 / 192**0.5 < head.abs().max() <= 1 / 192**0.5


def test_wrapping_leaves_other_instances_and_timm_alone():
    other = TINY.create()
    forward = timm.models.vision_transformer.Block.forward
    wrap(TINY.create(), QUIET)
    assert all(p.requires_grad for p in other.parameters()) and other.training
    assert timm.models.vision_transformer.Block.forward is forward


def test_create_model_passes_arguments_to_timm():
    model = tcpa.create_model(
        "vit_tiny_patch16_224", num_classes=3, tcpa=QUIET, img_size=32, depth=1
    )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert model.normalization.mean == (0.5, 0.5, 0.5)


class Special(timm.models.VisionTransformer):
    def forward_features(self, x):
        return super().forward_features(x) * 2


class Adapted(nn.Linear):
    pass


def special(block=Block, projection=nn.Linear, vit=timm.models.VisionTransformer):
    """A small ViT with a block, a projection or a forward pass of its own."""
    backbone = vit(embed_dim=48, depth=1, num_heads=3, block_fn=block)
    if projection is not nn.Linear:
        backbone.blocks[0].attn.qkv = projection(48, 144)
    return backbone


REFUSED = {
    "resnet18": "ResNet",
    "swin_tiny_patch4_window7_224": "SwinTransformer",
    "beit_base_patch16_224": "Beit",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos",
    lambda: special(vit=Special): "Special overrides forward_features",
    lambda: special(ParallelScalingBlock): r"blocks\.0 is a ParallelScalingBlock",
    lambda: special(projection=Adapted): r"blocks\.0\.attn\.qkv is a Adapted.*merge adapters",
}


@pytest.mark.parametrize(("backbone", "reason"), REFUSED.items(), ids=REFUSED.values())
def test_other_architectures_are_refused_by_name(backbone, reason):
    with pytest.raises(ValueError, match=f"backbone: {reason}"):
        wrap(timm.create_model(backbone) if isinstance(backbone, str) else backbone(), QUIET)


def test_a_convolutional_stem_is_covered():
    model = wrap(timm.create_model("vit_small_resnet26d_224"), VPTConfig(length=2))
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


NAME = "vit_tiny_patch16_224"
IMAGES = torch.zeros(2, 3, 64, 64)
TOKENS = torch.zeros(2, 17, 192)
BAD_CALLS = [
    (lambda: wrap(NAME, QUIET), TypeError, "backbone"),
    (lambda: wrap(wrap(TINY.create(), QUIET), QUIET), ValueError, "backbone"),
    (lambda: wrap(TINY.create(), {}), TypeError, "config"),
    (lambda: wrap(TINY.create(), tcpa.PromptConfig()), TypeError, "config"),
    (lambda: wrap(TINY.create(), QUIET, savings=True), TypeError, "savings"),
    (lambda: wrap(TINY.create(), QUIET, num_classes=-1), ValueError, "num_classes"),
    (lambda: wrap(TINY.create().to("meta"), QUIET, impl="triton"), RuntimeError, "impl"),
    *(
        (lambda given=given: wrap(TINY.create(), QUIET, normalization=given), kind, "normalization")
        for given, kind in (
            (((0.5,), (0.5,)), ValueError),
            (3, TypeError),
            ((0.5, 0.5), TypeError),
            ((None, (1, 1, 1)), TypeError),
            (((torch.nan,) * 3, (1.0,) * 3), ValueError),
            (((0.0,) * 3, (0.0,) * 3), ValueError),
            (((0.0,) * 3, (torch.inf,) * 3), ValueError),
        )
    ),
    (lambda: tcpa.create_model(None), TypeError, "name"),
    (lambda: tcpa.create_model(NAME, config=QUIET), TypeError, "config"),
    (lambda: tcpa.create_model("vit_tiny_patch16_225", tcpa=QUIET), ValueError, "name"),
    (lambda: tcpa.create_model(f"{NAME}.bogus", pretrained=True), ValueError, "name"),
    (lambda: tcpa.create_model(NAME, depht=2), ValueError, "name"),
    (lambda: tcpa.create_model(NAME, checkpoint_path="nope.pth"), ValueError, "name"),
    (lambda: tcpa.choose_impl("auto", "cpu", dtype=torch.float32), TypeError, "device"),
    *(
        (lambda images=images: wrap(TINY.create(), QUIET)(images), kind, "images")
        for images, kind in (
            (IMAGES[0], ValueError),
            (IMAGES[:, :1], ValueError),
            (IMAGES[..., :32], ValueError),
            (IMAGES.double(), ValueError),
            (IMAGES.to("meta"), ValueError),
            (IMAGES.byte(), TypeError),
        )
    ),
    *(
        (lambda tokens=tokens: wrap(TINY.create(), QUIET).forward_head(tokens), kind, "features")
        for tokens, kind in (
            (None, TypeError),
            (TOKENS[0], ValueError),
            (TOKENS[..., :100], ValueError),
            (TOKENS.long(), TypeError),
        )
    ),
    (
        lambda: wrap(TINY.create(), QUIET)(IMAGES, return_distance="no"),
        TypeError,
        "return_distance",
    ),
    (lambda: wrap(TINY.create(), VPTConfig()).selection(IMAGES), ValueError, "config"),
    (lambda: wrap(TINY.create(), None).set_epoch(-1), ValueError, "epoch"),
    (lambda: wrap(TINY.create(), None).set_epoch(10**30), ValueError, "epoch"),
    (lambda: wrap(TINY.create(), None).set_grad_checkpointing("x"), TypeError, "enable"),
]


@pytest.mark.parametrize(("call", "kind", "argument"), BAD_CALLS)
def test_bad_arguments_are_refused_by_name(call, kind, argument):
    with pytest.raises(kind, match=f"^{argument}(: |=)"):
        call()


def test_another_number_of_channels_needs_its_normalization():
    arguments = {"in_chans": 1, "img_size": 32, "depth": 1}
    with pytest.raises(ValueError, match="normalization: got nothing"):
        tcpa.create_model("vit_tiny_patch16_224", **arguments)
    own = ((0.5,), (0.25,))
    model = tcpa.create_model("vit_tiny_patch16_224", normalization=own, **arguments)
    assert model.normalization == own


def test_the_newer_model_has_the_backbone_and_the_older_one_says_so(tmp_path):
    backbone, images = TINY.create(), TINY.images()
    older = wrap(backbone, QUIET).eval()
    copied, logits = copy.deepcopy(older), older(images)
    newer = wrap(backbone, None, num_classes=3)
    for use in (lambda: older(images), lambda: older.save_pretrained(tmp_path)):
        with pytest.raises(RuntimeError, match=r"it was wrapped again.*copy\.deepcopy"):
            use()
    assert newer(images).shape == (3, 3)
    assert torch.equal(copied(images), logits)
    for use in (
        lambda: older.reset_classifier(2),
        older.state_dict,
        lambda: older.load_state_dict(copied.state_dict()),
        older.trainable_parameters,
        lambda: tcpa.official_state_dict(older),
    ):
        with pytest.raises(RuntimeError, match="it was wrapped again"):
            use()
    assert newer.num_classes == 3
    del newer
    with pytest.raises(RuntimeError, match="wrapped again"):
        older(images)


def test_a_wrap_that_fails_takes_nothing_over(monkeypatch):
    def full(*_):
        raise MemoryError

    backbone, images = TINY.create(), TINY.images()
    model = wrap(backbone, QUIET).eval()
    logits = model(images)
    monkeypatch.setattr(backbone, "reset_classifier", full)
    for wrong in ({"impl": "x"}, {"num_classes": -1}, {"normalization": 3}, {"num_classes": 3}):
        with pytest.raises((MemoryError, ValueError, TypeError)):
            wrap(backbone, QUIET, **wrong)
    assert torch.equal(model(images), logits)


HOOKED = ("", "blocks.0", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.0.norm1")


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_that_would_never_be_called_are_refused(name):
    model = wrap(TINY.create(), QUIET)
    handle = model.backbone.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=f"hooks on {name or 'the model itself'} would not be"):
        model(TINY.images())
    handle.remove()
    assert model(TINY.images()).shape == (3, 5)


def test_a_hook_on_a_norm_is_refused_as_long_as_the_norm_is_frozen():
    model, seen = wrap(TINY.create(), QUIET), []
    norm = model.backbone.blocks[0].norm1
    norm.register_forward_hook(lambda *_: seen.append(1))
    norm.requires_grad_(True)
    model(TINY.images())
    assert seen
    norm.requires_grad_(False)
    with pytest.raises(RuntimeError, match="norm1"):
        model(TINY.images())


def test_an_unknown_impl_is_refused_when_the_model_runs():
    model = wrap(TINY.create(), QUIET)
    model.impl = "tritn"
    with pytest.raises(ValueError, match="impl"):
        model(TINY.images())


@pytest.mark.parametrize("name", ["blocks.0.norm2", "blocks.1.mlp", "blocks.0.attn.proj", "norm"])
def test_hooks_on_modules_that_are_called_work(name):
    model, seen = wrap(TINY.create(), QUIET), []
    model.backbone.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    model(TINY.images())
    assert seen == [name]


def test_training_without_set_epoch_is_told_once(caplog):
    config = QUIET.replace(random_selection_epochs=2)
    images = TINY.images()
    for use, expected in ((lambda m: None, 1), (lambda m: m.set_epoch(0), 0)):
        caplog.clear()
        model = wrap(TINY.create(), config)
        use(model)
        model(images)
        model(images)
        told = [r.message for r in caplog.records if "without set_epoch" in r.message]
        assert len(told) == expected
    caplog.clear()
    wrap(TINY.create(), config).eval()(images)
    wrap(TINY.create(), dataclasses.replace(config, random_selection_epochs=0))(images)
    assert not caplog.records


def test_the_epoch_is_part_of_the_state():
    config = QUIET.replace(random_selection_epochs=2)
    first, second = wrap(TINY.create(), config), wrap(TINY.create(), config)
    first.set_epoch(7)
    second.load_state_dict(first.state_dict())
    assert second.epoch == 7
    for wrong in (torch.tensor(1.5), torch.tensor([1, 2]), "x", None):
        with pytest.raises(TypeError, match=r"_extra_state.*expected the epoch"):
            second.set_extra_state(wrong)
