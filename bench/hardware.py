"""Ceilings of a device: matrix products and memory, from a datasheet, given, or measured."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..cli import UsageError
from .harness.results import Row


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The fastest that a device can compute and move data."""

    device: str
    flops: float
    """FLOP/s of dense matrix products in the step's dtype."""
    bandwidth: float
    """Bytes per second of device memory, reads and writes together."""
    source: str
    """Where both come from, for the reader."""


@dataclass(frozen=True, slots=True)
class Datasheet:
    """Public peak rates of a GPU, without sparsity."""

    half: float
    """FLOP/s in bfloat16 or float16 with float32 accumulation."""
    single: float
    """FLOP/s in float32, without TF32."""
    bandwidth: float
    """Bytes per second of device memory."""
    source: str


DATASHEETS = {
    "h100": Datasheet(989.4e12, 66.9e12, 3.35e12, "NVIDIA H100 SXM data sheet"),
    "h200": Datasheet(989.4e12, 66.9e12, 4.8e12, "NVIDIA H200 SXM data sheet"),
    "a100": Datasheet(312e12, 19.5e12, 2.039e12, "NVIDIA A100 SXM 80 GB data sheet"),
    "4090": Datasheet(165.2e12, 82.6e12, 1.008e12, "NVIDIA Ada architecture whitepaper, RTX 4090"),
    "mi300x": Datasheet(1307.4e12, 163.4e12, 5.3e12, "AMD Instinct MI300X data sheet"),
}


def assumed(name: str, dtype: str, *, flops_share: float, bandwidth_share: float) -> Ceilings:
    """Return the part of a GPU's peak rates that is assumed to be attainable.

    Raises:
        UsageError: the GPU is not known.
    """
    if name not in DATASHEETS:
        raise UsageError(
            f"--gpu: got {name!r}, expected one of {', '.join(DATASHEETS)}; choose one, or give "
            "the ceilings with --tflops and --tbytes"
        )
    sheet = DATASHEETS[name]
    peak = sheet.single if dtype == "fp32" else sheet.half
    source = (
        f"ASSUMED: {flops_share:.0%} of {peak / 1e12:.1f} TFLOP/s and {bandwidth_share:.0%} of "
        f"{sheet.bandwidth / 1e12:.2f} TB/s ({sheet.source})"
    )
    return Ceilings(name, flops_share * peak, bandwidth_share * sheet.bandwidth, source)


def measured(rows: Iterable[Row], dtype: str) -> list[Ceilings]:
    """Return the ceilings of every device in measured rows: its best medians.

    They come from rows with the metric "bandwidth" (of a copy) and, in `dtype`, "rate" (of a matrix
    product) of the command "ceilings". A device that lacks one of the two is left out.
    """
    best: dict[str, dict[str, Row]] = {}
    for row in rows:
        wanted = row.metric == "bandwidth" or (row.metric == "rate" and row.dtype == dtype)
        if row.command == "ceilings" and wanted:
            found = best.setdefault(row.provenance.device, {})
            if row.metric not in found or in_base_unit(row) > in_base_unit(found[row.metric]):
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


_UNIT = re.compile(r"(k|M|G|T|P|m|u|n|Ki|Mi|Gi)?(FLOP/s|B/s|B|s)")
_FACTOR = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_FACTOR |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}


def in_base_unit(row: Row) -> float:
    """Return a row's median in FLOP/s, bytes per second, bytes or seconds.

    Raises:
        UsageError: its unit is none of these.
    """
    found = _UNIT.fullmatch(row.unit)
    if not found:
        raise UsageError(
            f"unit of {row.operation} {row.metric}: got {row.unit!r}, expected TFLOP/s, GB/s, MiB, "
            "ms or the like; check the results file"
        )
    return row.p50 * (_FACTOR[found[1]] if found[1] else 1.0)
