"""A process that has imported everything and forks one child per run, which may be killed.

    python train_zygote.py < jobs

A job is a line of JSON: `output` (folder), `options` (of `train_runs.make_config`) and `kill`, a
pair of a place and a number n, or null. Places:

step    a few milliseconds after the n-th batch of this process was handed out
half    in the n-th flush of a file, half of which is then missing
before  before the n-th file takes its place
after   after it did
line    in the middle of the n-th line of the metrics
disk    not killed: from the n-th file on, the disk is full
limit   not killed: no file may grow beyond n bytes

The answer is the child's exit status: -9 after a kill, 3 after a UsageError, which goes to
OUTPUT/error.txt.
"""

import errno
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tcpa.train.engine import files, journal
from tcpa.train.run import run
from train_runs import make_config, make_splits

from tcpa.cli import UsageError


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class Counter:
    """Calls `act` at the n-th time that something happens."""

    def __init__(self, number: int) -> None:
        self._left = number

    def due(self) -> bool:
        self._left -= 1
        return self._left == 0

    def over(self) -> bool:
        self._left -= 1
        return self._left <= 0


class FaultyOS(SimpleNamespace):
    """The module `os` with a fault in it."""

    def __init__(self, place: str, number: int) -> None:
        super().__init__()
        self._place, self._count = place, Counter(number)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, handle: int) -> None:
        if os.fstat(handle).st_mode & 0o100000:
            if self._place == "half" and self._count.due():
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
                die()
            if self._place == "disk" and self._count.over():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle)

    def replace(self, source: Path, target: Path) -> None:
        if self._place == "before" and self._count.due():
            die()
        os.replace(source, target)
        if self._place == "after" and self._count.due():
            die()


class FaultyFile:
    """A file whose n-th line breaks off."""

    def __init__(self, file: Any, number: int) -> None:
        self._file, self._count = file, Counter(number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        if self._count.due():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            die()
        self._file.write(data)


def inject(kill: list, splits: Any) -> None:
    """Prepare the fault."""
    place, number = kill
    if place == "step":
        source, count = splits.train, Counter(number)
        epoch = source.epoch

        def killing_epoch(*arguments: Any) -> Any:
            for batch in epoch(*arguments):
                if count.due():
                    delay = random.Random(number).uniform(0, 0.02)
                    threading.Timer(delay, die).start()
                yield batch

        source.epoch = killing_epoch
    elif place == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
    elif place == "line":
        init = journal.Journal.__init__

        def breaking_init(self: Any, *arguments: Any, **options: Any) -> None:
            init(self, *arguments, **options)
            self._file = FaultyFile(self._file, number)

        journal.Journal.__init__ = breaking_init
    else:
        files.os = FaultyOS(place, number)


def train(job: dict[str, Any]) -> None:
    splits = make_splits()
    if job["kill"]:
        inject(job["kill"], splits)
    output = Path(job["output"])
    try:
        run(make_config(output, **job["options"]), splits)
    except UsageError as error:
        output.mkdir(parents=True, exist_ok=True)
        (output / "error.txt").write_text(str(error))
        os._exit(3)


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                train(json.loads(line))
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=answers, flush=True)


if __name__ == "__main__":
    main()
