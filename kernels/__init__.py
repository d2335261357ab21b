"""Triton kernels of TCPA: prompt matching and gated attention, forward and backward.

The package imports torch and triton only and knows nothing of models or data. It equals the
reference in Triton's interpreter and compiles offline for every promised shape; `pytest -m gpu`
checks it on a GPU.
"""

import torch

try:
    from .attention.inputs import refusal as attention_refusal
    from .attention.op import gated_attention
    from .host import launch_error
    from .matching.inputs import refusal as matching_refusal
    from .matching.op import match_prompts, norm_match
except ModuleNotFoundError as error:
    # Triton exists for Linux only; everything else of the library works without.
    if error.name is None or error.name.partition(".")[0] != "triton":
        raise
    _missing = True
else:
    _missing = False


def unavailable_reason(device: torch.device) -> str | None:
    """Say why the kernels cannot run on tensors of `device`; None when they can."""
    if _missing:
        return "triton is not installed; pip install triton (Linux)"
    return launch_error(device)


__all__ = [
    "attention_refusal",
    "gated_attention",
    "match_prompts",
    "matching_refusal",
    "norm_match",
    "unavailable_reason",
]
