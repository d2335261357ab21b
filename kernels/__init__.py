"""Triton kernels of TCPA: prompt matching and gated attention, forward and backward.

The package imports torch and triton only and knows nothing of models or data; importing it imports
no kernel. The kernels (`gated_attention`, `match_prompts`, `norm_match`) equal the reference in
Triton's interpreter and compile offline for every promised shape. They have not run on a GPU yet,
so the library does not choose them; call them from their modules to try them.
"""

import torch


def unavailable_reason(device: torch.device) -> str | None:
    """Say why the library cannot choose the kernels on `device`; None when it can."""
    if device.type != "cuda":
        return f"tensors are on {device.type!r}; Triton kernels need a CUDA or ROCm device"
    return "the Triton kernels of this version have not been verified on a GPU yet"


__all__ = ["unavailable_reason"]
