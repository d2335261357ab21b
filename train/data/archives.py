"""Fetch files and unpack archives of others.

A download resumes where a connection broke, is checked, and gets its name in one step. Nothing is
unpacked outside the folder, no links, no devices, no bombs.
"""

import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath
from stat import S_IFDIR, S_IFMT, S_IFREG
from typing import IO, cast

from ...cli import UsageError
from ..storage import disk_errors

TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""

ATTEMPTS = 3
"""Times that each source is tried; every attempt goes on with what is there."""

PAUSE = 1.0
"""Seconds before a second attempt; twice as many before a third."""

BLOCK = 1 << 20

MAX_FILES = 1_000_000
MAX_BYTES = 60 * 10**9
"""Most that an archive may unpack to; the largest, NABirds, has about 10 GB."""

_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    # An encrypted zip file.
    RuntimeError,
)

BytesProgress = Callable[[int, int | None], None]
"""Called with the bytes there and all bytes, if the source says how many."""


class Unreachable(Exception):
    """No source gave the file; the text says what each one answered."""


def md5_of(path: Path) -> str:
    """Return the MD5 of a file: what publishers give, good against accidents."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def fetch(
    urls: Sequence[str], target: Path, md5: str | None, progress: BytesProgress | None = None
) -> str:
    """Fetch a file to `target` from the first source that has it; return that source.

    What is there of an interrupted download, in `target`.part, is gone on with. The file gets its
    name only when it is whole and has the right checksum.

    Raises:
        Unreachable: no source gave it; what did come is kept as `target`.part.
        UsageError: it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    answers = []
    for url in urls:
        if not url.startswith(("http://", "https://")):
            answers.append(f"{url}: no address of http or https")
            continue
        for attempt in range(ATTEMPTS):
            resumed = part.exists()
            try:
                _download(url, part, progress)
            except urllib.error.HTTPError as error:
                error.close()
                answers.append(f"{url}: {error.code} {error.reason}")
                if error.code < 500:
                    break
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
                answers.append(f"{url}: {getattr(error, 'reason', error) or type(error).__name__}")
            except ConnectionError as error:
                answers.append(f"{url}: {error}")
            except OSError as error:
                raise UsageError(
                    f"{part}: got an error of the disk ({error.strerror}), expected room for the "
                    "download; make room, what has come is kept"
                ) from None
            else:
                found = md5_of(part)
                if md5 in (None, found):
                    os.replace(part, target)
                    return url
                answers.append(f"{url}: MD5 {found} instead of {md5}")
                part.unlink()
                if not resumed:
                    break
                # The beginning was of another file; once more from the start.
                continue
            if attempt + 1 < ATTEMPTS:
                time.sleep(PAUSE * 2**attempt)
    raise Unreachable("; ".join(dict.fromkeys(answers)) or "no address is known")


def _download(url: str, part: Path, progress: BytesProgress | None) -> None:
    """Fetch what is missing behind the end of `part`."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "tcpa", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        error.close()
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):
            # All of it is there.
            return
        part.unlink()
        return _download(url, part, progress)
    with response:
        resumes = response.status == 206
        if resumes and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise http.client.HTTPException("it sent another part than was asked for")
        have = have if resumes else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if resumes else "wb") as stream:
            while block := response.read(BLOCK):
                stream.write(block)
                have += len(block)
                if progress:
                    progress(have, total)
            stream.flush()
            os.fsync(stream.fileno())
    if total is not None and have < total:
        raise http.client.HTTPException(f"the connection broke after {have:,} of {total:,} bytes")


def is_archive(name: str) -> bool:
    """Tell whether a file is one that `unpack` takes, by its name."""
    return name.endswith((".tar", ".tar.gz", ".tgz", ".zip"))


def unpack(
    archive: Path,
    folder: Path,
    provides: Sequence[str],
    *,
    max_files: int = MAX_FILES,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Unpack what is wanted of an archive.

    Everything goes to a temporary folder first and is moved into place when it is whole; what is
    there already stays as it is.

    Args:
        archive: a tar file, also compressed, or a zip file.
        folder: where it goes.
        provides: the files and folders of the archive that are wanted, relative to `folder`.
        max_files, max_bytes: more is refused.

    Raises:
        UsageError: the archive is broken, lacks something, or has a name that leads out of the
            folder, a link, a device or too much; nothing of it is kept then.
    """
    staging = folder / f".unpacking-{archive.name}"
    try:
        with disk_errors(folder, f"what {archive.name} holds"):
            # A killed run may have left one.
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            _extract(archive, staging, provides, max_files, max_bytes)
            for name in provides:
                target = folder / name
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(staging / name, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(
    archive: Path, staging: Path, provides: Sequence[str], max_files: int, max_bytes: int
) -> None:
    """Write the wanted files of an archive; check every member, wanted or not."""
    files = total = 0
    try:
        with closing(_members(archive)) as members:
            for name, size, kind, open_member in members:
                _require_harmless(archive, name, kind)
                if kind == S_IFDIR:
                    continue
                files, total = files + 1, total + size
                if files > max_files or total > max_bytes:
                    raise UsageError(
                        f"{archive}: got more than {max_files:,} files or {max_bytes:,} bytes, "
                        "expected a dataset; remove it and fetch the right one"
                    )
                name = str(PurePosixPath(name))
                with open_member() as stream:
                    if any(name == wanted or name.startswith(f"{wanted}/") for wanted in provides):
                        target = staging / name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with target.open("wb") as out:
                            shutil.copyfileobj(stream, out, BLOCK)
    except _BROKEN as error:
        raise UsageError(
            f"{archive}: got an archive that cannot be read ({error}), expected a whole one; "
            "remove it and fetch it again"
        ) from None
    missing = [name for name in provides if not (staging / name).exists()]
    if missing:
        raise UsageError(
            f"{archive}: got an archive without {missing[0]}, expected {', '.join(provides)}; "
            "remove it and fetch the right one"
        )


def _members(archive: Path) -> Generator[tuple[str, int, int, Callable[[], IO[bytes]]]]:
    """Yield name, bytes, type (S_IFREG, S_IFDIR or another) and how to open each member.

    Neither format can hold more than it announces: both readers stop at the size.
    """
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                # Files that were packed without Unix permissions have no type at all.
                kind = S_IFMT(info.external_attr >> 16) or S_IFREG
                if info.is_dir() and kind == S_IFREG:
                    kind = S_IFDIR
                yield info.filename, info.file_size, kind, partial(packed.open, info)
        return
    with tarfile.open(archive) as packed:
        for info in packed:
            kind = S_IFREG if info.isreg() else S_IFDIR if info.isdir() else 0
            open_member = cast("Callable[[], IO[bytes]]", partial(packed.extractfile, info))
            yield info.name, info.size, kind, open_member
        # The checksum of a compressed file is behind the last member.
        while packed.fileobj and packed.fileobj.read(BLOCK):
            pass


def _require_harmless(archive: Path, name: str, kind: int) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    outside = parts.is_absolute() or ".." in parts.parts or ":" in (parts.parts or ("",))[0]
    odd = kind not in (S_IFREG, S_IFDIR)
    if outside or odd:
        what = "a link or a device" if odd else "a name that leads out of the folder"
        raise UsageError(
            f"{archive}: got {what} ({name!r}), expected files and folders only; do not use this "
            "archive"
        )
