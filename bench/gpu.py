"""Everything that only a GPU can show, in one command, most valuable first.

Usage: tcpa-bench gpu [--results gpu_results.jsonl] [--minutes 9] [--rehearse]

The stages are commands of their own, run one after the other:

tests       the tests that need a GPU (bfloat16 values, determinism, memory, capture, compilation)
golden      the outputs of the official code, through the kernels
ops         the operations at the promised shape
step        one training step
epoch       seconds per epoch
evaluation  one evaluation step
converge    200 training steps against the reference, 100 repeats of a step
tune        launches of the kernels
ladder      the step from the official algorithm to the fastest form, one change after the other
more ops    the other shapes

A stage that ended well is not run again with the same results file, so that the command can be
repeated until all is done. A stage that fails does not keep the others from running. The time that
is left is handed on: a stage is interrupted when it is over, and keeps what it has measured. The
stage "tests" needs pytest and hypothesis; all others need torch, triton, timm and numpy alone.

--rehearse runs the same stages on the CPU with the smallest shapes: it shows that nothing in them
fails for a trivial reason on the day that there is a GPU. It keeps results of its own.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..cli import UsageError, choose_device, command, require, require_writable

DEFAULT = "gpu_results.jsonl"
GRACE = 20.0
"""Seconds in which an interrupted stage has to end."""

ROOT = Path(__file__).parent.parent
SMALL = ("--model", "test_vit", "--batch", "2")
TINY_SHAPE = "ti16-32-p4-b1"


@dataclass(frozen=True, slots=True)
class Stage:
    """One command."""

    name: str
    arguments: tuple[str, ...]
    """Of the Python interpreter."""
    keeps_results: bool = True
    """Whether it takes --results."""


def stages(device: str, *, rehearse: bool) -> list[Stage]:
    """Return the stages in the order of their value.

    Args:
        device: "cuda", "cuda:1", ..., or "cpu" to rehearse.
        rehearse: the smallest shapes.
    """
    bench = ("-m", "tcpa.bench")
    on = ("--device", device)
    golden = sorted(str(path) for path in (ROOT / "tests" / "golden").glob("*.npz"))
    half = ("--precision", "bfloat16", "--batch", "128", "--rounds", "20")
    ops = ("--shape", "b16-224-p36-b128")
    epoch = ("--precision", "bfloat16", "--batch", "128", "--images", "5394", "--workers", "16")
    # An epoch is 43 steps: one says enough, and all methods from all sources are many.
    epoch = (*epoch, "--rounds", "1")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    own = [str(path) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    tests = ("-m", "pytest", "-q", "-m", "gpu", *own)
    verify = ("-m", "tcpa.verify", "--impl", "triton", *on, "--dtype", "float32", *golden)
    tune: tuple[str, ...] = ()
    if rehearse:
        half = (*SMALL, "--rounds", "1", "--provider", "VPT-deep")
        # What is compiled would take most of the time.
        ops = ("--shape", TINY_SHAPE, "--seconds", "0.01", "--provider", "official", "tcpa")
        epoch = (*SMALL, "--rounds", "1", "--images", "2", "--workers", "0")
        epoch = (*epoch, "--provider", "frozen ViT")
        # There is nothing to run without a GPU, but all of them can be collected.
        tests = (*tests, "--collect-only")
        verify = ("-m", "tcpa.verify", *golden[-1:])
        tune = ("--dry-run",)
    step = (*bench, "step", *on, *half)
    converge = (*bench, "converge", *on)
    ladder = (*step, "--ladder")
    if rehearse:
        ladder = (*bench, "step", *on, *SMALL, "--rounds", "1", "--ladder", "--provider", "frozen")
        converge = (*converge, *SMALL, "--steps", "20", "--repeats", "2")
    return [
        Stage("tests", tests, keeps_results=False),
        Stage("golden", verify, keeps_results=False),
        Stage("ops", (*bench, "ops", *on, *ops)),
        Stage("step", (*step, "--kinds") if not rehearse else step),
        Stage("epoch", (*bench, "epoch", *on, *epoch)),
        Stage("evaluation", (*step, "--mode", "eval")),
        Stage("converge", converge),
        Stage("tune", (*bench, "tune", *tune), keeps_results=False),
        Stage("ladder", ladder),
        Stage("more ops", (*bench, "ops", *on, *(ops if rehearse else ()))),
    ]


class Progress:
    """Which stages ended well, in a file beside the results."""

    def __init__(self, results: Path, *, rehearse: bool) -> None:
        kind = "rehearsed" if rehearse else "stages"
        self._path = results.with_suffix(f".{kind}.json")
        self.done: list[str] = []
        if self._path.exists():
            try:
                self.done = list(json.loads(self._path.read_text(encoding="utf-8"))["done"])
            except (ValueError, KeyError, TypeError):
                raise UsageError(
                    f"--results: {self._path} is damaged, expected the stages that were done; "
                    "delete it to run all of them again"
                ) from None

    def add(self, name: str) -> None:
        """Note that a stage ended well."""
        self.done.append(name)
        self._path.write_text(json.dumps({"done": self.done}) + "\n", encoding="utf-8")


def _hear_interruptions() -> None:
    """A shell's job in the background ignores interruptions, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(stage: Stage, results: Path, seconds: float) -> int | None:
    """Run a stage; return its exit status, None when its time was over."""
    extra = ("--results", str(results)) if stage.keeps_results else ()
    words = [sys.executable, *stage.arguments, *extra]
    with subprocess.Popen(
        words, preexec_fn=None if os.name == "nt" else _hear_interruptions
    ) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            # As Ctrl-C does: it writes what it has measured.
            process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
        return None


@command("tcpa-bench gpu")
def main(argv: list[str] | None = None) -> int:
    """Run the stages; exit status 0 when all of them ended well, 1 otherwise."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="tcpa-bench gpu", description=summary)
    text = "file to append the results to (gpu_results.jsonl; rehearsal_results.jsonl)"
    parser.add_argument("--results", type=Path, help=text)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stage", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, smallest shapes")
    options = parser.parse_args(argv)
    require(options.minutes > 0, "--minutes", options.minutes, "a positive number", "change it")
    device = "cpu"
    if not options.rehearse:
        device = str(choose_device(options.device))
        remedy = "pass --rehearse to run the stages on a CPU"
        require(device != "cpu", "--device", device, "a GPU", remedy)
    planned = stages(device, rehearse=options.rehearse)
    names = [stage.name for stage in planned]
    for name in options.stage:
        require(name in names, "--stage", repr(name), ", ".join(names), "name one of them")
    if options.results is None:
        options.results = Path("rehearsal_results.jsonl" if options.rehearse else DEFAULT)
    require_writable(options.results, "--results")
    progress = Progress(options.results, rehearse=options.rehearse)
    end = time.monotonic() + 60 * options.minutes
    failed = []
    for stage in planned:
        if stage.name in progress.done or (options.stage and stage.name not in options.stage):
            continue
        left = end - time.monotonic()
        if left <= 1:
            failed.append(f"{stage.name} (no time left)")
            continue
        print(f"--- {stage.name}: {' '.join(stage.arguments)}", flush=True)
        status = run(stage, options.results, left)
        if status == 0:
            progress.add(stage.name)
        else:
            failed.append(f"{stage.name} ({'out of time' if status is None else status})")
    if failed:
        print(f"tcpa-bench gpu: not done: {', '.join(failed)}; run it again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
