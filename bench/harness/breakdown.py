"""Kernel-time breakdown of a step: kernels by kind, from one profiled run."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KINDS: dict[str, tuple[str, ...]] = {
    "attention": (
        "gated_attention",
        "flash",
        "fmha",
        "attention",
        "softmax",
        "bmm",
        "baddbmm",
    ),
    "norm and match": ("layer_norm", "layernorm", "norm_match", "match_", "topk", "sort"),
    "matrix products": (
        "gemm",
        "addmm",
        "aten::mm",
        "mkldnn",
        "onednn",
        "cutlass",
        "nvjet",
        "conv",
    ),
    "optimiser": ("adam", "optimizer", "foreach"),
    "copies and casts": ("copy_", "memcpy", "memset", "aten::cat", "fill_", "zero_"),
}
"""Kind -> parts of kernel or operator names, in the order of looking; the rest is element-wise."""
REST = "element-wise"
GAPS = "gaps"
"""Time in which the device computes nothing."""


def kind_of(name: str) -> str:
    """Return the kind of a kernel (GPU) or operator (CPU) by its name."""
    lower = name.lower()
    found = (kind for kind, parts in KINDS.items() if any(part in lower for part in parts))
    return next(found, REST)


def time_by_kind(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Profile one step.

    Returns:
        Seconds by kind, those of `KINDS`, "element-wise" and "gaps"; they add up to the time of the
        step under the profiler, which is longer than without. On a CPU an operator counts with what
        it spends itself, without the operators that it calls.
    """
    gpu = device.type == "cuda"
    # Its remarks on starting, stopping and absent GPUs are not for the reader of the table.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize(device)
    events = profiler.events()
    assert events is not None, "the profiler has run"
    return add_up(events, gpu)


def add_up(events: Iterable[Any], gpu: bool) -> dict[str, float]:
    """Add up the events of a profile by kind, in seconds."""
    total = dict.fromkeys((*KINDS, REST, GAPS), 0.0)
    first, last = float("inf"), 0.0
    for event in events:
        on_gpu = "CUDA" in str(event.device_type)
        if on_gpu != gpu or (gpu and event.is_user_annotation):
            continue
        first = min(first, event.time_range.start)
        last = max(last, event.time_range.end)
        own = event.time_range.elapsed_us() if gpu else event.self_cpu_time_total
        total[kind_of(event.name)] += own / 1e6
    span = max(0.0, (last - first) / 1e6)
    total[GAPS] = max(0.0, span - sum(total.values()))
    return total
