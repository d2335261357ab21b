"""A provider of `tcpa-bench step` in a process of its own, so that its peak memory is its own."""

import contextlib
import functools
import multiprocessing as mp
import resource
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...cli import UsageError
from ..providers.step import StepCase, StepProvider
from .breakdown import time_by_kind
from .check import Answer, answer_of, plain_answer
from .model import build_model, build_step


class Worker:
    """A provider, or the plain form of a method, in a process of its own."""

    def __init__(self, case: StepCase, provider: StepProvider, *, plain: bool = False) -> None:
        context = _context()
        self.provider = provider
        self._end, far = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(far, case, provider, plain), daemon=True
        )
        self._process.start()
        far.close()

    def answer(self) -> Answer:
        """Wait for the first step and return what it computed."""
        return self._receive()

    def step(self) -> tuple[float, float]:
        """Run a step; return its seconds and the peak memory so far in bytes."""
        return self._ask("step")

    def kinds(self) -> dict[str, float]:
        """Run a step under the profiler; return seconds by kind of kernel."""
        return self._ask("kinds")

    def _ask(self, request: str) -> Any:
        # When it is gone, receiving says why.
        with contextlib.suppress(OSError):
            self._end.send(request)
        return self._receive()

    def _receive(self) -> Any:
        """Return the next answer.

        Raises:
            UsageError: the process reports that it cannot compute this, or is gone.
        """
        try:
            answer = self._end.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            raise UsageError(
                f"provider {self.provider.name!r}: its process ended with exit code "
                f"{self._process.exitcode} (-9 often means that memory ran out); try a smaller "
                "--batch or --model"
            ) from None
        if isinstance(answer, str):
            raise UsageError(answer)
        return answer

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


@functools.cache
def _context() -> Any:
    """Return how processes are started: from one that has done the imports, and nothing else."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _serve(connection: Connection, case: StepCase, provider: StepProvider, plain: bool) -> None:
    """Compute one step, then run steps on request; of a plain form the first one only."""
    # An interruption is the other side's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if case.threads:
        torch.set_num_threads(case.threads)
    try:
        if plain:
            connection.send(plain_answer(case, provider))
            return
        model = build_model(case, provider)
        step = build_step(case, provider, model)
        answer = answer_of(case, model, step())
        # A second one: compilation and caches are done with after it.
        step()
    except Exception as error:
        # Whatever keeps the first step from being made is what the user has to know.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        connection.send(f"{provider.name}, --model {case.model} --batch {case.batch}: {reason}")
        return
    device = torch.device(case.device)
    _hand_back(device)
    connection.send(answer)
    # Until the other side is gone.
    with contextlib.suppress(EOFError, OSError):
        while True:
            measure = time_by_kind if connection.recv() == "kinds" else _timed
            if device.type == "cuda":
                # Memory that was handed back is asked for again, and not in the step that counts.
                step()
            found = measure(step, device)
            _hand_back(device)
            connection.send(found)


def _hand_back(device: torch.device) -> None:
    """Give a GPU's memory to the next process: all providers share it, one at a time."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.empty_cache()


def _timed(step: Any, device: torch.device) -> tuple[float, float]:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    elapsed = time.perf_counter() - start
    if device.type == "cuda":
        return elapsed, float(torch.cuda.max_memory_allocated(device))
    return elapsed, 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
