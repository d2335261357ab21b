"""What `tcpa-bench step` measured of a provider, as rows and as printed tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .harness.results import Provenance, Row, make_rows
from .harness.timing import Quantiles
from .providers.step import StepCase, StepProvider
from .step_costs import StepCost


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What was measured for one provider."""

    provider: StepProvider
    seconds: list[float]
    peak_bytes: float
    error: float
    trained: int
    kinds: dict[str, float] = field(default_factory=dict)
    """Seconds by kind of kernel, of one profiled step."""
    cost: StepCost | None = None
    """None for a backbone that the cost model does not know."""
    product_rate: float = math.nan
    """FLOP/s of a large matrix product in the provider's precision."""
    predicted: float | None = None
    """Speed against the first provider, by the cost model and what else was expected."""

    def utilisation(self, flops: float) -> Quantiles:
        """Return the percentage of `product_rate` at which a step computes so many FLOPs."""
        return Quantiles.of(self.seconds).rate(flops).scaled(100 / self.product_rate)


def rows_of(case: StepCase, results: Sequence[StepResult], where: Provenance) -> list[Row]:
    """Return the rows of a measurement: times, rates, memory, ratios to the first provider.

    The operation names the precision that was asked for: the yardstick may have another one, and
    belongs to its own run.
    """
    rows = []
    base = Quantiles.of(results[0].seconds).p50
    for result in results:
        time = Quantiles.of(result.seconds)
        figures = {
            ("time", "ms"): time.scaled(1e3),
            ("rate", "images/s"): time.rate(case.batch),
            ("peak memory", "MiB"): Quantiles.of([result.peak_bytes / 2**20]),
            ("speed against the first", "x"): time.rate(base),
            ("memory against the first", "x"): Quantiles.of(
                [result.peak_bytes / results[0].peak_bytes]
            ),
            ("error", "relative"): Quantiles.of([result.error]),
        }
        if result.cost is not None:
            figures["MFU", "%"] = result.utilisation(result.cost.model_flops)
            figures["HFU", "%"] = result.utilisation(result.cost.hardware_flops)
        if result.predicted is not None:
            predicted = Quantiles.of([result.predicted])
            figures["predicted speed against the first", "x"] = predicted
        for kind, seconds in result.kinds.items():
            figures[f"time of {kind}", "ms"] = Quantiles.of([seconds * 1e3])
        rows += make_rows(
            figures,
            where,
            command="step",
            operation=f"{case.table} in {case.precision}",
            shape=f"{case.model}-{case.dataset}-b{case.batch}",
            dtype=result.provider.precision,
            mode=case.mode,
            provider=result.provider.name,
        )
    return rows


def table(case: StepCase, results: Sequence[StepResult], where: Provenance) -> str:
    """Return the table that is printed."""
    width = max(len(result.provider.name) for result in results) + 2
    lines = [
        f"One {case.mode} step, {case.model}, {case.dataset} settings, batch {case.batch}",
        f"{where.device}, torch {where.torch}, {len(results[0].seconds)} rounds, medians (p20-p80)",
        f"{'provider':<{width}}{'precision':<10}{'ms':>22}{'speed':>8}{'predicted':>10}"
        f"{'images/s':>10}{'MFU %':>7}{'HFU %':>7}{'peak MiB':>10}{'memory':>8}{'error':>9}",
    ]
    base = results[0]
    for result in results:
        time = Quantiles.of(result.seconds).scaled(1e3)
        predicted = "" if result.predicted is None else f"{result.predicted:.2f}x"
        speed = Quantiles.of(base.seconds).p50 * 1e3 / time.p50
        used = ["", ""]
        if result.cost is not None:
            flops = result.cost.model_flops, result.cost.hardware_flops
            used = [f"{result.utilisation(one).p50:.0f}" for one in flops]
        lines.append(
            f"{result.provider.name:<{width}}{result.provider.precision:<10}"
            f"{_spread(time, len(result.seconds)):>22}{speed:>7.2f}x{predicted:>10}"
            f"{1e3 * case.batch / time.p50:>10.1f}{used[0]:>7}{used[1]:>7}"
            f"{result.peak_bytes / 2**20:>10.0f}"
            f"{result.peak_bytes / base.peak_bytes:>7.2f}x{result.error:>9.0e}"
        )
    lines.append("predicted: by FLOPs and bytes, times what else was expected before measuring")
    return "\n".join(lines + kinds_table(results))


def _spread(time: Quantiles, samples: int) -> str:
    """Return the median and, where there is more than one sample, what 60 % of them lie between."""
    return f"{time.p50:.0f}" + (f" ({time.p20:.0f}-{time.p80:.0f})" if samples > 1 else "")


def kinds_table(results: Sequence[StepResult]) -> list[str]:
    """Return the lines of the table of times by kind; none without a profile."""
    kinds = next((list(result.kinds) for result in results if result.kinds), [])
    if not kinds:
        return []
    width = max(len(result.provider.name) for result in results) + 2
    lines = ["", "ms by kind of kernel, one step under the profiler"]
    lines.append(f"{'provider':<{width}}" + "".join(f"{kind:>18}" for kind in kinds))
    for result in results:
        times = "".join(f"{1e3 * result.kinds[kind]:>18.1f}" for kind in kinds)
        lines.append(f"{result.provider.name:<{width}}{times}")
    return lines
