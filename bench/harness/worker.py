"""Steps measured in turn, every provider in a process of its own: its peak memory is its own."""

import contextlib
import functools
import multiprocessing as mp
import resource
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...cli import UsageError
from .breakdown import time_by_kind
from .case import StepCase
from .check import Answer, ReferenceCache, Skipped, WrongResultError
from .model import Runner, answer_of, make_batch, plain_answer
from .provider import StepProvider


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What was measured for one provider."""

    provider: StepProvider
    seconds: list[float]
    peak_bytes: float
    error: float
    kinds: dict[str, float] = field(default_factory=dict)
    """Seconds by kind of kernel, of one profiled step."""


class StoppedError(Exception):
    """The measurement ended early, for its cause; `results` hold the rounds before."""

    def __init__(self, results: list[StepResult]) -> None:
        super().__init__(f"ended after {len(results[0].seconds)} rounds")
        self.results = results


def measure(
    case: StepCase,
    chosen: Sequence[StepProvider],
    rounds: int,
    *,
    kinds: bool = False,
    skipped: Skipped | None = None,
) -> list[StepResult]:
    """Measure one step.

    Args:
        case: what to compute.
        chosen: the ways to compute it; the first one is the yardstick.
        rounds: timed steps of every provider.
        kinds: also profile one step of each.
        skipped: takes providers that fail before the first round, except for the yardstick; None:
            they raise.

    Returns:
        One result per provider that is not skipped.

    Raises:
        WrongResultError: a provider's loss or gradients differ from those of its method.
        UsageError: a provider cannot compute this.
        StoppedError: it ended early, but not before the first round.
    """
    references = ReferenceCache(case, _plain_answer_in_a_process)
    running: list[Worker] = []
    errors: list[float] = []
    try:
        for provider in chosen:
            try:
                references.prepare(provider)
                running.append(Worker(case, provider))
                # One at a time: two first steps at once would fight for the cores.
                errors.append(references.check(provider, running[-1].answer()))
            except (UsageError, WrongResultError) as error:
                if skipped is None or provider is chosen[0]:
                    raise
                skipped.add(error)
                for worker in running[len(errors) :]:
                    worker.stop()
                del running[len(errors) :]
        return measure_rounds(running, errors, rounds, kinds=kinds)
    finally:
        for worker in running:
            worker.stop()


def measure_rounds(
    running: Sequence["Worker"], errors: Sequence[float], rounds: int, *, kinds: bool = False
) -> list[StepResult]:
    """Go through the providers in turn, as often as asked for."""
    done: list[list[tuple[float, float]]] = []
    profiles: list[dict[str, float]] = [{} for _ in running]
    stopped: BaseException | None = None
    try:
        for _ in range(rounds):
            done.append([worker.step() for worker in running])
        if kinds:
            profiles = [worker.kinds() for worker in running]
    except (KeyboardInterrupt, UsageError) as error:
        if not done:
            raise
        stopped = error
    results = [
        StepResult(
            provider=worker.provider,
            seconds=[seconds for seconds, _ in steps],
            peak_bytes=steps[-1][1],
            error=error,
            kinds=profile,
        )
        for worker, error, profile, *steps in zip(running, errors, profiles, *done, strict=True)
    ]
    if stopped is not None:
        raise StoppedError(results) from stopped
    return results


def _plain_answer_in_a_process(case: StepCase, provider: StepProvider) -> Answer:
    worker = Worker(case, provider, plain=True)
    try:
        return worker.answer()
    finally:
        worker.stop()


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
        runner = Runner(case, provider)
        runner.use(case.mode)
        batch = make_batch(case, runner.model)
        step = functools.partial(runner.run, *batch)
        answer = answer_of(runner.model, step())
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
