"""Ceilings of a device: how fast it copies memory and multiplies large matrices.

Measured in the run that quotes fractions of them, with the same clock. What fits the caches of a
CPU may be faster than the copy.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...cli import UsageError
from ..harness.case import DTYPES
from ..harness.results import Provenance, Row, make_rows, provenance
from ..harness.timing import Quantiles, interleave

COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Of the buffer that is copied; more than any cache holds."""
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices."""
UNITS = {"TFLOP/s": 1e12, "TB/s": 1e12, "GB/s": 1e9, "s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of one device; the product's at one dtype."""

    device: str
    product: Quantiles
    """FLOP/s."""
    copy: Quantiles
    """Bytes read and written a second."""
    source: str
    """Where both come from, for the reader."""

    @property
    def flops(self) -> float:
        """Median FLOP/s."""
        return self.product.p50

    @property
    def bandwidth(self) -> float:
        """Median bytes a second."""
        return self.copy.p50


def measure(device: torch.device, dtype: str, *, seconds: float = 1.0) -> Ceilings:
    """Measure both rates in about so many seconds.

    float32 is multiplied as PyTorch is set to, by default as float32.
    """
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    size = PRODUCT_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype])
    out = torch.empty_like(a)
    calls = {
        "copy": lambda: target.copy_(source),
        "product": lambda: torch.mm(a, b, out=out),
    }
    found = interleave(calls, device, seconds=seconds)
    times = {name: Quantiles.of(values) for name, values in found.items()}
    product = times["product"].rate(2.0 * size**3)
    copy = times["copy"].rate(2.0 * source.numel())
    return Ceilings(provenance(device).device, product, copy, "measured in this run")


def rows_of(ceilings: Ceilings, device: torch.device, dtype: str, where: Provenance) -> list[Row]:
    """Return the rows that `measured` reads."""
    size, mib = PRODUCT_SIZE[device.type], COPY_BYTES[device.type] // 2**20
    common = {"command": "ceilings", "dtype": dtype, "mode": "forward", "provider": "torch"}
    copy = common | {"operation": "copy", "shape": f"{mib}MiB"}
    product = common | {"operation": "matrix product", "shape": f"{size}x{size}x{size}"}
    return [
        *make_rows({("bandwidth", "GB/s"): ceilings.copy.scaled(1e-9)}, where, **copy),
        *make_rows({("rate", "TFLOP/s"): ceilings.product.scaled(1e-12)}, where, **product),
    ]


def measured(rows: Iterable[Row], dtype: str) -> list[Ceilings]:
    """Return the ceilings of every device in measured rows: its best medians.

    A device that lacks the bandwidth of a copy or the rate of a product in `dtype` is left out.
    """
    best: dict[str, dict[str, Row]] = {}
    for row in rows:
        wanted = row.metric == "bandwidth" or (row.metric == "rate" and row.dtype == dtype)
        if row.command == "ceilings" and wanted:
            found = best.setdefault(row.provenance.device, {})
            known = found.get(row.metric)
            if known is None or in_base_unit(row).p50 > in_base_unit(known).p50:
                found[row.metric] = row
    return [
        Ceilings(
            device,
            in_base_unit(found["rate"]),
            in_base_unit(found["bandwidth"]),
            f"measured {found['rate'].provenance.date[:10]}: {found['rate'].operation} "
            f"{found['rate'].shape}, {found['bandwidth'].operation} {found['bandwidth'].shape}",
        )
        for device, found in best.items()
        if found.keys() == {"rate", "bandwidth"}
    ]


def in_base_unit(row: Row) -> Quantiles:
    """Return a row's quantiles in FLOP/s, bytes per second or seconds.

    Raises:
        UsageError: its unit is none of `UNITS`.
    """
    if row.unit not in UNITS:
        raise UsageError(
            f"unit of {row.operation} {row.metric}: got {row.unit!r}, expected one of "
            f"{', '.join(UNITS)}; check the results file"
        )
    return Quantiles(row.p20, row.p50, row.p80, row.samples).scaled(UNITS[row.unit])
