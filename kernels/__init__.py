"""Triton kernels of TCPA.

The package imports torch and triton only and knows nothing of models or data. It holds no kernel
yet: `unavailable_reason` says so, and the library computes by its reference until kernels arrive.
"""

import torch


def unavailable_reason(device: torch.device) -> str | None:
    """Say why the kernels cannot run on `device`; None when they can."""
    if device.type != "cuda":
        return f"tensors are on {device.type!r}; Triton kernels need a CUDA or ROCm device"
    return "this version of tcpa ships no Triton kernels yet"


__all__ = ["unavailable_reason"]
