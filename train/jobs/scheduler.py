"""Runs as processes, one at a time on each device; finished ones are skipped.

Every job is a process of its own with the command line of `tcpa-train run`, so that a run that
fails takes no other with it, and the printed commands of an array job are the same ones.
"""

import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...cli import UsageError, choose_device
from ..engine.rundir import CONFIG, LOG, brief, differences, last_log_line, saved_description
from ..options.run import RunConfig, SweepConfig
from ..options.search import SearchConfig
from ..recipes.runspec import RunSpec
from ..report.runs import finished_result

PROGRAM = (sys.executable, "-m", "tcpa.train", "run")
"""Command of one run."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep."""

    config: RunConfig
    spec: RunSpec

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.spec.folder

    @property
    def command(self) -> list[str]:
        """The command line of the run."""
        return [*PROGRAM, *arguments(self.config)]

    def result(self) -> dict[str, Any] | None:
        """Return the result if the run is finished, with just this configuration.

        Raises:
            Conflict: the folder belongs to another configuration.
            UsageError: its files are damaged, or its result was altered.
        """
        saved = saved_description(self.folder)
        changed = differences(saved, self.spec.describe()) if saved else []
        if changed:
            name, before, now = changed[0]
            raise Conflict(
                f"{name}: got {brief(now)}, expected {brief(before)} as in {self.folder / CONFIG}; "
                "repeat the first command, or choose another --output"
            )
        return finished_result(self.folder)


class Conflict(UsageError):
    """A run's folder belongs to another configuration."""


def arguments(config: Any) -> list[str]:
    """Return the command-line arguments that give a configuration, those of defaults left out.

    Its one field without a default is the positional one.
    """
    words = []
    for field in fields(config):
        option, value = f"--{field.name.replace('_', '-')}", getattr(config, field.name)
        if field.default is MISSING:
            words.insert(0, str(value))
        elif value == field.default:
            continue
        elif isinstance(value, bool) and isinstance(field.default, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def look_at(jobs: list[Job]) -> tuple[list[Job], list[tuple[Job, str]]]:
    """Return the runs that are left to do, and the damaged ones with what is wrong.

    Raises:
        Conflict: a folder belongs to another configuration; nothing is started then.
    """
    left, damaged = [], []
    for job in jobs:
        try:
            if job.result() is None:
                left.append(job)
        except Conflict:
            raise
        except UsageError as error:
            damaged.append((job, str(error)))
    return left, damaged


def count_runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


Devices = dict[str, str | None]
"""Where one job at a time runs -> what CUDA_VISIBLE_DEVICES is set to; None leaves it."""


def devices_of(config: SweepConfig | SearchConfig) -> Devices:
    """Return where jobs run, one at a time on each.

    Raises:
        UsageError: --gpus does not fit --device or the GPUs that are there.
    """
    asked = config.device
    if asked not in ("auto", "cuda") or choose_device(asked).type != "cuda":
        if config.gpus is not None:
            raise UsageError(
                f"--gpus: got {config.gpus} with --device {asked}, expected none, as the runs do "
                "not use GPUs; leave one of the two out"
            )
        return {str(choose_device(asked)): None}
    count = torch.cuda.device_count()
    numbers = config.gpus or tuple(range(count))
    if max(numbers) >= count:
        raise UsageError(
            f"--gpus: got {max(numbers)}, expected numbers below {count}, the GPUs that are there; "
            "leave the option out to use all"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return {f"cuda:{number}": names[number].strip() for number in numbers}


def carry_out(jobs: list[Job], devices: Devices, console: Console) -> list[tuple[Job, str]]:
    """Run jobs, one at a time on each device; return those that failed, with the reason."""
    free: queue.Queue[str | None] = queue.Queue()
    for gpu in devices.values():
        free.put(gpu)
    running = _Running()
    failed: list[tuple[Job, str]] = []
    with running, ThreadPoolExecutor(len(devices)) as pool:
        futures = {pool.submit(_run_on_free, job, free, running): job for job in jobs}
        try:
            for number, future in enumerate(as_completed(futures)):
                job, reason = futures[future], future.result()
                done = f"{number + 1}/{len(jobs)} {job.folder}"
                found = None
                try:
                    found = job.result() if reason is None else None
                except UsageError as error:
                    reason = str(error)
                if found is not None:
                    console.print(f"{done}: {found['accuracy']:.2f} %", soft_wrap=True)
                else:
                    reason = reason or "it left no result"
                    failed.append((job, reason))
                    console.print(f"{done}: failed ({reason})", soft_wrap=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            count = running.stop()
            if count:
                console.print(
                    f"stopping {count_runs(count)} once the step is done and saved; again to stop "
                    "at once"
                )
            raise
    return failed


class _Running:
    """The processes that are running, so that none survives an interruption."""

    def __init__(self) -> None:
        self._lock, self._processes = threading.Lock(), set[subprocess.Popen]()
        self._stopped = False

    def __enter__(self) -> "_Running":
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever was not waited for."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.kill()

    def stop(self) -> int:
        """Ask all processes to save and end, and return how many; none is started from now on."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()
            return len(self._processes)

    def run(self, command: list[str], **options: Any) -> int | None:
        """Run a process to its end and return its status; None if all is to stop."""
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(command, **options)
            self._processes.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._processes.discard(process)


def _run_on_free(job: Job, free: "queue.Queue[str | None]", running: _Running) -> str | None:
    """Run a job where there is room; return what went wrong."""
    gpu = free.get()
    try:
        environment = dict(os.environ)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / LOG).open("ab") as log:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            if os.name == "posix":
                # Ctrl-C reaches all of a terminal's group: this process alone, which asks the runs.
                options["process_group"] = 0
            status = running.run(job.command, env=environment, **options)
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    finally:
        free.put(gpu)
    if status == 0:
        return None
    return "interrupted" if status is None else last_log_line(job.folder) or f"status {status}"
