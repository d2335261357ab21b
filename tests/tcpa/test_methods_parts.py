"""Promise: prompts on the image, token prompts and tunings have the sizes, initial values and
formulas of their papers, and what makes no sense is refused with the reason."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from models import ARCHITECTURES
from parameter_counts import COUNTS
from sklearn.cluster import AgglomerativeClustering
from torch.autograd import gradcheck

import tcpa
from tcpa import wrap
from tcpa.block import finish_block
from tcpa.forward import prompt_images
from tcpa.methods.autovp import frequency_mapping
from tcpa.methods.dam_vp import cluster_features
from tcpa.methods.lion import contracted, equilibrium
from tcpa.methods.side import for_alexnet
from tcpa.train.recipes.recipe import METHODS, recipe

TINY = ARCHITECTURES["vit-tiny"]
F64 = torch.float64
CLASSES = 200
LINEAR = 769 * CLASSES


def images(count=6):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 3, 64, 64, generator=generator)


# Sizes, on the backbone of the papers.


@pytest.mark.parametrize("method", METHODS)
def test_a_row_trains_as_many_values_as_its_formula_says(method):
    found = recipe("dtd", method)
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224", num_classes=0)
        choices = {"input_prompt": found.input_prompt, "tuning": found.tuning}
        model = wrap(backbone, found.prompts, num_classes=CLASSES, load_weights=False, **choices)
    assert model.num_trainable == COUNTS[method] + LINEAR


# Token prompts.


def attention(block, tokens, keys_values, temperature=1.0):
    """A block's output for tokens that also attend to given keys and values, written out."""
    attn = block.attn
    q, k, v = (
        part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for part in attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)
    )
    extra = keys_values.expand(len(tokens), -1, -1, -1)
    k, v = torch.cat((extra, k), dim=2), torch.cat((extra, v), dim=2)
    weights = (q @ k.mT * attn.scale / temperature).softmax(-1)
    x = tokens + attn.proj((weights @ v).transpose(1, 2).flatten(-2))
    return x + block.mlp(block.norm2(x))


def test_e2vpt_is_tokens_and_keys_that_are_values():
    config = tcpa.E2VPTConfig(length=3, kv_length=2, dropout=0.0)
    model = wrap(TINY.create(F64), config).double().eval()
    tokens, backbone = model.tokens, model.backbone
    tokens.token_mask[1] = 0.0
    tokens.segment_mask[2, 4:7] = 0.0
    prompts = tokens.prompts.clone()
    prompts[:, 1] = 0.0
    prompts[:, 2, 4 * 12 : 7 * 12] = 0.0
    x = backbone._pos_embed(backbone.patch_embed(images(2).double()))
    for index, block in enumerate(backbone.blocks):
        joined = torch.cat((prompts[index].expand(2, -1, -1), x), dim=1)
        x = attention(block, joined, tokens.key_values[index])[:, 3:]
    expected = backbone.head(backbone.norm(x)[:, 0])
    torch.testing.assert_close(model(images(2).double()), expected, rtol=1e-10, atol=1e-10)


def test_pruning_takes_the_lowest_first_and_leaves_one():
    model = wrap(TINY.create(), tcpa.E2VPTConfig(length=4, segments=4))
    tokens, every = model.tokens, model.num_trainable
    importance = torch.tensor([0.3, -2.0, 0.1, 0.2])
    segments = torch.tensor([[3.0, 1, 2, 0]] * 4)
    tokens.prune(importance, segments, 0.5, 0.25)
    assert tokens.token_mask.tolist() == [1, 0, 0, 1]
    assert tokens.segment_mask.tolist() == [[1, 1, 1, 0]] * 4
    tokens.prune(importance, segments, 1.0, 1.0)
    assert tokens.token_mask.tolist() == [1, 0, 0, 0]
    assert tokens.segment_mask.tolist() == [[1, 0, 0, 0]] * 4
    assert model.num_trainable == every - tokens.prompts.numel() * 15 // 16
    assert tokens.eval()(2)[:, 1:].abs().sum() == 0


def test_kept_keys_follow_the_masks():
    model = wrap(TINY.create(), tcpa.E2VPTConfig(length=4)).eval()
    with torch.no_grad():
        before = model(images(2))
        model.tokens.token_mask[0] = 0.0
        assert not torch.equal(model(images(2)), before)


def test_gated_prompts_mix_what_a_block_made_of_them():
    config = tcpa.GatedPromptConfig(length=3, gate_init=0.4, dropout=0.0)
    model = wrap(TINY.create(F64), config).double().eval()
    tokens, backbone = model.tokens, model.backbone
    with torch.no_grad():
        tokens.temperatures.copy_(torch.tensor([1.7, 50.0]))
    x = backbone._pos_embed(backbone.patch_embed(images(2).double()))
    x = torch.cat((tokens.prompts[0].expand(2, -1, -1), x), dim=1)
    none = x.new_empty(3, 0, 64)
    gate = 1 / (1 + math.exp(0.4))
    out = attention(backbone.blocks[0], x, none, temperature=1.7)
    out[:, :3] = gate * out[:, :3] + (1 - gate) * x[:, :3]
    # Temperatures stay below 10.
    out = attention(backbone.blocks[1], out, none, temperature=10.0)
    expected = backbone.head(backbone.norm(out)[:, 3])
    torch.testing.assert_close(model(images(2).double()), expected, rtol=1e-10, atol=1e-10)


def test_token_prompts_start_as_their_sources_say():
    bound = math.sqrt(6 / (3 * 16 * 16 + 192))
    for config in (tcpa.E2VPTConfig(length=50), tcpa.GatedPromptConfig(length=100)):
        prompts = wrap(TINY.create(), config).tokens.prompts
        assert 0.98 * bound < prompts.abs().max() <= bound
    kv = wrap(TINY.create(), tcpa.E2VPTConfig(kv_length=5)).tokens.key_values
    assert 0.98 * math.sqrt(6 / (5 * 64)) < kv.abs().max() <= math.sqrt(6 / (5 * 64))
    gated = wrap(TINY.create(), tcpa.GatedPromptConfig()).tokens
    assert (gated.gates == -10).all() and (gated.temperatures == 1).all()


# Prompts on the image.


def test_a_frame_adds_to_the_border_alone():
    model = wrap(TINY.create(), None, input_prompt=tcpa.VPConfig(width=5))
    frame = model.input_prompt
    added = frame(images()) - images()
    assert added[:, :, 5:-5, 5:-5].abs().max() == 0
    torch.testing.assert_close(added[0, :, :5], frame.up[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(added[3, :, -5:], frame.down[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(added[1, :, 5:-5, :5], frame.left[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(added[1, :, 5:-5, -5:], frame.right[0], rtol=1e-5, atol=1e-6)
    strips = torch.cat([p.flatten() for p in frame.parameters()])
    assert abs(strips.mean()) < 0.05 and abs(strips.std() - 1) < 0.05
    assert tcpa.VPConfig().width_on(224) == 30 and tcpa.VPConfig().width_on(64) == 9


@pytest.mark.parametrize("options", [{"num_clusters": 4}, {"threshold": 9.0}])
def test_clusters_are_those_of_scikit_learn(options):
    generator = torch.Generator().manual_seed(3)
    centres = 4 * torch.randn(5, 16, generator=generator)
    features = centres.repeat(12, 1) + torch.randn(60, 16, generator=generator)
    found = cluster_features(features, **options)
    other = {
        "n_clusters": options.get("num_clusters"),
        "distance_threshold": options.get("threshold"),
    }
    labels = AgglomerativeClustering(linkage="average", **other).fit_predict(features.numpy())
    order = list(dict.fromkeys(labels.tolist()))
    assert 1 < len(order) < 10
    expected = torch.stack([features[torch.tensor(labels == one)].mean(0) for one in order])
    torch.testing.assert_close(found, expected)


def test_an_image_gets_the_frame_of_the_nearest_prototype_of_its_plain_feature():
    config = tcpa.DAMVPConfig(width=5, num_clusters=3)
    # Prompts and adapters are not part of the feature.
    model = wrap(
        TINY.create(),
        tcpa.VPTConfig(dropout=0.0),
        input_prompt=config,
        tuning=tcpa.AdapterTuning(),
    )
    with pytest.raises(RuntimeError, match=r"DAM-VP has no clusters yet; call model.fit_clusters"):
        model(images())
    assert model.fit_clusters(images().split(2)) == 3
    plain = TINY.create().eval()
    with torch.no_grad():
        features = plain.forward_head(plain.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(model.plain_features(images()), features, rtol=1e-4, atol=1e-5)
    expected = torch.cdist(features, model.input_prompt.prototypes).argmin(1)
    assert torch.equal(model.clusters(images()), expected) and len(set(expected.tolist())) == 3
    prompted = prompt_images(model, images())
    frames = model.input_prompt.frames()
    torch.testing.assert_close(prompted, images() + frames[expected])
    # Gradients reach the frames of the clusters that are there.
    one = images()[:1]
    model(one).sum().backward()
    used = model.input_prompt.up.grad.flatten(1).abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == model.clusters(one).tolist()


def test_a_threshold_finds_the_number_of_clusters_and_meta_prompts_fill_their_frames():
    config = tcpa.DAMVPConfig(width=5, num_clusters=None, distance_threshold=1.0)
    model = wrap(TINY.create(), None, input_prompt=config)
    assert model.fit_clusters(images()) == 6 == model.input_prompt.num_frames
    assert all(p.requires_grad for p in model.input_prompt.parameters())
    meta = wrap(TINY.create(), None, input_prompt=tcpa.VPConfig(width=5)).input_prompt
    model.input_prompt.use_meta_prompt([p[0] for p in (meta.up, meta.down, meta.left, meta.right)])
    torch.testing.assert_close(model.input_prompt.frames()[4:5], meta.frames())
    other = wrap(TINY.create(), None, input_prompt=tcpa.VPConfig(width=6)).input_prompt
    with pytest.raises(
        ValueError, match=r"meta_prompt: got up \[3, 6, 64\], expected \[3, 5, 64\]"
    ):
        model.input_prompt.use_meta_prompt([other.up[0], other.down[0], other.left[0], other.up[0]])
    # A state takes its number of clusters with it.
    fresh = wrap(TINY.create(), None, input_prompt=config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(images()), model.eval()(images()))
    high = config.replace(distance_threshold=1e6)
    with pytest.raises(ValueError, match=r"distance_threshold: got 1000000.0, which leaves all 6"):
        wrap(TINY.create(), None, input_prompt=high).fit_clusters(images())
    many = tcpa.DAMVPConfig(num_clusters=7)
    with pytest.raises(ValueError, match="images: got 6, expected at least 7, one for each"):
        wrap(TINY.create(), None, input_prompt=many).fit_clusters(images())


@pytest.mark.parametrize("scaled", [False, True])
def test_autovp_puts_the_image_into_a_border_of_trained_pixels(scaled):
    normalization = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    config = tcpa.AutoVPConfig(image_size=40, trainable_scale=scaled)
    options = {"input_prompt": config, "normalization": normalization}
    prompt = wrap(TINY.create(), None, **options).input_prompt
    with torch.no_grad():
        prompt.pixels.copy_(torch.randn_like(prompt.pixels))
    found = prompt(images())
    small = F.interpolate(images(), (40, 40), mode="bilinear", antialias=True)
    torch.testing.assert_close(found[:, :, 12:52, 12:52], small, rtol=1e-4, atol=1e-5)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in normalization)
    border = (torch.sigmoid(prompt.pixels) - mean) / std
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[12:52, 12:52] = False
    torch.testing.assert_close(found[2][:, outside], border[:, outside])
    found.square().sum().backward()
    assert (prompt.pixels.grad[:, ~outside] == 0).all() and (prompt.pixels.grad != 0).any()
    if scaled:
        assert prompt.scale.grad != 0
        with torch.no_grad():
            prompt.scale.fill_(100.0)
        # Never more than five times: the middle fifth of what was inside.
        middle = F.interpolate(small, scale_factor=5.0, mode="bilinear")[:, :, 68:132, 68:132]
        torch.testing.assert_close(prompt(images()), middle, rtol=1e-3, atol=1e-4)
    assert tcpa.AutoVPConfig().size_on(224) == 192


def test_frequent_sources_are_chosen_first_and_once():
    counts = torch.tensor([[9, 8], [7, 1], [0, 7], [2, 2], [0, 0]])
    assert frequency_mapping(counts, 1).tolist() == [[0], [2]]
    assert frequency_mapping(counts, 2).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("mapping", ["full", "frequency"])
def test_autovp_maps_the_logits_of_the_models_own_head(mapping):
    config = tcpa.AutoVPConfig(mapping=mapping, sources=2)
    backbone = TINY.create(num_classes=30)
    head = backbone.head.weight.clone()
    model = wrap(backbone, None, num_classes=4, input_prompt=config).eval()
    source = model.source_logits(images())
    assert source.shape == (6, 30) and model.num_classes == 4
    assert not any("head" in name for name in model.trainable_named_parameters())
    if mapping == "full":
        expected = model.mapping.linear(source)
    else:
        with pytest.raises(RuntimeError, match="mapping: no source classes are chosen yet"):
            model(images())
        labels = torch.arange(6) % 4
        counts = model.count_sources(images(), labels)
        assert counts.sum() == 6 and counts[source.argmax(1), labels].min() >= 1
        model.mapping.fit(counts)
        index = model.mapping.index
        assert index.shape == (4, 2) and len(index.unique()) == 8
        expected = torch.stack([source[:, one].mean(1) for one in index], dim=1)
    torch.testing.assert_close(model(images()), expected)
    model(images()).sum().backward()
    assert torch.equal(backbone.head.weight, head) and backbone.head.weight.grad is None
    with pytest.raises(ValueError, match="num_classes: got a model with an output mapping"):
        model.reset_classifier(3)


# LION.


def test_an_equilibrium_is_a_fixed_point_with_its_exact_gradient():
    weight = torch.randn(4, 4, dtype=F64, requires_grad=True)
    inject = torch.randn(3, 4, dtype=F64, requires_grad=True)

    def solve(weight, inject):
        bounded = contracted(weight, 0.6)
        assert (bounded.abs().sum(1) <= 0.6 + 1e-12).all()
        step = lambda state: torch.tanh(F.linear(state, bounded) + inject)  # noqa: E731
        state = equilibrium(step, torch.zeros_like(inject), 80)
        torch.testing.assert_close(state, step(state), rtol=0, atol=1e-12)
        return state

    assert gradcheck(solve, (weight, inject), check_undefined_grad=False)


def test_lion_starts_as_the_plain_model_and_learns_both_prompts():
    config = tcpa.LIONConfig(hidden=8)
    model = wrap(TINY.create(), None, input_prompt=config).eval()
    plain = TINY.create().eval()
    torch.testing.assert_close(model(images()), plain(images()), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="features: got a model whose head also reads the image"):
        model.forward_head(model.forward_features(images()))
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.arange(6) % 5).backward()
        optimizer.step()
    parts = (model.input_prompt, model.feature_prompt)
    assert all((p.grad != 0).any() for part in parts for p in part.parameters())
    assert not torch.allclose(model(images()), plain(images()))


# Tunings.


def test_adapters_are_the_formulas_of_their_papers():
    block = TINY.create(F64).blocks[0]
    x = torch.randn(2, 5, 192, dtype=F64)
    for tuning, beside in ((tcpa.AdapterTuning(), False), (tcpa.AdaptFormerTuning(), True)):
        model = wrap(TINY.create(F64), None, tuning=tuning).double().eval()
        adapter = model.adapters[0]
        assert adapter.down.out_features == (64 if beside else 24)
        assert (adapter.up.weight == 0).all() and (adapter.down.weight != 0).any()
        # Nothing is added at first.
        plain = wrap(TINY.create(F64), None, tuning=tcpa.HeadTuning(head=tuning.head)).double()
        normal = images(2).double()
        features = plain.eval().forward_features(normal)
        torch.testing.assert_close(model.forward_features(normal), features)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn_like(parameter))
        y = block.mlp(block.norm2(x))
        if beside:
            expected = x + y + 0.1 * adapter.up(adapter.down(x).relu())
        else:
            expected = x + y + adapter.up(F.gelu(adapter.down(y)))
        found = finish_block(block, x, adapter)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_adapters_of_zeros_train_their_last_biases_alone():
    model = wrap(TINY.create(), None, tuning=tcpa.AdapterTuning(zero_init=True))
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in model.adapters.named_parameters() if bool((p != 0).any())}
    assert moved == {"0.up.bias", "1.up.bias"}


def test_the_side_network_is_blended_with_the_feature():
    model = wrap(TINY.create(), None, tuning=tcpa.SideTuning(pretrained=False)).eval()
    side = model.side
    assert side.blend == 0 and side.project.bias is None
    with torch.no_grad():
        side.blend.fill_(1.5)
        plain = model.plain_features(images())
        x = F.adaptive_avg_pool2d(side.features(images()), (6, 6)).flatten(1)
        share = 1 / (1 + math.exp(-1.5))
        feature = share * plain + (1 - share) * (x @ side.project.weight.T)
        expected = model.backbone.head(feature)
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)


def test_pretrained_weights_that_cannot_be_had_are_named(monkeypatch):
    from torchvision.models import AlexNet_Weights

    def fail(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(AlexNet_Weights, "get_state_dict", fail)
    with pytest.raises(RuntimeError, match=r"could not load AlexNet's weights .no route to host"):
        wrap(TINY.create(), None, tuning=tcpa.SideTuning())


def test_heads_start_as_their_sources_say():
    head = wrap(TINY.create(), None, num_classes=50, tuning=tcpa.HeadTuning(head="prior"))
    layer = head.backbone.head
    assert (layer.bias == -math.log(99)).all()
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 50), rel=0.05)
    normed = wrap(TINY.create(), None, tuning=tcpa.HeadTuning(head="normed")).backbone.head
    assert not normed[0].affine and normed[0].eps == 1e-6
    assert (
        normed[1].weight.std().item() == pytest.approx(0.01, rel=0.1)
        and (normed[1].bias == 0).all()
    )
    mlp = wrap(TINY.create(), None, num_classes=7, tuning=tcpa.MLPHeadTuning()).backbone.head
    kinds = [type(layer).__name__ for layer in mlp]
    assert kinds == ["Linear", "ReLU", "HeadNorm", "Dropout"] * 2 + ["Linear"]
    assert mlp[0].weight.std().item() == pytest.approx(math.sqrt(2 / 192), rel=0.05)
    assert mlp[3].p == 0.1 and mlp[-1].out_features == 7


def test_normed_heads_count_in_training_and_take_one_image():
    model = wrap(TINY.create(), None, tuning=tcpa.AdaptFormerTuning(dropout=0.0))
    norm = model.backbone.head[0]
    assert norm.training and not model.backbone.blocks[0].training
    model(images())
    mean = norm.running_mean.clone()
    assert (mean != 0).any()
    model(images(1))
    assert torch.equal(norm.running_mean, mean)
    model.eval()(images())
    assert torch.equal(norm.running_mean, mean)


def test_full_tuning_drops_in_training_alone():
    model = wrap(TINY.create(), None, tuning=tcpa.FullTuning(dropout=0.5))
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), model(images()))


def test_what_is_trained_of_the_backbone():
    def names(tuning):
        model = wrap(TINY.create(), None, tuning=tuning)
        found = {n for n, p in model.named_parameters() if p.requires_grad}
        assert found == set(model.trainable_named_parameters())
        return {n.removeprefix("backbone.") for n in found} - {"head.weight", "head.bias"}

    everything = {n for n, _ in TINY.create().named_parameters()} - {"head.weight", "head.bias"}
    assert names(tcpa.FullTuning()) == everything
    assert names(tcpa.BiasTuning()) == {n for n in everything if n.endswith("bias")}
    last = {n for n in everything if n.startswith(("blocks.1.", "norm."))}
    assert names(tcpa.LastBlockTuning()) == last
    assert names(tcpa.HeadTuning()) == set()


# Saving.

SAVED = {
    "e2vpt": {"config": tcpa.E2VPTConfig(length=3)},
    "gated-mlp": {"config": tcpa.GatedPromptConfig(length=3), "tuning": tcpa.MLPHeadTuning()},
    "vp-bias": {"config": None, "input_prompt": tcpa.VPConfig(), "tuning": tcpa.BiasTuning()},
    "dam-vp-tcpa": {"config": tcpa.TCPAConfig(), "input_prompt": tcpa.DAMVPConfig(num_clusters=3)},
    "autovp-frequency": {"config": None, "input_prompt": tcpa.AutoVPConfig(mapping="frequency")},
    "autovp-scale": {"config": None, "input_prompt": tcpa.AutoVPConfig(trainable_scale=True)},
    "lion": {"config": None, "input_prompt": tcpa.LIONConfig(hidden=4)},
    "adaptformer": {"config": None, "tuning": tcpa.AdaptFormerTuning()},
    "side": {"config": None, "tuning": tcpa.SideTuning(pretrained=False)},
    "full": {"config": tcpa.VPTConfig(), "tuning": tcpa.FullTuning()},
}


@pytest.mark.parametrize("choices", SAVED.values(), ids=SAVED)
def test_all_that_training_decides_is_saved(choices, tmp_path):
    mapped = getattr(choices.get("input_prompt"), "maps_logits", False)
    classes = 30 if mapped else 5
    model = wrap(TINY.create(num_classes=classes), num_classes=4, **choices)
    if isinstance(model.input_config, tcpa.DAMVPConfig) or mapped:
        with pytest.raises(ValueError, match="got one that was not fitted, expected one that was"):
            model.save_pretrained(tmp_path)
    if isinstance(model.input_config, tcpa.DAMVPConfig):
        model.fit_clusters(images())
    if mapped:
        model.mapping.fit(model.count_sources(images(), torch.arange(6) % 4))
    if isinstance(model.config, tcpa.E2VPTConfig):
        model.tokens.prune(torch.arange(3.0), torch.rand(3, 16), 0.34, 0.5)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.arange(6) % 4).backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    again = tcpa.from_pretrained(tmp_path, backbone=TINY.create(num_classes=classes))
    assert (again.config, again.input_config, again.tuning) == (
        model.config,
        model.input_config,
        model.tuning,
    )
    assert torch.equal(again(images()), model.eval()(images()))
    for name, value in model.trained_tensors().items():
        found = again.trained_tensors()[name]
        assert torch.equal(found, value) and found.dtype == value.dtype


def test_frozen_weights_are_checked_also_where_others_are_trained(tmp_path):
    model = wrap(TINY.create(), None, tuning=tcpa.LastBlockTuning())
    model.save_pretrained(tmp_path)
    other = TINY.create()
    with torch.no_grad():
        other.blocks[1].mlp.fc1.weight.add_(1.0)
    assert torch.equal(tcpa.from_pretrained(tmp_path, backbone=other)(images()), model(images()))
    other = TINY.create()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.add_(1.0)
    with pytest.raises(ValueError, match="backbone: got weights"):
        tcpa.from_pretrained(tmp_path, backbone=other)


# Refusals.

DAMVP, AUTOVP = tcpa.DAMVPConfig(), tcpa.AutoVPConfig(mapping="full")
NOT_SENSIBLE = [
    ({"tuning": tcpa.VPConfig()}, TypeError, "tuning"),
    ({"input_prompt": 3}, TypeError, "input_prompt"),
    ({"input_prompt": DAMVP, "tuning": tcpa.FullTuning()}, ValueError, "tuning"),
    ({"input_prompt": tcpa.VPConfig(width=32)}, ValueError, "input_prompt: width"),
    ({"input_prompt": tcpa.AutoVPConfig(image_size=64)}, ValueError, "input_prompt: image_size"),
    (
        {"input_prompt": tcpa.AutoVPConfig(mapping="frequency", sources=2), "num_classes": 3},
        ValueError,
        "mapping: source classes",
    ),
    ({"input_prompt": AUTOVP}, ValueError, "num_classes"),
    (
        {"input_prompt": AUTOVP, "tuning": tcpa.MLPHeadTuning(), "num_classes": 3},
        ValueError,
        "tuning",
    ),
    ({"tuning": tcpa.LastBlockTuning(num_blocks=3)}, ValueError, "tuning: num_blocks"),
    ({"config": tcpa.E2VPTConfig(segments=5)}, ValueError, "segments"),
]


@pytest.mark.parametrize(("choices", "kind", "argument"), NOT_SENSIBLE)
def test_what_makes_no_sense_is_refused(choices, kind, argument):
    with pytest.raises(kind, match=f"^{argument}: got"):
        wrap(TINY.create(), **({"config": None} | choices))


def test_the_side_network_takes_grey_and_small_images():
    grey = torch.randn(2, 1, 21, 42)
    seen = for_alexnet(grey)
    assert seen.shape == (2, 3, 63, 126) and torch.equal(seen[:, 0], seen[:, 2])
    large = torch.randn(1, 3, 64, 63)
    assert torch.equal(for_alexnet(large), large)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, in_chans=1)
    side = tcpa.SideTuning(pretrained=False)
    model = wrap(vit, None, num_classes=3, tuning=side, normalization=((0.5,), (0.5,)))
    model(torch.randn(2, 1, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.side.parameters())


def test_backbones_that_a_choice_does_not_fit_are_refused():
    radar = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, in_chans=4)
    four = ((0.5,) * 4, (0.5,) * 4)
    with pytest.raises(ValueError, match="tuning: got 4 channels"):
        wrap(radar, None, tuning=tcpa.SideTuning(pretrained=False), normalization=four)
    with pytest.raises(ValueError, match="tuning: got a backbone with 2 heads"):
        wrap(ARCHITECTURES["deit-distilled"].create(), None, input_prompt=tcpa.LIONConfig())
    with pytest.raises(ValueError, match=r"tuning: got a backbone in torch\.bfloat16"):
        wrap(TINY.create(torch.bfloat16), None, tuning=tcpa.BiasTuning())
    flexible = ARCHITECTURES["dynamic-size"]
    with pytest.raises(ValueError, match="images: got size"):
        wrap(flexible.create(), None, input_prompt=tcpa.VPConfig())(flexible.images())
