"""Precisions of training and evaluation."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ...cli import require
from ..options.run import Precision
from .distributed import World


@dataclass(frozen=True, slots=True)
class Numerics:
    """How the model computes; trainable parameters are float32 in all of them."""

    name: str
    weights: torch.dtype = torch.float32
    """Dtype of the frozen weights and of the images."""
    autocast: torch.dtype | None = None
    """Dtype of matrix products under autocast; None without autocast."""

    @property
    def scales_loss(self) -> bool:
        """Whether gradients could underflow, so that the loss is scaled."""
        return self.autocast == torch.float16

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the autocast context in which the model is called."""
        dtype = self.autocast or torch.bfloat16
        return torch.autocast(device.type, dtype, enabled=self.autocast is not None)


NUMERICS = {
    "bf16": Numerics("bf16", weights=torch.bfloat16),
    "bf16-autocast": Numerics("bf16-autocast", autocast=torch.bfloat16),
    "fp16": Numerics("fp16", autocast=torch.float16),
    "fp32": Numerics("fp32"),
}


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it natively, float32 elsewhere.

    A CPU without such instructions emulates bfloat16 and would be slower than in float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def choose_numerics(
    precision: Precision, device: torch.device, *, trains_weights: bool = False
) -> Numerics:
    """Return what a precision means on a device; "auto" is bf16 where that is native.

    Args:
        precision: the option.
        device: where to train.
        trains_weights: weights of the backbone are trained and must stay in float32.

    Raises:
        UsageError: bf16 would store weights in bfloat16 that are trained.
    """
    if precision != "auto":
        usable = not (trains_weights and NUMERICS[precision].weights != torch.float32)
        expected = "bf16-autocast, fp16 or fp32: the method trains weights of the backbone"
        require(usable, "--precision", precision, expected, "choose bf16-autocast")
        return NUMERICS[precision]
    low = "bf16-autocast" if trains_weights else "bf16"
    return NUMERICS[low if fast_dtype(device) == torch.bfloat16 else "fp32"]


def require_graph(numerics: Numerics, world: World) -> None:
    """Raise UsageError unless a training step can be replayed as a CUDA graph."""
    device, option = world.device.type, "--cuda-graph"
    remedy = "leave --cuda-graph out"
    require(device == "cuda", option, f"--device {device}", "a CUDA device", remedy)
    require(world.size == 1, option, f"{world.size} processes", "one process", remedy)
    usable, expected = not numerics.scales_loss, "bf16, bf16-autocast or fp32"
    require(usable, option, f"--precision {numerics.name}", expected, remedy)
