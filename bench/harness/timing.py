"""Timing on a noisy machine: every variant once a round, the variants in turn, then quantiles.

What disturbs a round disturbs all variants alike, so ratios between variants of one run can be
believed where single times cannot. On a GPU the caches are flushed before every call and CUDA
events take the time; on a CPU the clock does.
"""

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

FLUSH_BYTES = 512 * 2**20
"""More than any GPU's last-level cache holds."""

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Quantiles of a sample, in its unit."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, values: list[float]) -> "Quantiles":
        """Return the quantiles of one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(values), cuts[7], len(values))

    def scaled(self, factor: float) -> "Quantiles":
        """Return the quantiles in another unit."""
        return Quantiles(self.p20 * factor, self.p50 * factor, self.p80 * factor, self.samples)

    def rate(self, amount: float) -> "Quantiles":
        """Return the quantiles of `amount / value`."""
        return Quantiles(amount / self.p80, amount / self.p50, amount / self.p20, self.samples)


def interleave(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, list[float]]:
    """Time calls in turn.

    Args:
        calls: what to time, by name; each is called twice before, to warm up.
        device: where they compute.
        seconds: time to spend on measuring, all calls together, beyond the first `min_rounds`.
        min_rounds: timed rounds at least.
        max_rounds: timed rounds at most.

    Returns:
        Seconds of every timed call, by name.
    """
    for call in calls.values():
        call()
        call()
    timer = _CudaTimer(device) if device.type == "cuda" else _CpuTimer()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for count in range(max_rounds):
        if count >= min_rounds and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            times[name].append(timer(call))
    return times


class _CpuTimer:
    def __call__(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class _CudaTimer:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # While the caches are overwritten the calls behind it are queued, so that the time
            # between the events is the device's and not that of launching.
            self._flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3


def peak_memory(call: Call, device: torch.device) -> float | None:
    """Return by how many bytes memory rises at most during a call; None where nobody counts.

    On a GPU the allocator counts; on Linux the kernel counts resident memory, to some MiB.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    # What earlier calls left in the heap would be used again, unseen.
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0.0, _resident("VmHWM") - before)
    except (OSError, ValueError):
        return None


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return 1024.0 * int(line.split()[1])
    raise ValueError(f"no {field}")


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> Quantiles:
    """Return how many times as fast as `base` a call is, from the pairs of the same round."""
    pairs = zip(times[name], times[base], strict=True)
    found = [b / a for a, b in pairs if a > 0 and math.isfinite(b)]
    return Quantiles.of(found)
