"""Measure launches of the kernels on the GPU that is there and write the launch table as data.

Usage: `tcpa-bench tune [--operation NAME ...] [--dtype bf16 ...] [--bucket d64 ...] [--rounds N]
[--output DIR] [--dry-run]`.

Every candidate first computes outputs and gradients through the public operation; one that selects
or computes something else than the current row is discarded, and the current row itself is held
against the reference in float64. Then the candidates are timed in shuffled order, each once a
round, with a cold L2 cache.

What is timed is the host function that launches the kernel, captured once as a CUDA graph so that
Python does not count. Some of these functions launch small kernels beside it (unit keys and the
sum of the distances, the prompts' sum over the batch): they are in the figure of every candidate
alike, so that the differences are those of the row.

A candidate replaces the current row when it is faster by more than 2 % of the median and the
quartiles do not overlap. The file ARCHITECTURE.json is written after every row; rows of other
operations, dtypes and buckets stay. Its head describes the latest run. `tcpa-bench static` then
compiles the measured rows and tells which of them break a promise (spills).

Exit status 1: a current row does not run or computes something else. 2: nothing can be measured.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from .. import provenance
from ..cli import UsageError, command, require_writable
from ..kernels import launch as table
from ..kernels.launch import (
    DEFAULT,
    Launch,
    architecture_of,
    choose_launch,
    forget_measured,
    interpreting,
    override,
    read_measured,
)
from .tune_cases import (
    BUCKETS,
    DTYPES,
    OPERATIONS,
    LaunchRow,
    Problem,
    Results,
    candidates,
    make_problem,
    targets,
)

MARGIN = 0.02
"""Part of the current median that a candidate must save to replace it."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}
"""Largest difference of a result, as a part of its largest value."""
FLUSH_BYTES = 256 * 2**20
NO_DEVICE = "no CUDA device; launches are measured, not guessed; --dry-run lists the candidates"

Clock = Callable[[Callable[[], object]], Callable[[], float]]
"""Prepares a launching function; what it returns measures it once, in microseconds."""


@dataclass(kw_only=True, slots=True)
class Trial:
    """A candidate that computes the right thing, and its times."""

    launch: Launch
    measure: Callable[[], float]
    microseconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.microseconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.microseconds, n=4, method="inclusive")
        return low, high


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def device_clock(call: Callable[[], object]) -> Callable[[], float]:
    """Time a launching function on the current CUDA device, its L2 cache cold."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = _flush_buffer()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure() -> float:
        # The device is still writing this buffer while the host queues what is timed.
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    for _ in range(3):
        measure()
    return measure


def difference(found: Results, expected: Results) -> str | None:
    """Say which result differs from the expected one and by how much; None when none does."""
    for name, ours in found.items():
        truth = expected[name]
        if not ours.is_floating_point():
            if not torch.equal(ours, truth):
                return f"{name}: another selection"
            continue
        error = (ours.double() - truth.double()).abs().max()
        error = (error / truth.double().abs().max().clamp_min(1e-30)).item()
        # NaN is not within the tolerance.
        allowed = TOLERANCE[ours.dtype]
        if not error <= allowed:
            return f"{name}: off by {error:.1e} of its largest value, {allowed:.0e} allowed"
    return None


def describe(target: LaunchRow, launch: Launch) -> str:
    """Return the columns that name a candidate."""
    blocks = " ".join(f"{name}={size}" for name, size in launch.blocks.items())
    registers = "-" if launch.max_registers is None else str(launch.max_registers)
    return (
        f"{target.operation:<28}{target.bucket:<7}{target.dtype:<6}{blocks:<34}"
        f"{launch.num_warps:>5}{launch.num_stages:>7}{registers:>6}"
    )


HEADER = (
    f"{'operation':<28}{'bucket':<7}{'dtype':<6}{'blocks':<34}{'warps':>5}{'stages':>7}{'regs':>6}"
)


def _reason(error: BaseException) -> str:
    """Return the one line of a compiler's or driver's complaint that says most."""
    lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error" in line.lower()), lines[-1]).strip()


def right_launches(target: LaunchRow, problem: Problem, launches: Sequence[Launch]) -> list[Launch]:
    """Return the launches that run and compute the right thing; print why others do not."""
    right: list[Launch] = []
    expected: Results | None = None
    for launch in launches:
        label = describe(target, launch)
        try:
            with override(target.operation, launch):
                found = problem.results()
        except Exception as error:
            # Whatever a compiler or driver raises disqualifies the candidate, nothing else.
            print(f"{label}  does not run: {_reason(error)}", flush=True)
            continue
        finally:
            if torch.cuda.is_available():
                # A fault that broke the device would blame all later candidates: stop here.
                torch.cuda.synchronize()
        wrong = difference(found, problem.truth() if expected is None else expected)
        if wrong is not None:
            print(f"{label}  WRONG RESULT, discarded: {wrong}", flush=True)
            continue
        expected = expected or found
        right.append(launch)
    return right


def time_launches(
    target: LaunchRow, problem: Problem, launches: Sequence[Launch], clock: Clock, rounds: int
) -> list[Trial]:
    """Time the launches in turn, every round in another order."""
    # What the kernel reads comes from a launch that is known to be right.
    with override(target.operation, launches[0]):
        call = problem.launcher(target.operation)
    trials = []
    for launch in launches:
        with override(target.operation, launch):
            trials.append(Trial(launch=launch, measure=clock(call)))
    order = random.Random(0)
    for _ in range(rounds):
        for trial in order.sample(trials, len(trials)):
            with override(target.operation, trial.launch):
                trial.microseconds.append(trial.measure())
    return trials


def choose_trial(trials: Sequence[Trial], current: Launch) -> Trial:
    """Return the fastest trial that clearly beats the current launch, else the current one."""
    base = next((trial for trial in trials if trial.launch == current), None)
    if base is None:
        return min(trials, key=lambda trial: trial.median)
    clear = [
        trial for trial in trials
        if trial.median < (1 - MARGIN) * base.median and trial.quartiles[1] < base.quartiles[0]
    ]  # fmt: skip
    return min(clear, key=lambda trial: trial.median, default=base)


def tune(
    target: LaunchRow, problem: Problem, current: Launch, clock: Clock, rounds: int
) -> dict[str, Any] | None:
    """Measure the candidates of one row.

    Args:
        target: the row.
        problem: shape and tensors to measure with.
        current: the launch in use.
        clock: how to time a launch.
        rounds: times that every candidate is measured, at least 2.

    Returns:
        The row to store, `previous_us` None when the current launch was discarded; None when no
        candidate computes the right thing.
    """
    right = right_launches(target, problem, candidates(target, current))
    if not right:
        print(f"{target.operation} {target.bucket} {target.dtype}: NO CANDIDATE IS RIGHT")
        return None
    trials = time_launches(target, problem, right, clock, rounds)
    chosen = choose_trial(trials, current)
    for trial in trials:
        marks = ["current"] * (trial.launch == current) + ["chosen"] * (trial is chosen)
        low, high = trial.quartiles
        label = describe(target, trial.launch)
        figures = f"{trial.median:>10.2f} us ({low:.2f}-{high:.2f})"
        print(" ".join([f"{label}{figures}", *marks]), flush=True)
    launch = chosen.launch
    previous = next((trial.median for trial in trials if trial.launch == current), None)
    return {
        "operation": target.operation,
        "dtype": target.dtype,
        "bucket": target.bucket,
        "blocks": dict(launch.blocks),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "max_registers": launch.max_registers,
        "median_us": round(chosen.median, 3),
        "previous_us": None if previous is None else round(previous, 3),
    }


def machine(device: torch.device) -> dict[str, str]:
    """Describe what is measured on, for the head of the file."""
    return {
        "architecture": architecture_of(device),
        "device": provenance.device_name(device),
        "driver": provenance.driver(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": provenance.commit(12) + "-dirty" * provenance.has_changes(),
        "date": provenance.now()[:10],
    }


def store(path: Path, head: dict[str, str], row: dict[str, Any]) -> None:
    """Put one row into the file, which is never seen half written."""
    rows = read_measured(path)
    rows[row["operation"], row["dtype"], row["bucket"]] = row
    content = {**head, "rows": [rows[key] for key in sorted(rows)]}
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise UsageError(
            f"--output: {path} could not be written ({error.strerror}); it holds the rows before "
            f"this one: {json.dumps(row)}"
        ) from None


def _set_aside(path: Path) -> None:
    """Move a damaged file out of the way, so that it can be measured again."""
    try:
        read_measured(path)
    except ValueError as error:
        kept = path.with_name(f"{path.name}.damaged")
        path.replace(kept)
        forget_measured()
        print(f"{error}\nkept as {kept}; its rows are measured again where they are asked for")


def _current(target: LaunchRow, architecture: str) -> Launch:
    """Return the launch in use for a row."""
    dtype, bucket = DTYPES[target.dtype], target.bucket
    return choose_launch(target.operation, architecture=architecture, dtype=dtype, bucket=bucket)


def run(
    rows: Sequence[LaunchRow], device: torch.device, path: Path, head: dict[str, str],
    clock: Clock, rounds: int,
) -> int:  # fmt: skip
    """Tune rows one after the other and store each; return the exit status."""
    _set_aside(path)
    print(f"{HEADER}    median us (quartiles)")
    failed = False
    try:
        for target in rows:
            current = _current(target, head["architecture"])
            row = tune(target, make_problem(target, device), current, clock, rounds)
            if row is not None:
                store(path, head, row)
            failed |= row is None or row["previous_us"] is None
    except KeyboardInterrupt:
        print(f"tcpa-bench tune: interrupted; rows measured before are in {path}")
        return 130
    finally:
        forget_measured()
    print(f"{len(rows)} rows measured; {path}")
    return int(failed)


def _list(rows: Sequence[LaunchRow], architecture: str) -> None:
    """Print the candidates of every row."""
    print(f"candidates beside the rows of {architecture!r}\n{HEADER}")
    for target in rows:
        current = _current(target, architecture)
        for launch in candidates(target, current):
            print(describe(target, launch) + "  current" * (launch == current))


@command("tcpa-bench tune")
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="tcpa-bench tune", description=summary)
    parser.add_argument("--operation", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--bucket", nargs="+", choices=BUCKETS, default=BUCKETS)
    parser.add_argument("--rounds", type=int, default=100, help="times each candidate is measured")
    parser.add_argument("--output", type=Path, default=table.FOLDER, help="folder of the file")
    parser.add_argument("--dry-run", action="store_true", help="only list the candidates")
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error(f"--rounds: got {options.rounds}, expected at least 2")
    rows = list(dict.fromkeys(targets(options.operation, options.dtype, options.bucket)))
    if not rows:
        parser.error("--operation, --bucket: no row of the launch table has both")
    present = torch.cuda.is_available()
    architecture = architecture_of(torch.device("cuda")) if present else DEFAULT
    if options.dry_run or options.output.resolve() != table.FOLDER.resolve():
        try:
            read_measured(table.FOLDER / f"{architecture}.json")
        except ValueError as error:
            raise UsageError(str(error)) from None
    if options.dry_run:
        _list(rows, architecture)
        return 0
    if not present:
        raise UsageError(NO_DEVICE)
    if interpreting():
        raise UsageError("unset TRITON_INTERPRET; it is not the GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    path = options.output / f"{architecture}.json"
    require_writable(path)
    return run(rows, device, path, machine(device), device_clock, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
