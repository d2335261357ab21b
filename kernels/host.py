"""Host side shared by all launches: where kernels run, which dtypes and strides they take."""

import contextlib

import torch
from torch import Tensor

from .launch import DTYPE_CLASSES, interpreting


def launch_error(device: torch.device) -> str | None:
    """Say why no kernel can be launched on tensors of `device`; None when one can."""
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    return (
        f"tensors are on {device.type!r}; Triton kernels need a CUDA or ROCm device, or the "
        "Triton interpreter (TRITON_INTERPRET=1, set before triton is imported)"
    )


def require_launchable(device: torch.device) -> None:
    """Raise RuntimeError unless kernels can run on tensors of `device`."""
    reason = launch_error(device)
    if reason is not None:
        raise RuntimeError(f"{reason}; pass impl='reference'")


def dtype_error(name: str, tensor: Tensor) -> TypeError | None:
    """Return what to raise where no kernel exists for the dtype of `tensor`."""
    if tensor.dtype in DTYPE_CLASSES:
        return None
    return TypeError(
        f"{name}: got {tensor.dtype}, the kernels expect float16, bfloat16 or float32; convert it "
        "with .to() or pass impl='reference'"
    )


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the device of `tensor` current, so that a launch reaches it."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


__all__ = ["device_guard", "dtype_error", "launch_error", "require_launchable"]
