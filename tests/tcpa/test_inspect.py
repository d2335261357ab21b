"""`tcpa.inspect` measures what it says: every figure against one counted by hand or by a loop."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from models import ARCHITECTURES
from torch import Tensor

from tcpa import TCPAConfig, VPTConfig, inspect, unpack_gate, wrap
from tcpa.inspect import feature_space
from tcpa.inspect.style import entry_colours, ink_on

CONFIG = TCPAConfig(
    cls_pool_size=5, image_pool_size=9, cls_top_k=2, image_top_k=3, random_selection_epochs=0
)


def make(config=CONFIG, name: str = "vit-tiny", batch: int = 4):
    architecture = ARCHITECTURES[name]
    torch.manual_seed(3)
    return wrap(architecture.create(), config), architecture.images(batch)


def by_hand(order: list, entries: int = 4, grid: tuple[int, int] = (2, 2)) -> inspect.Selections:
    """Selections of one block; `order` has the entries of each patch of each image."""
    image = np.array([order], np.int16)
    cls = np.zeros((1, image.shape[1], 1, 1), np.int16)
    return inspect.Selections(image=image, cls=cls, num_pool=(2, entries), grid=grid)


# Selections.


@pytest.mark.parametrize(
    "name", ["vit-tiny", "dinov2-registers", "gap-without-cls", "dynamic-size"]
)
def test_selections_are_the_gate_in_order_of_similarity(name: str) -> None:
    model, images = make(name=name)
    found = inspect.selections(model, images, batch_size=3)
    prefix = model.backbone.num_prefix_tokens
    cls_rows = model.config.cls_rows
    gates = model.selection(images)
    for number, gate in enumerate(gates):
        visible = unpack_gate(gate, model.config.num_prompts).numpy()
        assert (visible[:, prefix:, cls_rows:] == found.visible()[number]).all()
        assert (visible[:, :prefix, :cls_rows] == found.visible("cls")[number]).all()
    assert math.prod(found.grid) == found.image.shape[2] == visible.shape[1] - prefix
    with torch.no_grad(), model.capture(features=True) as record:
        model.eval()(images)
    x = record[1].inputs
    assert x is not None and model.pools is not None
    similarity = torch.cosine_similarity(x[:, prefix:, None], model.pools.image_keys[1], dim=-1)
    expected = similarity.topk(3).indices.numpy()
    assert (found.image[1] == expected).all()
    assert len(np.unique(expected[..., 0])) > 1


def test_rows_of_an_entry_and_farthest_selection() -> None:
    config = TCPAConfig(
        cls_pool_size=2,
        image_pool_size=6,
        cls_prompt_length=3,
        image_prompt_length=2,
        cls_top_k=1,
        image_top_k=2,
        selection="farthest",
    )
    model, images = make(config)
    found = inspect.selections(model, images)
    with torch.no_grad(), model.capture(features=True) as record:
        model.eval()(images)
    x = record[0].inputs
    assert x is not None and model.pools is not None
    similarity = torch.cosine_similarity(x[:, 1:, None], model.pools.image_keys[0], dim=-1)
    assert (found.image[0] == similarity.topk(2, largest=False).indices.numpy()).all()


def test_usage_counts() -> None:
    found = by_hand([[[0, 1], [0, 2], [1, 0], [0, 1]], [[2, 0], [0, 1], [0, 1], [0, 1]]])
    counted = inspect.usage(found)
    np.testing.assert_allclose(counted.seen, [[1.0, 6 / 8, 2 / 8, 0.0]])
    np.testing.assert_allclose(counted.first, [[6 / 8, 1 / 8, 1 / 8, 0.0]])
    assert counted.dead.tolist() == [1]
    np.testing.assert_allclose(
        counted.entropy, [-sum(p * math.log2(p) for p in (1 / 2, 3 / 8, 1 / 8))]
    )
    np.testing.assert_allclose(counted.first_entropy, [0.75 * math.log2(4 / 3) + 0.25 * 3])
    equal = by_hand([[[0, 1], [1, 2], [2, 3], [3, 0]]])
    np.testing.assert_allclose(inspect.usage(equal).entropy, [2.0])
    assert inspect.usage(by_hand([[[3]] * 4])).entropy.tolist() == [0.0]


def test_overlap_counts() -> None:
    # Patches 0 and 1 agree, 2 and 3 agree, the two rows share nothing.
    found = by_hand([[[0, 1], [1, 0], [2, 3], [3, 2]]])
    measured = inspect.overlap(found)
    # Four pairs of neighbours, two alike; six pairs of patches, two alike.
    np.testing.assert_allclose(measured.neighbours, [0.5])
    np.testing.assert_allclose(measured.pairs, [2 / 6])
    half = inspect.overlap(by_hand([[[0, 1], [1, 2], [0, 1], [1, 2]]]))
    np.testing.assert_allclose(half.neighbours, [(1 / 3 + 1 / 3 + 1 + 1) / 4])
    with pytest.raises(ValueError, match="1 selected entries of 1 patches"):
        inspect.overlap(by_hand([[[0]]], grid=(1, 1)))


@given(st.integers(1, 12), st.data())
@settings(max_examples=20, deadline=None)
def test_the_overlap_by_chance_is_that_of_random_subsets(entries: int, data) -> None:
    top_k = data.draw(st.integers(1, entries))
    generator = np.random.default_rng(entries * 100 + top_k)
    draws = generator.permuted(np.tile(np.arange(entries), (2, 4000, 1)), axis=2) < top_k
    common = (draws[0] & draws[1]).sum(1)
    expected = inspect.expected_jaccard(entries, top_k)
    measured = (common / (2 * top_k - common)).mean()
    assert abs(measured - expected) < 0.04
    assert top_k < entries or expected == pytest.approx(1)


def test_change_counts() -> None:
    before = by_hand([[[0, 1], [0, 1], [2, 3], [2, 3]]])
    after = by_hand([[[1, 0], [0, 2], [2, 3], [0, 1]]])
    measured = inspect.change(before, after)
    np.testing.assert_allclose(measured.replaced, [(0 + 1 / 2 + 0 + 1) / 4])
    np.testing.assert_allclose(measured.first, [2 / 4])
    assert inspect.change(after, after).replaced.tolist() == [0.0]
    with pytest.raises(ValueError, match=r"before: got shape .* inspect the same images"):
        inspect.change(by_hand([[[0], [0], [0], [0]]]), after)


def test_without_a_selection_there_is_a_reason() -> None:
    role = TCPAConfig(coordination="role", cls_pool_size=2, image_pool_size=3)
    for config, reason in (
        (VPTConfig(), "a model without TCPA"),
        (None, "a model without TCPA"),
        (role, "coordination='role', where every token sees the whole pool of its role"),
    ):
        model, images = make(config)
        assert reason in str(inspect.why_nothing_is_selected(model))
        with pytest.raises(ValueError, match=reason):
            inspect.selections(model, images)
    assert inspect.why_nothing_is_selected(make()[0]) is None


def test_pools_without_entries_or_choices() -> None:
    config = TCPAConfig(cls_pool_size=0, image_pool_size=3, cls_top_k=0, image_top_k=0)
    model, images = make(config)
    found = inspect.selections(model, images)
    assert inspect.usage(found).dead.tolist() == [3, 3]
    assert inspect.usage(found, "cls").seen.shape == (2, 0)
    with pytest.raises(ValueError, match="found: got 0 selected entries"):
        inspect.overlap(found)
    with pytest.raises(ValueError, match="no selections"):
        inspect.change(found, found)


# Attention.


@pytest.mark.parametrize("config", [CONFIG, VPTConfig(length=3), VPTConfig(deep=False), None])
def test_attention_maps_are_the_captured_rows(config) -> None:
    model, images = make(config)
    queries = (inspect.patch_token(model, images, 2, 3), 0)
    maps = inspect.attention_maps(model, images, queries=queries, batch_size=3)
    with torch.no_grad(), model.capture() as record:
        model.eval().forward_features(images)
    assert maps.queries == (0, 12) and maps.blocks == (0, 1) and maps.grid == (4, 4)
    for number, block in record.items():
        assert block.attention is not None
        expected = block.attention[:, :, [0, 12]].mean(1, keepdim=True).numpy()
        np.testing.assert_allclose(maps.weights[number], expected, rtol=1e-4, atol=1e-7)
        one = inspect.attention_maps(model, images, blocks=[number], queries=(12,), head=2)
        expected = block.attention[:, 2:3, [12]].numpy()
        np.testing.assert_allclose(one.weights[0], expected, rtol=1e-4, atol=1e-7)
    patches = maps.patches()
    assert patches.shape == (2, 4, 1, 2, 4, 4)
    np.testing.assert_array_equal(patches[..., 2, 3], maps.weights[..., 12])
    shares = maps.shares()
    np.testing.assert_allclose(shares.sum(-1), maps.weights.sum(-1), rtol=1e-5)
    if config is None:
        np.testing.assert_allclose(shares[..., 2], 0)
        np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)
    else:
        assert (shares[..., 2] > 0).all()


# Diversity.


def test_effective_rank_of_known_matrices() -> None:
    of_two = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    ranks = [(torch.eye(5), 5.0), (torch.ones(4, 7), 1.0), (torch.zeros(3, 3), 0.0),
             (torch.diag(torch.tensor([3.0, 1.0])), of_two)]  # fmt: skip
    for matrix, expected in ranks:
        assert float(inspect.effective_rank(matrix)) == pytest.approx(expected, rel=1e-5)
    assert inspect.effective_rank(torch.randn(2, 3, 4, 5)).shape == (2, 3)


@given(arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=6),
              elements=st.floats(-3, 3)))  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_the_effective_rank_lies_below_the_rank_and_knows_no_scale(values: np.ndarray) -> None:
    matrix = torch.from_numpy(values)
    rank = float(inspect.effective_rank(matrix))
    assert rank <= min(matrix.shape) + 1e-9
    if np.abs(values).max() > 1e-3:
        assert rank >= 1 - 1e-9
        assert float(inspect.effective_rank(7 * matrix.mT)) == pytest.approx(rank)


@pytest.mark.parametrize("config", [CONFIG, None])
def test_diversity_against_a_loop(config) -> None:
    model, images = make(config, batch=3)
    found = inspect.diversity(model, images, batch_size=2)
    with torch.no_grad(), model.capture(features=True) as record:
        model.eval().forward_features(images)
    for number, block in record.items():
        assert block.attention is not None and block.outputs is not None
        for image in range(3):
            heads = block.attention[image].double()
            ranks = [spectrum_rank(head) for head in heads]
            assert found.attention_rank[number, image] == pytest.approx(np.mean(ranks), rel=1e-4)
            rows = heads / heads.sum(-1, keepdim=True)
            entropy = -(rows * rows.clamp_min(1e-30).log2()).sum(-1).mean()
            assert found.attention_entropy[number, image] == pytest.approx(float(entropy), rel=1e-4)
            tokens = block.outputs[image].double()
            rank = spectrum_rank(tokens - tokens.mean(0))
            assert found.feature_rank[number, image] == pytest.approx(rank, rel=1e-4)
            entropy = found.feature_entropy[number, image]
            assert entropy == pytest.approx(math.log2(rank), rel=1e-4)


def spectrum_rank(matrix: Tensor) -> float:
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return math.exp(-(shares * np.log(shares)).sum())


# Features.


def test_features_are_what_the_head_reads() -> None:
    for name in ("vit-tiny", "gap-with-register"):
        model, images = make(name=name)
        found = inspect.features(model, images, batch_size=3)
        head = model.backbone.head
        logits = torch.from_numpy(found) @ head.weight.T + head.bias
        torch.testing.assert_close(logits, model.eval()(images), rtol=1e-4, atol=1e-5)
    assert model.train().training
    inspect.features(model, images)
    assert model.training and model.pools is not None and model.pools.training


def test_separation_of_known_points() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([3, 8], 30)
    near = generator.normal(size=(60, 4))
    far = near + 100 * (labels == 8)[:, None]
    apart = inspect.separation(far, labels)
    assert apart.knn_accuracy == 100 and apart.silhouette > 0.95 and apart.variance_ratio > 100
    mixed = inspect.separation(near, labels)
    assert mixed.knn_accuracy < 80 and abs(mixed.silhouette) < 0.1 and mixed.variance_ratio < 0.2
    square = np.array([[0.0], [2.0], [10.0], [12.0]])
    exact = inspect.separation(square, np.array([0, 0, 1, 1]), neighbours=1)
    # Centres 1 and 11 around 6: 4 * 25 between, 4 * 1 within.
    assert exact.variance_ratio == pytest.approx(25)
    # Nearest other point at 2; to the other class 11 or 9 on average.
    assert exact.silhouette == pytest.approx((9 / 11 + 7 / 9) / 2)
    assert exact.knn_accuracy == 100 and exact.classes == 2 and exact.points == 4
    # A point is not its own neighbour, even where another lies on it.
    doubled = inspect.separation(np.zeros((4, 1)), np.array([0, 1, 0, 1]), neighbours=3)
    assert doubled.knn_accuracy == 0


def test_tsne_keeps_groups_together_and_asks_for_open_tsne_of_many(monkeypatch) -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(40, 6)) + 50 * np.repeat([0, 1], 20)[:, None]
    found = inspect.tsne(points, seed=1)
    assert found.shape == (40, 2) and found.dtype == np.float32
    np.testing.assert_array_equal(found, inspect.tsne(points, seed=1))
    assert inspect.separation(found, np.repeat([0, 1], 20)).silhouette > 0.5
    monkeypatch.setattr(feature_space, "MANY", 10)
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(ModuleNotFoundError, match=r"more than the 10 .* pip install openTSNE"):
        inspect.tsne(points)


# Figures.


def test_figures_have_titles_axes_and_units() -> None:
    model, images = make()
    found = inspect.selections(model, images)
    maps = inspect.attention_maps(model, images)
    picture = np.random.default_rng(0).random((64, 64, 3))
    line = inspect.Series("TCPA", [1, 2], [3.0, 4.0], [0.1, 0.2])
    figures = {
        "patch column": inspect.draw_selection(picture, found.image[0, 0], found.grid, 9),
        "entry of the pool": inspect.draw_usage(inspect.usage(found).seen),
        " patch column": inspect.draw_attention(picture[..., 0], maps.patches()[0, 0, 0, 0]),
        "  patch column": inspect.draw_attention_surface(maps.patches()[0, 0, 0, 0]),
        "t-SNE 1, no unit": inspect.draw_points(np.zeros((4, 2)), np.arange(4) % 2, ["a", "b"]),
        "block": inspect.draw_lines([line], xlabel="block", ylabel="rank, tokens", title="Rank"),
    }
    for xlabel, figure in figures.items():
        axes = figure.axes[0]
        assert axes.get_xlabel() == xlabel.strip() and axes.get_title() and axes.get_ylabel()
        figure.savefig(__import__("io").BytesIO(), format="png")
    numbers = [text.get_text() for text in figures["patch column"].axes[0].texts]
    assert numbers == [str(entry) for entry in found.image[0, 0, :, 0]]


def test_colours_are_colours_and_differ_up_to_24() -> None:
    for count in (0, 1, 8, 24, 40):
        colours = entry_colours(count)
        assert len(colours) == count and len(set(colours)) == min(count, 24)
        assert all(ink_on(colour) in ("#000000", "#ffffff") for colour in colours)


# Imports and messages.


def test_drawing_and_learning_libraries_are_imported_late() -> None:
    code = (
        "import sys, tcpa; assert 'tcpa.inspect' not in sys.modules; tcpa.inspect.selections;"
        "sys.exit(any(n in sys.modules for n in ('matplotlib', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_messages() -> None:
    model, images = make()
    points = np.zeros((3, 2))
    calls = [
        (lambda: inspect.selections(model, images[:0]), "images"),
        (lambda: inspect.features(model, images[0]), "images"),
        (lambda: inspect.diversity(model, images[:, :1]), "images"),
        (lambda: inspect.features(model, images, batch_size=0), "batch_size"),
        (lambda: inspect.attention_maps(model, images, head=3), "head"),
        (lambda: inspect.attention_maps(model, images, queries=(17,)), "queries"),
        (lambda: inspect.patch_token(model, images, 4, 0), "row"),
        (lambda: inspect.usage(by_hand([[[0]] * 4]), "patch"), "pool"),  # type: ignore
        (lambda: inspect.separation(points, np.zeros(3)), "labels"),
        (lambda: inspect.separation(points, np.arange(2)), "labels"),
        (lambda: inspect.separation(points * math.nan, np.arange(3)), "points"),
        (lambda: inspect.tsne(points), "points"),
        (lambda: inspect.draw_selection(np.zeros((8, 8)), np.zeros((3, 1)), (2, 2), 4), "order"),
    ]
    for call, argument in calls:
        with pytest.raises(ValueError, match=f"^{argument}: got"):
            call()
    with pytest.raises(TypeError, match=r"^model: got Linear"):
        inspect.features(torch.nn.Linear(1, 1), images)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^images: got ndarray"):
        inspect.features(model, images.numpy())  # type: ignore[arg-type]
