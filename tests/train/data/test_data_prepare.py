"""Fetching and unpacking: resumes after a break, checks, and lets nothing of an archive escape."""

import hashlib
import http.server
import io
import json
import os
import re
import shutil
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
from dataset_trees import write_tree, write_vpt_splits

from tcpa import HTA_DATASETS
from tcpa.cli import UsageError
from tcpa.train.data import archives
from tcpa.train.data.archives import Unreachable, fetch, is_archive, md5_of, unpack
from tcpa.train.data.cache import PIXELS, note_verified
from tcpa.train.data.cached import open_cached
from tcpa.train.data.prepare import prepare, run_prepare
from tcpa.train.data.registry import HTA
from tcpa.train.data.splits import open_split
from tcpa.train.data.verify import run_verify, verify
from tcpa.train.options.data import PrepareConfig, VerifyConfig

CONTENT = bytes(range(256)) * 5000


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges; can break off, refuse ranges, and remembers what was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: list[tuple[str, str | None]] = []
        self.break_after: list[int] = []
        self.ranges = True
        self.wrong_range = False

    def handle_error(self, request, client_address) -> None:
        """A client that has heard enough goes away."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, start = path.read_bytes(), 0
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            shown = start + 1 if self.server.wrong_range else start
            self.send_header("Content-Range", f"bytes {shown}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        limit = self.server.break_after.pop(0) if self.server.break_after else len(data)
        self.wfile.write(data[start : start + limit])

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(archives, "PAUSE", 0.0)
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "file.tgz").write_bytes(CONTENT)
    with Server(folder) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


MD5 = hashlib.md5(CONTENT).hexdigest()


def test_fetch_resumes_after_a_broken_connection(server, tmp_path) -> None:
    server.break_after = [300_000, 400_000]
    target, seen, url = tmp_path / "new/file.tgz", [], f"{server.url}/file.tgz"
    assert fetch([url], target, MD5, lambda *progress: seen.append(progress)) == url
    assert target.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [path.name for path in target.parent.iterdir()] == ["file.tgz"]
    assert [asked for _, asked in server.asked] == [None, "bytes=300000-", "bytes=700000-"]


PARTS = {
    "half": (CONTENT[:1000], ["bytes=1000-"]),
    "whole": (CONTENT, [f"bytes={len(CONTENT)}-"]),
    "of another file": (b"x" * 1000, ["bytes=1000-", None]),
    "of a longer file": (b"x" * (len(CONTENT) + 1), [f"bytes={len(CONTENT) + 1}-", None]),
}
"""What an earlier run left -> what is asked for."""


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(("left", "asked"), PARTS.values(), ids=PARTS)
def test_fetch_resumes_an_earlier_run(left, asked, ranges, server, tmp_path) -> None:
    server.ranges = ranges
    part = tmp_path / "file.tgz.part"
    part.write_bytes(left)
    fetch([f"{server.url}/file.tgz"], tmp_path / "file.tgz", MD5)
    assert (tmp_path / "file.tgz").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == (asked if ranges else asked[:1])
    assert not part.exists()


def test_fetch_tries_sources_in_order(server, tmp_path) -> None:
    (server.folder / "other.tgz").write_bytes(b"another file")
    urls = [f"{server.url}/{name}" for name in ("gone.tgz", "other.tgz", "file.tgz")]
    assert fetch(urls, tmp_path / "file.tgz", MD5) == urls[2]
    assert [path for path, _ in server.asked] == ["/gone.tgz", "/other.tgz", "/file.tgz"]
    with pytest.raises(Unreachable) as caught:
        fetch([*urls[:2], "file:///etc/passwd"], tmp_path / "none.tgz", MD5)
    wrong = hashlib.md5(b"another file").hexdigest()
    assert str(caught.value) == (
        f"{urls[0]}: 404 Not Found; {urls[1]}: MD5 {wrong} instead of {MD5}; "
        "file:///etc/passwd: no address of http or https"
    )
    assert not list(tmp_path.glob("none*"))


def test_fetch_keeps_what_came(server, tmp_path) -> None:
    server.break_after = [1000, 1000, 1000]
    with pytest.raises(Unreachable, match=r"the connection broke after 1,000 of 1,280,000 bytes"):
        fetch([f"{server.url}/file.tgz"], tmp_path / "file.tgz", MD5)
    assert (tmp_path / "file.tgz.part").read_bytes() == CONTENT[:3000]
    server.wrong_range = True
    with pytest.raises(Unreachable, match="it sent another part than was asked for"):
        fetch([f"{server.url}/file.tgz"], tmp_path / "file.tgz", MD5)
    assert (tmp_path / "file.tgz.part").read_bytes() == CONTENT[:3000]


def tar_of(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w:gz") as packed:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return path


def zip_of(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return path


MAKERS = pytest.mark.parametrize(("make", "kind"), [(tar_of, "tgz"), (zip_of, "zip")])


@MAKERS
def test_unpack(make, kind, tmp_path) -> None:
    members = {
        "top/images/a.jpg": b"a",
        "top/list.txt": b"b",
        "other/c": b"c",
        "top/images2/x": b"",
    }
    archive = make(tmp_path / f"a.{kind}", **members)
    assert is_archive(archive.name)
    folder = tmp_path / "data"
    (folder / "top").mkdir(parents=True)
    (folder / "top/list.txt").write_text("mine")
    unpack(archive, folder, ["top/images", "top/list.txt"])
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"top/images/a.jpg", "top/list.txt"}
    assert (folder / "top/list.txt").read_text() == "mine", "a file that was there was replaced"


EVIL = ["../evil", "/tmp/evil-of-a-test", "top/../../evil", "..\\evil", "c:\\evil"]


@MAKERS
@pytest.mark.parametrize("name", EVIL)
def test_names_that_lead_outside_are_refused(make, kind, name, tmp_path) -> None:
    archive = make(tmp_path / f"a.{kind}", **{"top/good": b"good", name: b"evil"})
    folder = tmp_path / "in/data"
    with pytest.raises(UsageError, match="got a name that leads out of the folder") as caught:
        unpack(archive, folder, ["top"])
    assert str(archive) in str(caught.value)
    assert list(folder.iterdir()) == [], "something of a bad archive was kept"
    assert not (tmp_path / "in/evil").exists()


LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]


@pytest.mark.parametrize(
    "kind", [*LINKS, "zip"], ids=["symlink", "hardlink", "fifo", "char", "block", "zip"]
)
def test_links_and_devices_are_refused(kind, tmp_path) -> None:
    if kind == "zip":
        archive = tmp_path / "a.zip"
        with zipfile.ZipFile(archive, "w") as packed:
            info = zipfile.ZipInfo("top/link")
            info.external_attr = 0o120777 << 16
            packed.writestr(info, "/etc/passwd")
    else:
        archive = tmp_path / "a.tar"
        with tarfile.open(archive, "w") as packed:
            info = tarfile.TarInfo("top/link")
            info.type, info.linkname = kind, "/etc/passwd"
            packed.addfile(info)
    with pytest.raises(UsageError, match=r"a.\w+: got a link or a device \('top/link'\), expected"):
        unpack(archive, tmp_path / "data", ["top"])


@MAKERS
def test_bombs_are_refused(make, kind, tmp_path) -> None:
    archive = make(tmp_path / f"a.{kind}", **{"top/a": b"0" * 10_000, "top/b": b"0" * 10_000})
    with pytest.raises(UsageError, match="got more than 1 files or 60,000,000,000 bytes"):
        unpack(archive, tmp_path / "data", ["top"], max_files=1)
    with pytest.raises(UsageError, match="got more than 1,000,000 files or 15,000 bytes"):
        unpack(archive, tmp_path / "data", ["top"], max_bytes=15_000)
    assert list((tmp_path / "data").iterdir()) == []
    unpack(archive, tmp_path / "data", ["top"], max_files=2, max_bytes=20_000)


@MAKERS
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_broken_archives_are_named(make, kind, share, tmp_path) -> None:
    content = os.urandom(50_000)
    archive = make(tmp_path / f"a.{kind}", **{"top/a": content, "top/b": content[::-1]})
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UsageError, match=rf"a.{kind}: got an archive that cannot be read \("):
        unpack(archive, tmp_path / "data", ["top"])
    assert list((tmp_path / "data").iterdir()) == []
    archive.write_bytes(whole[:5000] + b"\0" * 4000 + whole[9000:])
    with pytest.raises(UsageError, match=rf"a.{kind}: got an archive that cannot be read \("):
        unpack(archive, tmp_path / "data", ["top"])


def test_an_archive_of_something_else(tmp_path) -> None:
    archive = tar_of(tmp_path / "a.tgz", other=b"")
    with pytest.raises(
        UsageError, match=r"a.tgz: got an archive without top/images, expected top/i"
    ):
        unpack(archive, tmp_path / "data", ["top/images", "top/list"])


def test_a_disk_without_room(tmp_path) -> None:
    archive = tar_of(tmp_path / "a.tgz", **{"top/a": b"0" * 50_000})
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            UsageError, match=r"data: got an error of the disk \(File too large\), "
        ):
            unpack(archive, tmp_path / "data", ["top"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "data").iterdir()) == []


def known(name: str, root: Path):
    """Return the registry's entry with the counts of a small tree."""
    official, disjoint = (
        {
            split: len(open_split(name, root, split, protocol=protocol).rows)
            for split in ("train", "val", "test")
        }
        for protocol in ("official", "val")
    )
    return replace(
        HTA[name],
        official=official,
        disjoint=disjoint,
        classes=len(open_split(name, root, "test").class_names),
        train_per_class=None,
        test_per_class=None,
    )


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """Serve small archives of every dataset, and let the registry know their checksums."""

    def publish(name: str) -> Path:
        tree = write_tree(name, tmp_path / "tree", classes=10 if name == "svhn" else 2, per_class=3)
        if any(source.optional for source in HTA[name].sources):
            write_vpt_splits(name, tree)
        folder = server.folder / name
        folder.mkdir()
        sources = []
        for source in HTA[name].sources:
            target, base = folder / source.file, tree / source.folder
            if not is_archive(source.file):
                shutil.copyfile(base / source.provides[0], target)
            elif source.file.endswith(".zip"):
                with zipfile.ZipFile(target, "w") as packed:
                    for path in (path for p in source.provides for path in _files(base / p)):
                        packed.write(path, path.relative_to(base))
            else:
                with tarfile.open(target, "w:gz" if "gz" in target.name else "w") as packed:
                    for provided in source.provides:
                        packed.add(base / provided, provided)
            md5 = md5_of(target) if source.md5 else None
            urls = tuple(f"{server.url}/{name}/{source.file}" for _ in source.urls)
            sources.append(replace(source, md5=md5, urls=urls))
        monkeypatch.setitem(HTA, name, replace(known(name, tree), sources=tuple(sources)))
        return tree

    return publish


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


@pytest.mark.parametrize("name", HTA_DATASETS)
def test_every_dataset_is_prepared_and_verified(name, published, server, tmp_path) -> None:
    tree, root = published(name), tmp_path / "data"
    said: list[str] = []
    if name == "nabirds":
        with pytest.raises(UsageError, match=r"https://dl.allaboutbirds.org/nabirds"):
            prepare(name, root, report=said.append)
        shutil.copyfile(
            server.folder / "nabirds/nabirds.tar.gz", root / "archives/nabirds/nabirds.tar.gz"
        )
    prepare(name, root, report=said.append)
    for split in ("train", "val", "test"):
        ours, theirs = (open_split(name, folder, split) for folder in (root, tree))
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert [ours.pool.key(int(row)) for row in ours.rows] == [
            theirs.pool.key(int(row)) for row in theirs.rows
        ]
    if HTA[name].rule == "vpt":
        assert "VPT's split files" in open_split(name, root, "train").record["rule"]
    asked = len(server.asked)
    prepare(name, root, report=said.append)
    assert len(server.asked) == asked, "fetched again"
    assert not [path for path in root.rglob(".unpacking*")]
    assert verify(name, root).problems == []


def test_prepare_offline_says_what_to_fetch(tmp_path) -> None:
    root = tmp_path / "data"
    with pytest.raises(UsageError) as caught:
        prepare("gtsrb", root, offline=True)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("GTSRB: 3 of its files could not be fetched, expected a connection")
    assert lines[1:4] == [
        "  https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
        "GTSRB-Training_fixed.zip",
        f"    put it at {root}/archives/gtsrb/GTSRB-Training_fixed.zip (187.5 MB, "
        "MD5 513f3c79a4c5141765e10e952eaa2478)",
        "    tried: offline",
    ]
    assert len(lines) == 10
    with pytest.raises(UsageError) as caught:
        prepare("nabirds", root, offline=True)
    told = "  https://dl.allaboutbirds.org/nabirds (accept the terms there)"
    assert told in str(caught.value).splitlines()


def test_prepare_with_dead_links(published, server, tmp_path) -> None:
    published("stanford_dogs")
    (server.folder / "stanford_dogs/lists.tar").unlink()
    root = tmp_path / "data"
    with pytest.raises(UsageError) as caught:
        prepare("stanford_dogs", root, report=lambda line: None)
    assert "1 of its files could not be fetched" in str(caught.value)
    assert f"tried: {server.url}/stanford_dogs/lists.tar: 404 Not Found" in str(caught.value)
    assert (root / "stanford_dogs/Images").is_dir(), "what could be fetched was not unpacked"


def test_prepare_without_split_files(published, server, tmp_path) -> None:
    published("cub")
    (server.folder / "cub/val.json").write_text(json.dumps({"a": "001", "b": "001"}))
    root, said = tmp_path / "data", []
    prepare("cub", root, report=said.append)
    assert "val.json has 2 entries instead of 1. VPT's split files are not used" in said[-1]
    assert "split of our own with the same counts" in said[-1]
    assert "this split is ours" in open_split("cub", root, "train").record["rule"]


def test_prepare_takes_a_mirror_and_checks_it(published, server, tmp_path, monkeypatch) -> None:
    published("svhn")
    dead = tuple(
        replace(source, urls=(f"{server.url}/gone/{source.file}",))
        for source in HTA["svhn"].sources
    )
    monkeypatch.setitem(HTA, "svhn", replace(HTA["svhn"], sources=dead))
    root = tmp_path / "data"
    prepare("svhn", root, mirror=f"{server.url}/", report=lambda line: None)
    assert (root / "SVHN/train_32x32.mat").is_file()
    # A file that a person put there is checked too.
    shutil.rmtree(root / "SVHN")
    (root / "archives/svhn/test_32x32.mat").write_bytes(b"half")
    with pytest.raises(UsageError, match=r"svhn/test_32x32.mat: got MD5 [0-9a-f]{32}, expected "):
        prepare("svhn", root, report=lambda line: None)


def test_other_names_are_refused(tmp_path) -> None:
    for command, config in ((run_prepare, PrepareConfig), (run_verify, VerifyConfig)):
        with pytest.raises(UsageError, match=r"dataset: got 'cubb', expected .* mean 'cub'\?"):
            command(config(name="cubb", data=tmp_path))
    with pytest.raises(UsageError, match="a folder of your own is used as it is"):
        prepare("folder", tmp_path)
    assert verify("folder", tmp_path / "none").problems[0].startswith(f"{tmp_path}/none: got no")


def test_verify_names_what_differs(tmp_path, monkeypatch) -> None:
    root = write_tree("dtd", tmp_path, classes=3, per_class=4)
    monkeypatch.setitem(HTA, "dtd", replace(known("dtd", root), test_per_class=(4,)))
    folder = root / "DTD/dtd/dtd"
    broken, gone = (folder / f"images/texture{n}/texture{n}_0001.jpg" for n in (0, 1))
    broken.write_bytes(broken.read_bytes()[:200])
    gone.unlink()
    lists = folder / "labels/test1.txt"
    lists.write_text("\n".join(lists.read_text().splitlines()[1:]))
    found = verify("dtd", root)
    assert found.problems[:3] == [
        "test (official): got 11 images, expected 12",
        "test (disjoint): got 11 images, expected 12",
        "class 0 (texture0): got 3 test images, expected 4",
    ]
    assert found.problems[3].startswith(f"{broken}: got a file that cannot be decoded (")
    assert found.problems[4].startswith(f"{gone}: got no such file, expected an image")
    assert len(found.problems) == 5
    quick = verify("dtd", root, images=False)
    assert len(quick.problems) == 4
    assert quick.problems[3] == f"{gone}: got no such file, expected an image"


def test_verify_lists_no_endless_problems(tmp_path) -> None:
    root = write_tree("dtd", tmp_path, classes=3, per_class=10)
    shutil.rmtree(root / "DTD/dtd/dtd/images")
    found = verify("dtd", root)
    assert found.problems[-1] == "... and 70 more of this kind"


def test_commands(tmp_path, capsys, monkeypatch) -> None:
    def parse(kind, *arguments: str):
        options = (tyro.conf.PositionalRequiredArgs,)
        return tyro.cli(kind, args=list(arguments), config=options)

    root = write_tree("dtd", tmp_path, classes=2, per_class=2)
    config = parse(VerifyConfig, "dtd", "--data", str(root))
    assert config == VerifyConfig(name="dtd", data=root)
    with pytest.raises(UsageError) as caught:
        run_verify(config)
    assert str(caught.value).startswith(f"{root}: got dtd with 7 differences, expected the publis")
    assert "\n  train (official): got 4 images, expected 1,880" in str(caught.value)
    assert "dtd official test        4 images" in capsys.readouterr().out
    monkeypatch.setitem(HTA, "dtd", known("dtd", root))
    run_verify(config)
    printed = capsys.readouterr().out
    assert "disjoint: without overlap, as every other --protocol takes them" in printed
    assert (
        "dtd: each of 12 images of 2 classes can be decoded, the counts are those of the published "
        "dataset" in printed
    )
    run_prepare(parse(PrepareConfig, "dtd", "--data", str(root), "--offline"))
    assert "dtd-r1.0.1.tar.gz: its content is there" in capsys.readouterr().out


def test_verify_of_a_folder_of_ones_own(tmp_path, capsys) -> None:
    root = write_tree("folder", tmp_path / "mine")
    run_verify(VerifyConfig(name="folder", data=root, images=False))
    printed = capsys.readouterr().out
    assert printed.endswith("folder: each of 36 images of 3 classes is there\n")
    assert "folder every    train      16 images" in printed and "disjoint" not in printed
    (root / "train/class 0/train0.jpg").write_bytes(b"junk")
    with pytest.raises(UsageError) as caught:
        run_verify(VerifyConfig(name="folder", data=root))
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"{root}: got 1 problem, expected whole images, a folder for every class; mend or remove "
        "what is listed:"
    )
    assert lines[1].endswith("expected a whole image; replace or remove it") and len(lines) == 2


def test_verify_reads_the_caches_whole(tmp_path, capsys) -> None:
    root = write_tree("folder", tmp_path / "mine")
    config = VerifyConfig(name="folder", data=root, cache=tmp_path / "cache")
    caches = [
        open_cached("folder", root, split, resize=16, cache=tmp_path / "cache").cache
        for split in ("train", "test")
    ]
    (tmp_path / "cache/mine-train-16-unfinished").touch()
    run_verify(config)
    printed = capsys.readouterr().out
    for cache in caches:
        assert f"{cache.folder}: 0.00 GB, as it was built\n" in printed
    # Bits that turn on the disk change no time of change.
    with (caches[0].folder / PIXELS).open("r+b") as stream:
        stream.write(b"12345")
    note_verified(caches[0].folder)
    os.utime(root / "test/class 0/test0.jpg", ns=(1, 1))
    with pytest.raises(UsageError) as caught:
        run_verify(config)
    assert re.fullmatch(
        rf"got 1 damaged cache:\n  {caches[0].folder}/pixels.bin: got other bytes between 0 and "
        r"[\d,]+ than were written, expected the cache as it was built; the next run mends it",
        str(caught.value),
    )
    printed = capsys.readouterr().out
    assert f"{caches[1].folder}: 0.00 GB, of another state of the images; unless" in printed
    assert f"reads it: rm -r {caches[1].folder}\n" in printed
