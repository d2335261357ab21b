"""LION's robust training: only the critical values of a prompt are trained."""

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def keep_critical(parameters: Iterable[nn.Parameter], share: float) -> None:
    """Zero the gradients of all but the most critical values of each parameter.

    A value is critical where |value * gradient| is large. The others are left to weight decay,
    which drives them to 0. Waits for no device.

    Args:
        parameters: with gradients.
        share: of the values of each parameter that are kept, at least one.

    Source:
        LION (AAAI 2024), as its abstract describes it; unverified.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        score = (parameter * parameter.grad).abs().flatten()
        kept = max(round(share * score.numel()), 1)
        threshold = score.kthvalue(score.numel() - kept + 1).values
        parameter.grad.mul_((score >= threshold).view_as(parameter.grad))
