"""Builders of caches in processes of their own, which may be killed.

One server imports everything once and forks them.
"""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from tcpa.train.data import building
from tcpa.train.data.pools import FilePool

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tcpa.train.data.building"])


def start_builder(photos: Path, folder: Path, stop: int = -1) -> tuple[BaseProcess, Connection]:
    """Build a cache; the process stops for good before image `stop`, if there is such a number.

    It sends "lock" when it asks for the lock, the images done, and the name of the cache.
    """
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_build, args=(theirs, photos, folder, stop), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def kill_worker(pool: FilePool) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _build(pipe: Connection, photos: Path, folder: Path, stop: int) -> None:
    load, lock = FilePool.load, building.FileLock

    def load_until(self, index):
        if index == stop:
            time.sleep(100)
        return load(self, index)

    def tell_lock(path):
        pipe.send("lock")
        return lock(path)

    building.CHUNK, building.FileLock, FilePool.load = 4, tell_lock, load_until
    pool = FilePool(photos, sorted(path.name for path in photos.iterdir()))
    cache = building.build_cache(
        pool, folder, "x", resize=32, workers=1, progress=lambda done, total: pipe.send(done)
    )
    pipe.send(cache.folder.name)
