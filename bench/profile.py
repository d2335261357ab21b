"""Profile one step: a trace to look at, the operators that take longest, and where memory goes.

Usage: tcpa-bench profile [--provider tcpa] [--device cpu] [--output profile]

The output folder holds

trace/        the trace, for TensorBoard's PyTorch profiler (`tensorboard --logdir OUTPUT/trace`,
              extra [profile]) and, the file itself, for Perfetto (ui.perfetto.dev)
operators.txt the operators that take longest, with shapes
kinds.txt     milliseconds by kind of kernel
memory.json   the operators that allocate most, in bytes; on a GPU also memory.pickle, a snapshot
              of the allocator for pytorch.org/memory_viz
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from ..cli import UsageError, choose_device, command, output_folder, require
from .harness.breakdown import add_up
from .harness.case import StepCase
from .harness.model import Runner, make_batch
from .harness.options import parse, step_parser
from .providers.step import providers

TRACE = "trace"
WARM_UP = 2
"""Steps before the one that is profiled."""


def profile_step(step: Callable[[], Any], device: torch.device, output: Path) -> dict[str, float]:
    """Run a step under the profiler and write what it shows.

    Returns:
        Seconds by kind of kernel.
    """
    gpu = device.type == "cuda"
    for _ in range(WARM_UP):
        step()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    handler = tensorboard_trace_handler(str(output / TRACE), worker_name="tcpa")
    if gpu:
        torch.cuda.memory._record_memory_history()
    with profile(
        activities=activities,
        record_shapes=True,
        profile_memory=True,
        acc_events=True,
        on_trace_ready=handler,
    ) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize(device)
    if gpu:
        torch.cuda.memory._dump_snapshot(str(output / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    events = profiler.events()
    assert events is not None, "the profiler has run"
    kinds = add_up(events, gpu)
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    averages = profiler.key_averages(group_by_input_shape=True)
    (output / "operators.txt").write_text(
        averages.table(sort_by=order, row_limit=40, max_name_column_width=60), encoding="utf-8"
    )
    lines = [f"{kind:<20}{1e3 * seconds:>12.3f} ms" for kind, seconds in kinds.items()]
    (output / "kinds.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    memory = allocations(profiler.key_averages(), gpu)
    (output / "memory.json").write_text(json.dumps(memory, indent=1) + "\n", encoding="utf-8")
    return kinds


def allocations(averages: Any, gpu: bool) -> list[dict[str, Any]]:
    """Return operators with the bytes that they themselves allocated and kept, largest first."""
    field = "self_device_memory_usage" if gpu else "self_cpu_memory_usage"
    found = [
        {"operator": event.key, "bytes": getattr(event, field), "calls": event.count}
        for event in averages
        if getattr(event, field) > 0
    ]
    return sorted(found, key=lambda row: -row["bytes"])


@command("tcpa-bench profile")
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = step_parser("profile", __doc__)
    parser.add_argument("--provider", default="tcpa", help="as `tcpa-bench step` names it")
    parser.add_argument("--mode", default="train", choices=("train", "eval"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=Path, default=Path("profile"), help="folder to write")
    options = parse(parser, argv, batch=1)
    device = choose_device(options.device)
    available = {p.name: p for p in providers(options.precision, device.type)}
    names = ", ".join(map(repr, available))
    known = options.provider in available
    require(known, "--provider", repr(options.provider), f"one of {names}", "correct it")
    with output_folder(options.output):
        (options.output / TRACE).mkdir(exist_ok=True)
    case = StepCase(model=options.model, batch=options.batch, mode=options.mode, device=str(device))
    try:
        runner = Runner(case, available[options.provider])
    except ValueError as error:
        raise UsageError(f"--model {options.model}: {error}") from None
    runner.use(case.mode)
    batch = make_batch(case, runner.model)
    profile_step(functools.partial(runner.run, *batch), device, options.output)
    print((options.output / "kinds.txt").read_text(encoding="utf-8"), end="")
    print(f"wrote {options.output}: trace, operators.txt, kinds.txt, memory.json")
    print(f"to look at it: tensorboard --logdir {options.output / TRACE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
