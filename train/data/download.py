"""Fetch one file: several sources in order, going on where a connection broke, checked, atomic."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from ...cli import UsageError

TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""

ATTEMPTS = 3
"""Times that each source is tried; every attempt goes on with what is there."""

PAUSE = 1.0
"""Seconds before a second attempt; twice as many before a third."""

BLOCK = 1 << 20
Progress = Callable[[int, int | None], None]
"""Called with the bytes there and all bytes, if the source says how many."""


class Unreachable(Exception):
    """No source gave the file; the text says what each one answered."""


def md5_of(path: Path) -> str:
    """Return the MD5 of a file: what publishers give, good against accidents."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch(
    urls: Sequence[str], target: Path, md5: str | None, progress: Progress | None = None
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
                _go_on(url, part, progress)
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


def _go_on(url: str, part: Path, progress: Progress | None) -> None:
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
        return _go_on(url, part, progress)
    with response:
        going_on = response.status == 206
        if going_on and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise http.client.HTTPException("it sent another part than was asked for")
        have = have if going_on else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if going_on else "wb") as stream:
            while block := response.read(BLOCK):
                stream.write(block)
                have += len(block)
                if progress:
                    progress(have, total)
            stream.flush()
            os.fsync(stream.fileno())
    if total is not None and have < total:
        raise http.client.HTTPException(f"the connection broke after {have:,} of {total:,} bytes")
