"""A cache is whole or not there; killed builds go on, builders share one, mistakes are named."""

import errno
import json
import os
import re
import resource
import shutil
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torchvision.transforms.functional as F
from cache_builder import CONTEXT, kill_worker, start_builder
from dataset_trees import picture, write_tree
from hypothesis import given
from hypothesis import strategies as st

from tcpa import HTA_DATASETS
from tcpa.cli import UsageError
from tcpa.train.data import building, decoding
from tcpa.train.data.building import build_cache
from tcpa.train.data.cache import (
    ABOUT,
    INDEX,
    PIXELS,
    VERIFIED,
    Cache,
    DamagedCache,
    note_verified,
    open_cache,
)
from tcpa.train.data.cached import default_cache, open_cached
from tcpa.train.data.decoding import resized_size
from tcpa.train.data.pools import FilePool
from tcpa.train.data.splits import open_split


@pytest.fixture
def pool(tmp_path) -> FilePool:
    """Twelve photos of three shapes."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    names = [f"{number:02d}.jpg" for number in range(12)]
    for number, name in enumerate(names):
        size = [(50, 40), (33, 57), (40, 40)][number % 3]
        picture(rng, number, size).save(folder / name)
    return FilePool(folder, names)


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(building, "CHUNK", 4)


def assert_equal(cache, pool, resize: int) -> None:
    assert len(cache) == len(pool)
    for index in range(len(pool)):
        expected = np.asarray(F.resize(pool.load(index), [resize])).transpose(2, 0, 1)
        assert np.array_equal(cache.image(index), expected), pool.name(index)


@pytest.mark.parametrize("name", HTA_DATASETS)
def test_every_dataset_is_resized_as_torchvision_does(name, tmp_path) -> None:
    root = write_tree(name, tmp_path, classes=2, per_class=5, size=(37, 29))
    split = open_cached(name, root, "train", resize=24)
    opened = open_split(name, root, "train")
    assert_equal(split.cache, opened.pool, 24)
    assert split.labels.tolist() == opened.labels.tolist()
    assert split.record["cache"]["resize"] == 24
    assert len(split.record["cache"]["key"]) == 16


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 300))
def test_sizes_are_torchvisions(width, height, resize) -> None:
    if max(width, height) * resize > 20_000 * min(width, height):
        return
    expected = F._compute_resized_output_size((height, width), [resize])
    assert list(resized_size(width, height, resize)) == expected[::-1]


def test_grey_and_palette_images_become_rgb(tmp_path) -> None:
    rng = np.random.default_rng(0)
    photo = picture(rng, 1, (30, 20))
    photo.convert("L").save(tmp_path / "grey.png")
    photo.convert("P").save(tmp_path / "palette.png")
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    pool = FilePool(tmp_path, ["grey.png", "palette.png", "cmyk.jpg"])
    cache = build_cache(pool, tmp_path / "cache", "odd", resize=16)
    assert [tuple(cache.image(n).shape) for n in range(3)] == [(3, 16, 24)] * 3
    assert_equal(cache, pool, 16)


def test_a_cache_is_built_once_and_follows_its_files(pool, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "cache"
    first = build_cache(pool, folder, "x", resize=32)
    with monkeypatch.context() as patch:
        patch.setattr(FilePool, "load", lambda self, index: pytest.fail("decoded again"))
        assert build_cache(pool, folder, "x", resize=32).folder == first.folder
    other = build_cache(pool, folder, "x", resize=16)
    assert other.folder != first.folder
    picture(np.random.default_rng(1), 3, (50, 40)).save(pool.folder / "00.jpg")
    os.utime(pool.folder / "00.jpg", ns=(1, 1))
    changed = build_cache(pool, folder, "x", resize=32)
    assert changed.folder != first.folder
    assert_equal(changed, pool, 32)
    open_cache(first.folder).check()
    leftovers = [path.name for path in folder.iterdir() if path.suffix == ".building"]
    assert leftovers == []


def test_one_cache_for_all_training_splits(tmp_path) -> None:
    root = write_tree("cifar10", tmp_path, per_class=10)
    folders = {
        open_cached("cifar10", root, split, protocol=protocol, resize=32).cache.folder
        for split, protocol in [("train", "official"), ("val", "official"), ("trainval", "val")]
    }
    assert len(folders) == 1
    assert folders.pop().parent == root / "cache"
    # The cache of a folder of one's own must not become a class of it.
    assert default_cache("folder", tmp_path / "mine") == tmp_path / "mine.cache"


def count_decoded(monkeypatch) -> list[int]:
    """Return a list that gets the number of every image that is decoded from now on."""
    decoded, load = [], FilePool.load
    monkeypatch.setattr(FilePool, "load", lambda self, n: decoded.append(n) or load(self, n))
    return decoded


def truncate(path: Path) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    return whole


@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_image_is_named_and_nothing_is_lost(
    workers, pool, tmp_path, small_chunks, monkeypatch
) -> None:
    """By one process or by several, the chunks before the mistake are kept and are right."""
    folder, path, seen = tmp_path / "cache", pool.folder / "09.jpg", []
    kept = build_cache(pool, folder, "x", resize=16)
    whole = truncate(path)
    settings = {"resize": 32, "progress": lambda *numbers: seen.append(numbers)}
    with pytest.raises(UsageError) as caught:
        build_cache(pool, folder, "x", workers=workers, **settings)
    assert str(caught.value).startswith(f"{path}: got a file that cannot be decoded (")
    assert seen == [(4, 12), (8, 12)]
    assert [found.name for found in folder.glob("x-32*")].count("x-32.building") == 1
    open_cache(kept.folder).check()
    path.write_bytes(whole)
    decoded = count_decoded(monkeypatch)
    cache = build_cache(pool, folder, "x", workers=1, **settings)
    assert sorted(decoded) == [8, 9, 10, 11], "the chunks before the mistake were decoded again"
    assert seen[-1] == (12, 12)
    assert_equal(cache, pool, 32)
    cache.check()


def test_altered_chunks_of_a_killed_build_are_decoded_again(pool, tmp_path, small_chunks) -> None:
    folder = tmp_path / "cache"
    truncate(pool.folder / "11.jpg")
    with pytest.raises(UsageError):
        build_cache(pool, folder, "x", resize=32)
    picture(np.random.default_rng(5), 2, (40, 40)).save(pool.folder / "11.jpg")
    staging = folder / "x-32.building"
    with (staging / PIXELS).open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\0" * 50)
    # A kill in the middle of a line, and lines of an older build.
    journal = staging / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"key": "abc", "sha256": "0"}\n{"key": "trunc')
    cache = build_cache(pool, folder, "x", resize=32)
    assert_equal(cache, pool, 32)
    cache.check()


def test_a_full_disk_in_the_file_system(pool, tmp_path, small_chunks) -> None:
    """A limit on the size of files makes the system itself refuse the bytes."""
    folder = tmp_path / "cache"
    kept = build_cache(pool, folder, "x", resize=16)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UsageError) as caught:
            build_cache(pool, folder, "x", resize=32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        f"{folder}/x-32.building: got an error of the disk (File too large), expected room for the "
        "cache; make room or choose another folder with --cache, what is done is kept"
    )
    open_cache(kept.folder).check()
    assert_equal(build_cache(pool, folder, "x", resize=32), pool, 32)


def test_a_disk_that_fills_up_while_decoding(pool, tmp_path, small_chunks, monkeypatch) -> None:
    folder = tmp_path / "cache"
    fill = decoding._fill

    def full(pool, resize, path, chunk):
        if chunk.start >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fill(pool, resize, path, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_fill", full)
        with pytest.raises(UsageError, match=r"x-32.building: got an error of the disk \(No space"):
            build_cache(pool, folder, "x", resize=32)
    lines = (folder / "x-32.building/journal.jsonl").read_text().split()
    assert len([line for line in lines if "key" in line]) == 1
    assert_equal(build_cache(pool, folder, "x", resize=32), pool, 32)


def test_a_folder_that_cannot_be_written(pool, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    told = (
        r"x-32.building: got an error of the disk \(Not a dir.*choose another folder with --cache"
    )
    with pytest.raises(UsageError, match=told):
        build_cache(pool, tmp_path / "file" / "cache", "x", resize=32)


def alter(path: Path, place: int) -> None:
    """Change one byte and nothing else that a listing shows."""
    times = path.stat()
    with path.open("r+b") as stream:
        stream.seek(place)
        value = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([value ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def alter_setting(path: Path, name: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


DAMAGES = {
    "a byte": (
        lambda folder: alter(folder / PIXELS, 5),
        r"pixels.bin: got other bytes between 0 and [\d,]+ than were written",
        [0, 1, 2, 3],
    ),
    "two chunks": (
        lambda folder: (alter(folder / PIXELS, 5), alter(folder / PIXELS, -1 + 12 * 3 * 256)),
        r"pixels.bin: got other bytes between 0 and [\d,]+ and in 1 more places than",
        None,
    ),
    "the end": (
        lambda folder: truncate(folder / PIXELS),
        r"pixels.bin: got [\d,]+ bytes instead of [\d,]+, expected the cache as it was built",
        [4, 5, 6, 7, 8, 9, 10, 11],
    ),
    "no pixels": (
        lambda folder: (folder / PIXELS).unlink(),
        r"cache.json: got a cache that cannot be read \(FileNotFoundError",
        [*range(12)],
    ),
    "the index": (
        lambda folder: truncate(folder / INDEX),
        r"(cache.json: got a cache that cannot be read|index.safetensors: got another)",
        [],
    ),
    "the settings": (
        lambda folder: truncate(folder / ABOUT),
        r"cache.json: got a cache that cannot be read \(JSONDecodeError",
        [*range(12)],
    ),
    "another size": (
        lambda folder: alter_setting(folder / ABOUT, "resize", 15),
        r"cache.json: got settings that are not those of the cache",
        [],
    ),
    "another kind": (
        lambda folder: alter_setting(folder / ABOUT, "small", True),
        r"cache.json: got settings that are not those of the cache",
        [],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_told_and_mended(
    damage, pool, tmp_path, small_chunks, monkeypatch, capsys
) -> None:
    """Never used as it is; only the chunks that are damaged are decoded again."""
    hurt, told, again = damage
    cache = build_cache(pool, tmp_path / "cache", "x", resize=16)
    hurt(cache.folder)
    decoded = count_decoded(monkeypatch)
    mended = build_cache(pool, tmp_path / "cache", "x", resize=16)
    assert again is None or sorted(decoded) == again
    assert mended.folder == cache.folder and mended.verified
    assert_equal(mended, pool, 16)
    mended.check()
    warning = capsys.readouterr().err
    assert re.match(f"warning: {re.escape(str(cache.folder))}/{told}", warning)
    assert warning.endswith("; what is damaged is decoded again\n") and warning.count("\n") == 1
    assert not list((tmp_path / "cache").glob("*.building"))


def test_a_cache_is_compared_again_only_when_it_was_touched(pool, tmp_path, monkeypatch) -> None:
    cache = build_cache(pool, tmp_path / "cache", "x", resize=16)
    compared, check = [], Cache.check
    monkeypatch.setattr(Cache, "check", lambda self: compared.append(1) or check(self))
    assert build_cache(pool, tmp_path / "cache", "x", resize=16).folder == cache.folder
    assert not compared
    # Touched, but the same; a copy from elsewhere; a record that is damaged.
    for touch in (
        lambda: os.utime(cache.folder / PIXELS),
        lambda: shutil.move(shutil.copy(cache.folder / PIXELS, tmp_path), cache.folder / PIXELS),
        lambda: (cache.folder / VERIFIED).write_text("[]"),
        lambda: (cache.folder / VERIFIED).unlink(),
    ):
        touch()
        for _ in range(2):
            assert build_cache(pool, tmp_path / "cache", "x", resize=16).verified
        assert compared.pop() and not compared


def test_check_finds_what_no_stamp_shows(pool, tmp_path, small_chunks) -> None:
    """Bits that turn on the disk change no time of change."""
    cache = build_cache(pool, tmp_path / "cache", "x", resize=16)
    cache.check()
    alter(cache.folder / PIXELS, cache.about["bytes"] - 1)
    note_verified(cache.folder)
    size = cache.about["bytes"]
    found = open_cache(cache.folder)
    assert found.verified
    with pytest.raises(DamagedCache, match=rf"pixels.bin: got other bytes between .* {size:,} "):
        found.check()


def test_a_cache_for_reading_only_is_compared_every_time(pool, tmp_path, monkeypatch) -> None:
    cache = build_cache(pool, tmp_path / "cache", "x", resize=16)
    (cache.folder / VERIFIED).unlink()
    monkeypatch.setattr(building.os, "access", lambda path, mode: False)
    monkeypatch.setattr(building, "FileLock", lambda path: pytest.fail("wrote a lock"))
    assert build_cache(pool, tmp_path / "cache", "x", resize=16).folder == cache.folder
    (cache.folder / VERIFIED).unlink()
    alter(cache.folder / PIXELS, 5)
    with pytest.raises(UsageError, match=r"remove the folder .*x-16-\w+ and it is rebuilt"):
        build_cache(pool, tmp_path / "cache", "x", resize=16)


def test_caches_of_images_that_changed_are_told(pool, tmp_path, capsys) -> None:
    folder = tmp_path / "cache"
    old = build_cache(pool, folder, "x", resize=16)
    build_cache(pool, folder, "x", resize=20)
    assert capsys.readouterr().err == ""
    os.utime(pool.folder / "00.jpg", ns=(1, 1))
    build_cache(pool, folder, "x", resize=16)
    told = capsys.readouterr().err
    assert "0.00 GB decoded from other states of these images" in told
    assert told.endswith(f"free the room: rm -r {old.folder}\n")
    open_cache(old.folder).check()


def test_two_builders_and_a_kill(pool, tmp_path, small_chunks) -> None:
    """One is killed half-way while another waits for it; that one takes over."""
    folder = tmp_path / "cache"
    builders = {pipe: one for one, pipe in (start_builder(pool.folder, folder, 9) for _ in "ab")}
    assert [pipe.recv() for pipe in builders] == ["lock", "lock"]
    # Whoever has the lock tells of two chunks and then hangs; the other waits.
    ready = wait(builders, 60)
    assert [ready[0].recv(), ready[0].recv()] == [4, 8]
    assert wait(builders, 0.2) == []
    assert not list(folder.glob("x-32-*")), "half a cache has the name of a whole one"
    builders.pop(ready[0]).kill()
    # The other takes over, resumes at the third chunk and hangs there too.
    assert wait(builders, 0.5) == []
    for builder in builders.values():
        builder.kill()
        builder.join()
    lines = (folder / "x-32.building/journal.jsonl").read_text().split("\n")
    assert len([line for line in lines if line]) == 2
    decoded = []
    cache = build_cache(
        pool, folder, "x", resize=32, progress=lambda done, total: decoded.append(done)
    )
    assert decoded == [12], "the chunks of the killed builder were decoded again"
    assert_equal(cache, pool, 32)
    cache.check()
    assert cache.about["images"] == 12


def test_processes_that_share_a_damaged_cache_mend_it_once(pool, tmp_path, small_chunks) -> None:
    folder = tmp_path / "cache"
    cache = build_cache(pool, folder, "x", resize=32)
    alter(cache.folder / PIXELS, 5)
    said = []
    for builder, pipe in [start_builder(pool.folder, folder) for _ in "ab"]:
        while (said[-1:] or [""])[-1] != cache.folder.name:
            said.append(pipe.recv())
        said.append("")
        builder.join()
    # One decodes the one chunk, the other finds it mended.
    assert said.count(12) == 1 and said.count(cache.folder.name) == 2
    found = build_cache(pool, folder, "x", resize=32)
    assert_equal(found, pool, 32)
    found.check()
    # Who had it mapped all the time sees the right pixels now.
    assert_equal(cache, pool, 32)


def test_a_worker_that_is_killed(pool, tmp_path, small_chunks, monkeypatch) -> None:
    monkeypatch.setattr(decoding, "_start_worker", kill_worker)
    monkeypatch.setattr(decoding.multiprocessing, "get_context", lambda method: CONTEXT)
    with pytest.raises(UsageError, match=r"x-32.building: a process that decoded images was ended"):
        build_cache(pool, tmp_path / "cache", "x", resize=32, workers=2)
    monkeypatch.undo()
    assert_equal(build_cache(pool, tmp_path / "cache", "x", resize=32), pool, 32)


def test_images_are_kept_small_only_when_that_saves_much(tmp_path) -> None:
    rng = np.random.default_rng(0)
    sizes = [(20, 30), (25, 20), (60, 50)]
    for number, size in enumerate(sizes):
        picture(rng, number, size).save(tmp_path / f"{number}.png")
    small = FilePool(tmp_path, ["0.png", "1.png"])
    for resize, kept in [(30, False), (39, False), (50, True)]:
        cache = build_cache(small, tmp_path / "cache", "x", resize=resize)
        assert cache.small is kept, resize
        assert_equal(cache, small, resize)
    # One image that would shrink, and all are resized.
    mixed = FilePool(tmp_path, ["0.png", "2.png"])
    cache = build_cache(mixed, tmp_path / "cache", "y", resize=49)
    assert not cache.small
    assert_equal(cache, mixed, 49)


def test_refusals(pool, tmp_path) -> None:
    with pytest.raises(UsageError, match="resize: got 0, expected pixels, 1 or more"):
        build_cache(pool, tmp_path, "x", resize=0)
    (pool.folder / "05.jpg").unlink()
    with pytest.raises(UsageError, match=r"05.jpg: got no such file, expected the 12 images"):
        build_cache(pool, tmp_path / "cache", "x", resize=16)
