"""What the kernels and the step are to reach on an H200, beside what was measured there.

Targets were set before anything ran on a GPU, from a roofline (FLOPs and bytes of every operation
at 790 TFLOP/s and 4.3 TB/s, which are guesses at what an H200 attains) and from published rates of
other kernels. `must`: below it something is wrong. `target`: what the project promises. `stretch`:
what the best published kernels suggest. `limit`: what the hardware allows.

The targets against VPT-deep were set for prompts that are tokens of every block, as VPT computes
them. With prompts as keys, which gives the same logits, VPT-deep needs as many FLOPs as TCPA, and
the cost model predicts 1.00: that row is not expected to reach its target.

Shapes: ViT-B/16 at 224, 36 prompt rows shared by the batch, batch 128, bfloat16.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..train.report.tables import TextTable
from .harness.results import Row, number

DEVICE = "H200"
"""Part of the name of the device that the targets are for."""

SHAPE = "b16-224-p36-b128"
MODEL = "vit_base_patch16_224-cub-b128"
NOT_MEASURED = "not measured yet"
_STEP_FIELDS = {
    "command": "step",
    "operation": "step in bfloat16",
    "shape": MODEL,
    "mode": "train",
}


class Measured:
    """The rows of one device, asked for by what they measured."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = [row for row in rows if DEVICE in row.provenance.device]

    def best(self, metric: str, *providers: str, least: bool = True, **fields: str) -> float | None:
        """Return the least (or largest) median of a metric; None without rows.

        Args:
            metric: of the rows.
            providers: beginnings of providers' names; none for all.
            least: whether less is better.
            fields: fields of the rows and the beginnings of their values.
        """
        found = [
            row.p50
            for row in self._rows
            if row.metric == metric
            and (not providers or row.provider.startswith(providers))
            and all(getattr(row, name).startswith(value) for name, value in fields.items())
        ]
        return (min(found) if least else max(found)) if found else None

    def exact(self, metric: str, provider: str, **fields: Any) -> float | None:
        """Return the median of a metric of one provider by its full name; None without rows."""
        own = Measured(row for row in self._rows if row.provider == provider)
        return own.best(metric, **fields)


Value = Callable[[Measured], float | None]


@dataclass(frozen=True, slots=True)
class TargetFigure:
    """One figure to reach."""

    name: str
    unit: str
    must: float
    target: float
    stretch: float
    limit: float | None
    value: Value
    better: Literal["less", "more"] = "less"

    def verdict(self, measured: float) -> str:
        """Say which of the levels a figure reaches."""
        for level in ("stretch", "target", "must"):
            bound = getattr(self, level)
            if (measured <= bound) if self.better == "less" else (measured >= bound):
                return level
        return "missed"


def _ratio(above: Value, below: Value) -> Value:
    def value(measured: Measured) -> float | None:
        numerator, denominator = above(measured), below(measured)
        return numerator / denominator if numerator and denominator else None

    return value


def _operation(operation: str, mode: str, *providers: str) -> Value:
    """Return the time of the fastest of some providers of an operation, us."""
    fields: Any = {"operation": operation, "shape": SHAPE, "dtype": "bf16", "mode": mode}
    return lambda measured: measured.best("time", *providers, **fields)


def _attention(*providers: str) -> Value:
    return _operation("gated_attention", "both", *providers)


def _kernel(operation: str, mode: str, provider: str = "tcpa triton") -> Value:
    fields: Any = {"operation": operation, "shape": SHAPE, "dtype": "bf16", "mode": mode}
    return lambda measured: measured.exact("time", provider, **fields)


def _step(metric: str, provider: str) -> Value:
    """Return a metric of one form of the training step."""
    fields: Any = _STEP_FIELDS
    return lambda measured: measured.exact(metric, provider, **fields)


def _our_step(metric: str, *, least: bool = True) -> Value:
    """Return a metric of our best form of the training step."""
    fields: Any = _STEP_FIELDS
    return lambda measured: measured.best(metric, "tcpa", least=least, **fields)


def _gigabytes(measured: Measured) -> float | None:
    found = _our_step("peak memory")(measured)
    return None if found is None else found * 2**20 / 1e9


def _epoch(measured: Measured) -> float | None:
    fields: Any = {"command": "epoch", "mode": "train", "shape": MODEL}
    operations = ("epoch from cache", "epoch from device")
    found = [
        measured.best("seconds per epoch", "tcpa", operation=operation, **fields)
        for operation in operations
    ]
    return min((value for value in found if value is not None), default=None)


_OURS = _kernel("gated_attention", "both")
_STEP = _our_step("time")
_SAME_FORM = _step("time", "tcpa, bf16 weights")

TARGETS = (
    TargetFigure("gated attention, forward", "us", 95, 75, 58, 36,
           _kernel("gated_attention", "forward")),
    TargetFigure("gated attention, backward", "us", 280, 200, 150, 72,
           _kernel("gated_attention", "backward")),
    TargetFigure("gated attention, both, against the official algorithm", "x", 6, 9, 12, 23,
           _ratio(_kernel("gated_attention", "both", "official"), _OURS), "more"),
    TargetFigure("against the official algorithm, compiled", "x", 1.5, 1.9, 2.5, 4.9,
           _ratio(_kernel("gated_attention", "both", "official, compiled"), _OURS), "more"),
    TargetFigure("against FlexAttention in composition A or C", "x", 2, 2.8, 3.8, 7,
           _ratio(_attention("composition A, LSE merge [flex",
                             "composition C, duplicated keys [flex"), _OURS), "more"),
    TargetFigure("against composition D", "x", 1.5, 2, 2.6, 5,
           _ratio(_attention("composition D"), _OURS), "more"),
    TargetFigure("against SDPA without a gate, default back end", "x", 1.1, 1.5, 2, 3.9,
           _ratio(_kernel("gated_attention", "both", "sdpa, no gate [default]"), _OURS), "more"),
    TargetFigure("against the best SDPA without a gate", "x", 0.85, 1, 1.5, 3,
           _ratio(_attention("sdpa, no gate"), _OURS), "more"),
    TargetFigure("gate on against gate off", "x", 1.08, 1.03, 1, 1,
           _ratio(_OURS, _kernel("gated_attention", "both", "tcpa triton, no gate"))),
    TargetFigure("norm_match, forward", "us", 27, 21, 19.5, 18, _kernel("norm_match", "forward")),
    TargetFigure("norm_match, backward", "us", 55, 43, 40, 36, _kernel("norm_match", "backward")),
    TargetFigure("training step", "ms", 23, 19, 16.5, 12.8, _STEP),
    TargetFigure("MFU, of the matrix product measured", "%", 52, 63, 72, 86,
           _our_step("MFU", least=False), "more"),
    TargetFigure("step against the official algorithm", "x", 2.5, 3.4, 4, 4.7,
           _ratio(_step("time", "official, autocast"), _STEP), "more"),
    TargetFigure("against the official algorithm, frozen", "x", 2.3, 3.1, 3.6, None,
           _ratio(_step("time", "official, frozen"), _STEP), "more"),
    TargetFigure("against the official algorithm, frozen and compiled", "x", 1.15, 1.35, 1.55, 1.85,
           _ratio(_step("time", "official, frozen, compiled"), _STEP), "more"),
    TargetFigure("step of TCPA against VPT-deep, prompts as tokens", "x", 0.92, 0.88, 0.86, 0.846,
           _ratio(_SAME_FORM, _step("time", "VPT-deep, prompts as tokens"))),
    TargetFigure("step of TCPA against VPT-deep, prompts as keys", "x", 0.92, 0.88, 0.86, None,
           _ratio(_SAME_FORM, _step("time", "VPT-deep"))),
    TargetFigure("against the frozen ViT with a backward pass, same form", "x", 1.1, 1.04, 1.01, 1,
           _ratio(_SAME_FORM, _step("time", "frozen backbone, with backward"))),
    TargetFigure("peak memory of a step", "GB", 9, 6.5, 5, 4.85, _gigabytes),
    TargetFigure("training epoch of CUB, from cache or device", "s", 1.2, 0.95, 0.8, 0.65, _epoch),
)  # fmt: skip


def targets_table(rows: Sequence[Row]) -> TextTable:
    """Return all targets with what the rows of an H200 hold."""
    measured = Measured(rows)
    lines = []
    for target in TARGETS:
        found = target.value(measured)
        bounds = (target.must, target.target, target.stretch, target.limit)
        levels = ["" if bound is None else number(bound) for bound in bounds]
        sign = "<=" if target.better == "less" else ">="
        shown = (NOT_MEASURED, "") if found is None else (number(found), target.verdict(found))
        lines.append([target.name, target.unit, sign, *levels, *shown])
    header = ["figure", "unit", "", "must", "target", "stretch", "limit", "measured", "reached"]
    dates = sorted({row.provenance.date[:10] for row in rows if DEVICE in row.provenance.device})
    when = f"measured {dates[0]} to {dates[-1]}" if dates else "nothing has run on one yet"
    conditions = (
        f"NVIDIA {DEVICE}; ViT-B/16 at 224, 36 prompt rows, batch 128, bfloat16; {when}; limits "
        "are estimates from FLOPs and bytes."
    )
    return TextTable(
        title="Targets", header=header, rows=lines, text_columns=3, notes=(conditions,)
    )
