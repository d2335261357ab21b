"""What a device reaches on the simplest work: copying memory and multiplying large matrices.

Measured in the run that quotes shares of it, with the same clock. What fits the caches of a CPU may
be faster than the copy.
"""

from dataclasses import dataclass

import torch

from ..harness.timing import Quantiles, interleave

COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Of the buffer that is copied; more than any cache holds."""
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of one device; the product's at one dtype."""

    copy: Quantiles
    """Bytes read and written a second."""
    product: Quantiles
    """FLOPs a second."""

    @property
    def rates(self) -> tuple[float, float]:
        """Medians: FLOPs a second, bytes a second."""
        return self.product.p50, self.copy.p50


def measure(device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> Ceilings:
    """Measure both rates.

    Args:
        device: whose.
        dtype: of the matrices; float32 is multiplied as PyTorch is set to, by default as float32.
        seconds: time to spend on it, about.
    """
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    size = PRODUCT_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    calls = {
        "copy": lambda: target.copy_(source),
        "product": lambda: torch.mm(a, b, out=out),
    }
    found = interleave(calls, device, seconds=seconds)
    times = {name: Quantiles.of(values) for name, values in found.items()}
    copied, flops = 2.0 * source.numel(), 2.0 * size**3
    return Ceilings(times["copy"].rate(copied), times["product"].rate(flops))
