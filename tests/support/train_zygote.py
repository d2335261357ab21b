"""A process that has imported everything and forks one child per run, which may be killed.

    python train_zygote.py < jobs

A job is a line of JSON: `output` (folder), `options` (of `train_runs.make_config`), `images` (its
number, for `make_splits`), `processes` (of the run) and `kill`, a pair of a place and a number n,
or null, for the first process. Places:

step    a few milliseconds after the n-th batch of this process was handed out
half    in the n-th flush of a file, half of which is then missing
before  before the n-th file takes its place
after   after it did
line    in the middle of the n-th line of the metrics
disk    not killed: from the n-th file on, the disk is full
limit   not killed: no file may grow beyond n bytes
SIGINT, SIGTERM  the last process gets this signal when its n-th batch was handed out
twice   it gets SIGINT two times
tested  it gets SIGTERM when the n-th batch of test images was handed out

The answer is a list of exit statuses, one per process: -9 after a kill, 3 after a UsageError, which
goes to OUTPUT/error.txt, 128 + its number after a signal, with what is said in OUTPUT/said.txt.
"""

import atexit
import errno
import functools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from train_runs import make_config, make_splits

from tcpa.cli import UsageError
from tcpa.train import storage
from tcpa.train.engine import checkpoint
from tcpa.train.engine.interruption import Interrupted
from tcpa.train.jobs.run import run


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


ASKING = {
    "SIGINT": [signal.SIGINT],
    "SIGTERM": [signal.SIGTERM],
    "twice": [signal.SIGINT, signal.SIGINT],
    "tested": [signal.SIGTERM],
}


def asking_epoch(epoch: Any, count: Counter, place: str, *arguments: Any) -> Any:
    for batch in epoch(*arguments):
        if count.due():
            for number in ASKING[place]:
                os.kill(os.getpid(), number)
        yield batch


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
    elif place in ASKING:
        source = splits.evaluation["test"] if place == "tested" else splits.train
        source.epoch = functools.partial(asking_epoch, source.epoch, Counter(number), place)
    elif place == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
    elif place == "line":
        init = checkpoint.Journal.__init__

        def breaking_init(self: Any, *arguments: Any, **options: Any) -> None:
            init(self, *arguments, **options)
            self._file = FaultyFile(self._file, number)

        checkpoint.Journal.__init__ = breaking_init
    else:
        storage.os = FaultyOS(place, number)


def train(job: dict[str, Any], rank: int) -> None:
    config = make_config(Path(job["output"]), **job["options"])
    world = job["processes"]
    splits = make_splits(job["images"], rank=rank, world=world, even=config.mixup_alpha != 0)
    if world > 1:
        # What torchrun sets.
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ.update(place | numbers)
    if job["kill"] and rank == (world - 1 if job["kill"][0] in ASKING else 0):
        inject(job["kill"], splits)
    output = Path(job["output"])
    # A shell starts what goes to the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(config, splits)
    except UsageError as error:
        output.mkdir(parents=True, exist_ok=True)
        (output / "error.txt").write_text(str(error))
        os._exit(3)
    except Interrupted as ended:
        if str(ended):
            (output / "said.txt").write_text(str(ended))
        os._exit(ended.status)
    except KeyboardInterrupt:
        os._exit(130)


def fork(job: dict[str, Any], rank: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            train(job, rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


class Zygote:
    """The other end: hands out jobs."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def train(
        self,
        output: Path,
        kill: tuple | None = None,
        *,
        images: int = 22,
        processes: int = 1,
        **options: Any,
    ) -> int | list[int]:
        """Return the exit status of a run, or all of them."""
        assert self._process.stdin and self._process.stdout
        job = {"output": str(output), "options": options, "kill": kill}
        job |= {"images": images, "processes": processes, "port": free_port()}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        statuses = json.loads(self._process.stdout.readline())
        return statuses[0] if processes == 1 else statuses

    def stop(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@functools.cache
def shared() -> Zygote:
    """Return the one of this test process; it takes seconds to start."""
    found = Zygote()
    atexit.register(found.stop)
    return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        children = [fork(job, rank) for rank in range(job["processes"])]
        waited = [os.waitpid(child, 0)[1] for child in children]
        statuses = [os.waitstatus_to_exitcode(status) for status in waited]
        print(json.dumps(statuses), file=answers, flush=True)


if __name__ == "__main__":
    main()
