"""Which implementation computes an operation: the choice, its reason, and autocast around it."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from . import kernels
from .checks import require_choice
from .cpu import sdpa_unavailable_reason

Impl = Literal["auto", "triton", "sdpa", "dense", "reference"]
IMPLS = ("auto", "triton", "sdpa", "dense", "reference")

NO_AUTOCAST = ("meta",)
"""Device types that torch.autocast refuses; asking torch itself would break compiled graphs."""

SHORT = 512
"""Tokens below which stored probabilities are faster than the fused CPU attention in 16 bits."""

_log = logging.getLogger("tcpa")
_announced: set[tuple[str, str]] = set()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype in which torch.autocast computes on a device; None while it is off."""
    kind = device.type
    on = kind not in NO_AUTOCAST and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch torch.autocast off for a device that knows it."""
    unknown = device.type in NO_AUTOCAST
    return nullcontext() if unknown else torch.autocast(device.type, enabled=False)


def choose_impl(
    impl: Impl,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    num_tokens: int | None = None,
) -> tuple[Impl, str]:
    """Resolve `impl` for a device and a size.

    Args:
        impl: "triton" (fused kernels), "sdpa" (exact composition over PyTorch's fused attention, on
            the CPU), "dense" (exact, stores one matrix of probabilities), "reference", or "auto":
            the fastest of these that can run.
        device: where the tensors are.
        dtype: in which the attention is computed.
        num_tokens: L, if known.

    Returns:
        The implementation that will run and the reason for it.

    Raises:
        ValueError: unknown `impl`.
        RuntimeError: an implementation was asked for by name and cannot run; nothing else is run in
            its place.
    """
    if not isinstance(device, torch.device):
        raise TypeError(f"device: got {device!r}, expected a torch.device; pass torch.device(...)")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {dtype!r}, expected a torch.dtype; pass torch.float32, ...")
    return _choose(impl, device, dtype, num_tokens)


def _choose(
    impl: Impl, device: torch.device, dtype: torch.dtype, num_tokens: int | None
) -> tuple[Impl, str]:
    require_choice("impl", impl, IMPLS)
    if impl == "auto":
        return _choose_fastest(device, dtype, num_tokens)
    reason = None
    if impl == "triton":
        reason = kernels.unavailable_reason(device)
    elif impl == "sdpa":
        reason = sdpa_unavailable_reason(device)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run: {reason}; pass impl='auto' or 'reference'")
    return impl, "asked for"


def _choose_fastest(
    device: torch.device, dtype: torch.dtype, num_tokens: int | None
) -> tuple[Impl, str]:
    if device.type != "cuda":
        # Triton's interpreter could run them on the CPU; it is for tests.
        no_triton = f"tensors are on {device.type!r}; Triton kernels need a CUDA or ROCm device"
    elif dtype == torch.float64:
        no_triton = kernels.unavailable_reason(device) or "the kernels compute in float32 at most"
    else:
        no_triton = kernels.unavailable_reason(device)
    if no_triton is None:
        return "triton", "kernels can run here"
    if device.type != "cpu":
        return "reference", no_triton
    # Measured on 2 cores with native bfloat16, forward and backward, against "sdpa": at L = 65
    # 0.2x the time, 197 0.35x, 257 0.6x, 577 1.0x; in float32 at L = 197 1.0x.
    if num_tokens is not None and num_tokens < SHORT and dtype.itemsize == 2:
        return "dense", f"{no_triton}; the fastest for {num_tokens} tokens in {dtype}"
    return "sdpa", no_triton


def resolve(
    impl: Impl, x: Tensor, num_tokens: int, refusal: Callable[[], Exception | None]
) -> Impl:
    """Choose an implementation and log an automatic choice once.

    `refusal` returns what to raise where the kernels do not take tensors like these.
    """
    chosen, reason = _choose(impl, x.device, x.dtype, num_tokens)
    refused = refusal() if chosen == "triton" else None
    if refused is not None:
        if impl == "triton":
            raise refused
        chosen, reason = "reference", "beyond the sizes of the kernels"
    if impl == "auto" and not torch.compiler.is_compiling() and (chosen, reason) not in _announced:
        _announced.add((chosen, reason))
        _log.info("implementation: %s (%s)", chosen, reason)
    return chosen
