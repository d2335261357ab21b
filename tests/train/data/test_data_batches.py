"""Batches: torchvision's pixels, an order that nothing but seed and epoch decides, fair shares."""

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from dataset_trees import write_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tcpa.cli import UsageError
from tcpa.train.data import delivery
from tcpa.train.data.batches import Batches, local_rows
from tcpa.train.data.cached import open_cached
from tcpa.train.data.crops import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Crops,
    Transform,
    gather_crops,
    gather_enlarged_crops,
)
from tcpa.train.data.decoding import resized_size
from tcpa.train.data.delivery import Memory, Resident
from tcpa.train.data.splits import open_split

RESIZE, CROP = 40, 32
TRAIN = Transform(train=True, crop=CROP)
TEST = Transform(train=False, crop=CROP)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photos of several shapes: 3 classes of 7 training images, 21 test images."""
    folder = tmp_path_factory.mktemp("cub")
    return write_tree("cub", folder, classes=3, per_class=7, size=(61, 47))


@pytest.fixture(scope="module")
def train(root):
    return open_cached("cub", root, "trainval", protocol="val", resize=RESIZE)


@pytest.fixture(scope="module")
def test(root):
    return open_cached("cub", root, "test", resize=RESIZE)


def batches(split, **settings) -> Batches:
    chosen = {"batch_size": 8, "transform": TRAIN, "device": "cpu", "seed": 1, "shuffle": True}
    return Batches(split, **(chosen | settings))


def flat(epoch) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(epoch)
    return torch.cat([b.images for b in parts]), torch.cat([b.labels for b in parts])


def test_evaluation_equals_torchvision(root, test) -> None:
    compose = T.Compose(
        [
            T.Resize(RESIZE),
            T.CenterCrop(CROP),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    split = open_split("cub", root, "test")
    expected = torch.stack([compose(split.pool.load(int(row))) for row in split.rows])
    images, labels = flat(batches(test, transform=TEST, shuffle=False).epoch(0))
    assert torch.equal(images, expected)
    assert labels.tolist() == split.labels.tolist()


def test_training_equals_torchvision_on_the_same_crops(root, train, monkeypatch) -> None:
    chosen = []
    places = Transform.places

    def recorded(self, *arguments):
        chosen.append(places(self, *arguments))
        return chosen[-1]

    monkeypatch.setattr(Transform, "places", recorded)
    made = batches(train)
    images, _ = flat(made.epoch(3))
    order = made.plan(3).samples
    split = open_split("cub", root, "trainval", protocol="val")
    for image, sample, top, left, flip in zip(images, order, *chosen[0], strict=True):
        picture = F.resize(split.pool.load(int(split.rows[sample])), [RESIZE])
        picture = F.crop(picture, int(top), int(left), CROP, CROP)
        picture = F.hflip(picture) if flip else picture
        expected = F.normalize(F.to_tensor(picture), IMAGENET_MEAN, IMAGENET_STD)
        assert torch.equal(image, expected)
    assert {True, False} == set(chosen[0][2].tolist())
    assert len(set(chosen[0][0].tolist())) > 3


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(5, 30),
    width=st.integers(5, 30),
    side=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_the_gather_of_devices_equals_slices(height, width, side, seed) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(height, width), (width, height), (6, 5)]
    images = [torch.from_numpy(rng.integers(0, 256, (3, h, w), np.uint8)) for h, w in shapes]
    pixels = torch.cat([image.reshape(-1) for image in images])
    rows = torch.tensor([2, 0, 1, 0])
    sizes = torch.tensor(shapes)
    offsets = torch.tensor([0, 3 * height * width, 6 * height * width])
    heights, widths = sizes[rows].T
    top = torch.from_numpy(rng.integers(0, heights - side + 1))
    left = torch.from_numpy(rng.integers(0, widths - side + 1))
    flip = torch.from_numpy(rng.random(4) < 0.5)
    sizes = (heights, widths, heights, widths)
    found = gather_crops(pixels, Crops(offsets[rows], *sizes, top, left, flip), side)
    for n in range(4):
        crop = images[rows[n]][:, top[n] : top[n] + side, left[n] : left[n] + side]
        assert torch.equal(found[n], crop.flip(2) if flip[n] else crop)


def test_a_resident_set_gives_the_same_batches(train) -> None:
    """The path of accelerators, run on a CPU; only where the bytes lie is another."""
    device = torch.device("cpu")
    resident = Resident(train.cache, TRAIN, device)
    images = torch.cat(list(resident.images(batches(train).plan(2), 0)))
    assert torch.equal(images, flat(batches(train).epoch(2))[0])
    assert not train.cache.small


def test_train_and_val_share_a_resident_set(train) -> None:
    device = torch.device("meta")
    first, second = (Resident(train.cache, transform, device) for transform in (TRAIN, TEST))
    assert first._pixels is second._pixels
    del first
    assert (train.cache.folder, device) in delivery._resident
    del second
    assert (train.cache.folder, device) not in delivery._resident


@pytest.mark.parametrize("name", ["cifar10", "svhn", "gtsrb"])
def test_small_images_are_kept_small_and_enlarged_as_torchvision_does(name, tmp_path) -> None:
    root = write_tree(name, tmp_path, classes=3, per_class=6, size=(25, 31))
    split = open_cached(name, root, "test", resize=80)
    assert split.cache.small
    assert split.cache.about["bytes"] < 18 * 3 * 32 * 34
    transform = Transform(train=False, crop=64)
    made = batches(split, transform=transform, shuffle=False)
    images, _ = flat(made.epoch(0))
    opened = open_split(name, root, "test")
    compose = T.Compose([T.Resize(80), T.CenterCrop(64), T.ToTensor()])
    expected = torch.stack([compose(opened.pool.load(int(row))) for row in opened.rows])
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(images, (expected - mean) / std)
    for chosen in (transform, Transform(train=True, crop=64)):
        made = batches(split, transform=chosen)
        resident = Resident(split.cache, chosen, torch.device("cpu"))
        gathered = torch.cat(list(resident.images(made.plan(1), 0)))
        assert torch.equal(gathered, flat(made.epoch(1))[0])


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    grow=st.integers(0, 60),
    black_and_white=st.booleans(),
    seed=st.integers(0, 999),
)
def test_enlarging_on_a_device_is_pillows(height, width, grow, black_and_white, seed) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    if black_and_white:
        image = np.where(image < 128, np.uint8(0), np.uint8(255))
    scaled_width, scaled_height = resized_size(width, height, min(height, width) + grow)
    expected = np.asarray(
        Image.fromarray(image).resize((scaled_width, scaled_height), Image.Resampling.BILINEAR)
    )
    side = min(scaled_width, scaled_height)
    top = int(rng.integers(0, scaled_height - side + 1))
    left = int(rng.integers(0, scaled_width - side + 1))
    expected = expected[top : top + side, left : left + side].transpose(2, 0, 1)
    flip = bool(rng.random() < 0.5)
    numbers = (0, height, width, scaled_height, scaled_width, top, left, flip)
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy()).reshape(-1)
    crops = Crops(*(torch.tensor([n]) for n in numbers))
    found = gather_enlarged_crops(pixels, crops, side)
    assert np.array_equal(found[0], expected[:, :, ::-1] if flip else expected)


def test_places_cover_all_and_nothing_else() -> None:
    heights, widths = np.full(4000, CROP + 2), np.full(4000, CROP + 5)
    chances = np.random.default_rng(0).random((4000, 3))
    top, left, flip = TRAIN.places(heights, widths, chances)
    assert np.bincount(top).min() > 1200 and len(np.bincount(top)) == 3
    assert np.bincount(left).min() > 550 and len(np.bincount(left)) == 6
    assert 0.45 < flip.mean() < 0.55
    edge = np.full((1, 3), np.nextafter(1, 0))
    top, left, flip = TRAIN.places(heights[:1], widths[:1], edge)
    assert (top[0], left[0], flip[0]) == (2, 5, False)
    # An image of the size of the crop leaves no choice.
    top, left, _ = TRAIN.places(np.array([CROP]), np.array([CROP]), edge)
    assert (top[0], left[0]) == (0, 0)


def test_order_depends_on_seed_and_epoch_only(train) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = flat(batches(train).epoch(0))
    again = flat(batches(train).epoch(0))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], flat(batches(train).epoch(1))[0])
    assert not torch.equal(first[0], flat(batches(train, seed=2).epoch(0))[0])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    for epoch in range(3):
        assert sorted(batches(train).plan(epoch).samples) == list(range(21))
    assert batches(train, shuffle=False).plan(5).samples.tolist() == list(range(21))


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_resuming_inside_an_epoch(train, start) -> None:
    whole = list(batches(train).epoch(4))
    rest = list(batches(train).epoch(4, start))
    assert len(rest) == len(whole) - start
    for ours, theirs in zip(rest, whole[start:], strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


@given(size=st.integers(0, 40), world=st.integers(1, 7))
def test_local_rows_keep_mixup_pairs(size, world) -> None:
    parts = [local_rows(size, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(parts)) == list(range(size))
    for rows in parts:
        assert (np.diff(rows) > 0).all()
        # Reversed locally means reversed globally.
        assert (rows[::-1] == size - 1 - rows).all()
        assert abs(len(rows) - size / world) <= 2


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_make_the_global_batch(train, world, even) -> None:
    alone = list(batches(train, even=even).epoch(1))
    ranks = [
        list(batches(train, even=even, rank=rank, world=world).epoch(1)) for rank in range(world)
    ]
    assert {len(parts) for parts in ranks} == {len(alone)}
    for number, batch in enumerate(alone):
        images = torch.empty_like(batch.images)
        for rank, parts in enumerate(ranks):
            part = parts[number]
            assert part.size == batch.size == len(batch.images)
            rows = torch.from_numpy(local_rows(batch.size, rank, world))
            images[rows] = part.images
            assert torch.equal(part.labels, batch.labels[rows])
        assert torch.equal(images, batch.images)


def test_an_even_last_batch(train) -> None:
    # 21 images: 8, 8 and 5, of which 4 stay.
    assert [b.size for b in batches(train, even=True).epoch(0)] == [8, 8, 4]
    assert [b.size for b in batches(train).epoch(0)] == [8, 8, 5]
    # One image alone would be left out: there is no such batch.
    made = batches(train, batch_size=10, even=True)
    assert [b.size for b in made.epoch(0)] == [10, 10]
    assert len(made) == 2
    assert len(batches(train, batch_size=10)) == 3
    assert [b.size for b in batches(train, batch_size=7, even=True).epoch(0)] == [6, 6, 6]


def test_more_ranks_than_images_in_a_batch(test) -> None:
    parts = [
        list(
            batches(test, batch_size=20, shuffle=False, transform=TEST, rank=rank, world=3).epoch(0)
        )[-1]
        for rank in range(3)
    ]
    assert [len(part.labels) for part in parts] == [1, 0, 0]
    assert parts[1].images.shape == (0, 3, CROP, CROP)
    assert [part.size for part in parts] == [1, 1, 1]


def test_what_batches_tell(train) -> None:
    made = batches(train)
    assert (made.num_classes, made.num_images, len(made)) == (3, 21, 3)
    assert made.class_names == ["001.Bird_z", "002.Bird_y", "003.Bird_x"]
    batch = next(made.epoch(0))
    assert batch.images.dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    assert batch.images.is_contiguous()


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    memory = Memory()

    def fill(value: float, count: int = 4) -> torch.Tensor:
        array = memory.take((count, 3))
        array[:] = value
        return torch.from_numpy(array)

    first = fill(1)
    address = first.data_ptr()
    held = fill(2)[1:, :2].t()
    assert held.data_ptr() != address
    del first
    again = fill(3, count=2)
    assert again.data_ptr() == address
    storage = fill(4).untyped_storage()
    kept = [fill(5 + n) for n in range(6)]
    assert held.unique().item() == 2, "a view of a batch was overwritten"
    assert again.unique().item() == 3
    assert torch.tensor(storage.tolist()[:4], dtype=torch.uint8).view(torch.float32).item() == 4
    assert [batch.unique().item() for batch in kept] == [5, 6, 7, 8, 9, 10]
    assert fill(11, count=9).shape == (9, 3)


def test_batches_that_are_kept_stay_as_they_are(train) -> None:
    made = batches(train, batch_size=3)
    kept = list(made.epoch(0))
    copies = [batch.images.clone() for batch in kept]
    for _ in made.epoch(1):
        pass
    assert all(torch.equal(b.images, c) for b, c in zip(kept, copies, strict=True))
    # One that is let go serves the next: the epoch has two arrays, not seven.
    seen = {batch.images.data_ptr() for batch in batches(train, batch_size=3).epoch(0)}
    assert len(seen) <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transform": Transform(train=True, crop=41)}, "crop: got 41, expected at most 40"),
        ({"batch_size": 0}, "batches: got batch_size 0, rank 0 of 1"),
        ({"rank": 2, "world": 2}, "batches: got batch_size 8, rank 2 of 2"),
        ({"device": "meta", "resident": False}, "resident: got False on meta"),
    ],
)
def test_refusals(settings, message, train) -> None:
    with pytest.raises(UsageError, match=message):
        batches(train, **settings)


@pytest.mark.parametrize("setting", [{"crop": 0}, {"flip": 2}, {"std": (0, 1, 1)}])
def test_a_transform_is_refused(setting) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(setting))}: got"):
        Transform(train=True, **setting)
