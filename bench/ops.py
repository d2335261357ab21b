"""The race: this library's operations against the official algorithm and exact compositions.

Usage: tcpa-bench ops [--operation NAME ...] [--shape NAME ...] [--dtype NAME ...] [--mode NAME ...]
       [--provider TEXT ...] [--seconds S] [--results FILE [--again]] [--device NAME] [--list]

All providers of a case run in one process, in turn, and only after their values and gradients were
held against the float64 reference; a wrong one gets no figure. Modes:

- forward: outputs alone, under torch.no_grad().
- backward: gradients alone, again and again over one retained graph.
- both: what a training step does, a forward that records its graph, then all gradients. It is not
  the sum of the two: a forward that records may have more to do.

Units: microseconds (median, 20th and 80th percentile), TFLOP/s and GB/s of the operation's own work
(costs/), share of the time that the ceilings of the same run allow, MiB of memory above the call's
inputs, and how many times as fast as the official algorithm and as the fastest composition, by the
medians of the ratios of the same round.

Exit status 1: a provider computes something else. 2: nothing could be measured as asked.
"""

import argparse
import dataclasses
import functools
import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config

from ..cli import UsageError, choose_device, command, require
from . import ceilings, timing
from .costs import operations as cost
from .providers.attention import PROVIDERS
from .providers.attention_case import AttentionCase
from .providers.base import DTYPES, Prepared, Provider, WrongResultError
from .providers.matching import MATCH_PROVIDERS, NORM_PROVIDERS, MatchCase
from .results import Results, Row, make_rows, provenance
from .shapes import Shape, parse_shape, small_shapes, standard_shapes
from .timing import Quantiles

MODES = ("forward", "backward", "both")
TIME, SPEED = ("time", "us"), ("speed", "x official")
COMPOSITION = ("speed", "x best composition")
"""Metric and unit."""


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of the library and who computes it."""

    name: str
    make_case: Callable[[Shape, str, torch.device], Any]
    providers: tuple[Provider, ...]

    def refuses(self, shape: Shape) -> str | None:
        """Say why it is not measured on a shape; None when it is."""
        if self.name == "gated_attention":
            return None
        if not shape.prompts:
            return "there are no prompts to match"
        shared = dataclasses.replace(shape, per_sample=False).name
        return f"matching is that of {shared}" if shape.per_sample else None


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("gated_attention", AttentionCase, PROVIDERS),
        Operation("match_prompts", functools.partial(MatchCase, False), MATCH_PROVIDERS),
        Operation("norm_match", functools.partial(MatchCase, True), NORM_PROVIDERS),
    )
}


@dataclass(frozen=True, slots=True)
class Case:
    """One table of the race."""

    operation: Operation
    shape: Shape
    dtype: str
    mode: str

    @property
    def title(self) -> str:
        """Operation, shape, dtype and mode."""
        return f"{self.operation.name}, {self.shape.name}, {self.dtype}, {self.mode}"

    @property
    def fields(self) -> dict[str, str]:
        """What marks its rows."""
        return {
            "command": "ops",
            "operation": self.operation.name,
            "shape": self.shape.name,
            "dtype": self.dtype,
            "mode": self.mode,
        }


class Race:
    """Measures cases, keeps rows and prints tables."""

    def __init__(
        self,
        device: torch.device,
        results: Results,
        *,
        seconds: float = 0.5,
        again: bool = False,
        wanted: frozenset[str] | None = None,
    ) -> None:
        """Measure on `device`, `seconds` a table, the providers labelled `wanted`, or all."""
        self.device, self.results = device, results
        self.seconds, self.again, self.wanted = seconds, again, wanted
        self.wrong = 0
        """Providers that computed something else."""
        self._ceilings: dict[str, ceilings.Ceilings] = {}

    def asked(self, operation: Operation) -> list[Provider]:
        """Return the providers of an operation that were asked for."""
        return [p for p in operation.providers if self.wanted is None or p.label in self.wanted]

    def run(self, operation: Operation, shape: Shape, dtype: str, modes: Iterable[str]) -> None:
        """Measure one operation on one shape and print its tables."""
        refused = operation.refuses(shape)
        if refused:
            print(f"\n{operation.name}, {shape.name}: not measured, {refused}", flush=True)
            return
        try:
            # Kept graphs are used several times; their buffers are no gift to the backward.
            with functorch_config.patch(donated_buffer=False):
                self._run([Case(operation, shape, dtype, mode) for mode in modes])
        except (RuntimeError, MemoryError) as error:
            print(f"\n{operation.name}, {shape.name}, {dtype}: cannot run: {reason_of(error)}")
        finally:
            release(self.device)

    def _run(self, cases: list[Case]) -> None:
        inputs = None
        verdicts: dict[tuple[str, bool], Prepared | str] = {}
        for case in cases:
            able, notes = self._field(case)
            known = set() if self.again else {row.provider for row in self._known(case, "time")}
            new = [provider for provider in able if provider.label not in known]
            if new:
                if inputs is None:
                    inputs = case.operation.make_case(case.shape, case.dtype, self.device)
                # Those that are known run again beside the new ones: ratios are of one run.
                runners, failed = self._verify(case, new, inputs, verdicts)
                notes |= failed
                if runners:
                    others = [provider for provider in able if provider not in new]
                    more, failed = self._verify(case, others, inputs, verdicts)
                    notes |= failed
                    inputs.forget()
                    notes |= self._measure(case, {**runners, **more})
            print(self._table(case, notes, new=bool(new)), flush=True)

    def _field(self, case: Case) -> tuple[list[Provider], dict[str, str]]:
        """Return the providers that can run, and why others cannot."""
        able, notes = [], {}
        for provider in self.asked(case.operation):
            reason = provider.unavailable(case.shape, case.dtype, self.device, case.mode)
            if reason is None:
                able.append(provider)
            else:
                notes[provider.label] = f"not available: {reason}"
        return able, notes

    def _verify(
        self,
        case: Case,
        providers: list[Provider],
        inputs: Any,
        verdicts: dict[tuple[str, bool], Prepared | str],
    ) -> tuple[dict[Provider, Prepared], dict[str, str]]:
        """Return the calls of correct providers, and what is wrong with the others.

        A call is held against the reference in the form in which it is timed, once for the modes
        with gradients.
        """
        runners, notes, training = {}, {}, case.mode != "forward"
        for provider in providers:
            key = provider.label, training
            if key not in verdicts:
                verdicts[key] = self._verdict(provider, inputs, training)
            verdict = verdicts[key]
            if isinstance(verdict, str):
                notes[provider.label] = verdict
            else:
                runners[provider] = verdict
        return runners, notes

    def _verdict(self, provider: Provider, inputs: Any, training: bool) -> Prepared | str:
        try:
            prepared = provider.prepare(inputs, training)
            inputs.check(provider, prepared.results(training), training)
        except WrongResultError as error:
            self.wrong += 1
            return f"WRONG, no figure: {error}"
        except Exception as error:
            # Whatever keeps it from running, memory included, is what the table has to say.
            return f"cannot run: {reason_of(error)}"
        return prepared

    def _measure(self, case: Case, runners: dict[Provider, Prepared]) -> dict[str, str]:
        """Time calls in turn and keep their rows; return what went wrong."""
        calls, peaks, notes = {}, {}, {}
        for provider, prepared in runners.items():
            try:
                call = call_of(prepared, case.mode)
                call()
                peaks[provider.label] = timing.peak_memory(call, self.device)
                calls[provider.label] = call
            except (RuntimeError, MemoryError) as error:
                notes[provider.label] = f"cannot run: {reason_of(error)}"
        if not calls:
            return notes
        rates = self._rates(case.dtype)
        times = timing.interleave(calls, self.device, seconds=self.seconds)
        fastest = best_composition(runners, times)
        for provider in runners:
            if provider.label in times:
                metrics = self._metrics(case, provider, times, peaks, rates, fastest)
                fields = case.fields | {"provider": provider.label}
                self.results.add(make_rows(metrics, provenance(self.device), **fields))
        return notes

    def _metrics(
        self,
        case: Case,
        provider: Provider,
        times: dict[str, list[float]],
        peaks: dict[str, float | None],
        rates: tuple[float, float],
        fastest: str | None,
    ) -> dict[tuple[str, str], Quantiles]:
        """Return all metrics of one provider by name and unit, the time last.

        A run that ends between two rows leaves no time, and measures the provider again.
        """
        label = provider.label
        seconds = Quantiles.of(times[label])
        found: dict[tuple[str, str], Quantiles] = {}
        # A floor does less than the operation's work: its rate would be another one.
        if provider.same_function:
            work = cost.OPERATIONS[case.operation.name](case.shape, case.dtype, case.mode)
            found["rate", "TFLOP/s"] = seconds.rate(work.flops / 1e12)
            found["bandwidth", "GB/s"] = seconds.rate(work.bytes / 1e9)
            found["share of ceiling", "%"] = seconds.rate(100 * work.seconds(*rates))
        peak = peaks[label]
        if peak is not None:
            found["peak memory", "MiB"] = Quantiles.of([peak / 2**20])
        if "official" in times:
            found[SPEED] = timing.ratio(times, label, "official")
        if fastest is not None:
            found[COMPOSITION] = timing.ratio(times, label, fastest)
        found[TIME] = seconds.scaled(1e6)
        return found

    def _rates(self, dtype: str) -> tuple[float, float]:
        """Return FLOPs and bytes a second that this device reaches, measured once a run."""
        if dtype not in self._ceilings:
            found = ceilings.measure(self.device, DTYPES[dtype], seconds=self.seconds)
            self._ceilings[dtype] = found
            size = ceilings.PRODUCT_SIZE[self.device.type]
            mib = ceilings.COPY_BYTES[self.device.type] // 2**20
            common = {"command": "ceilings", "dtype": dtype, "mode": "forward", "provider": "torch"}
            copy = common | {"operation": "copy", "shape": f"{mib}MiB"}
            product = common | {"operation": "matrix product", "shape": f"{size}x{size}x{size}"}
            where = provenance(self.device)
            bandwidth = {("bandwidth", "GB/s"): found.copy.scaled(1e-9)}
            rate = {("rate", "TFLOP/s"): found.product.scaled(1e-12)}
            rows = [*make_rows(bandwidth, where, **copy), *make_rows(rate, where, **product)]
            self.results.add(rows)
            print(
                f"\nCeilings of this run, {dtype}: copy {found.copy.p50 / 1e9:.4g} GB/s, "
                f"matrix product {found.product.p50 / 1e12:.4g} TFLOP/s"
            )
        return self._ceilings[dtype].rates

    def _known(self, case: Case, metric: str | None = None) -> list[Row]:
        """Return rows of a case that were measured under the conditions of this run.

        A changed checkout counts as the same as long as it stays changed.
        """
        same = ("device", "driver", "torch", "triton", "commit", "dirty")
        here = provenance(self.device)
        fields = case.fields | ({"metric": metric} if metric else {})
        return [
            row
            for row in self.results.measured(**fields)
            if all(getattr(row.provenance, name) == getattr(here, name) for name in same)
        ]

    def _table(self, case: Case, notes: dict[str, str], *, new: bool) -> str:
        """Lay out a case: of every provider its fastest back end, and who is missing and why."""
        # What failed now gets no figure, whatever it had before.
        shown = [p for p in self.asked(case.operation) if p.label not in notes]
        rows: dict[str, dict[tuple[str, str], Row]] = {}
        for row in self._known(case):
            rows.setdefault(row.provider, {})[row.metric, row.unit] = row
        cells, floors = [], False
        for name in dict.fromkeys(provider.name for provider in shown):
            tried = [p for p in shown if p.name == name and TIME in rows.get(p.label, {})]
            if tried:
                best = min(tried, key=lambda p: rows[p.label][TIME].p50)
                cells.append(_cells(best, rows[best.label], len(tried)))
                floors |= not best.same_function
        lines = [case.title + ("" if new else " (measured before)")]
        lines += _columns([HEADER, *cells]) if cells else []
        lines += ["* less work than the operation's: a floor, no competitor"] if floors else []
        for note in dict.fromkeys(notes.values()):
            labels = [label for label, found in notes.items() if found == note]
            lines.append(f"{note}: {'; '.join(labels)}")
        return "\n" + "\n  ".join(lines)


COLUMNS = {
    ("rate", "TFLOP/s"): "TFLOP/s",
    ("bandwidth", "GB/s"): "GB/s",
    ("share of ceiling", "%"): "% of ceiling",
    ("peak memory", "MiB"): "peak MiB",
    SPEED: "x official",
    COMPOSITION: "x best composition",
}
"""Metric and unit -> title; the time comes before them."""
HEADER = ["provider", "us (p20-p80)", *COLUMNS.values()]


def _cells(provider: Provider, found: dict[tuple[str, str], Row], tried: int) -> list[str]:
    """Return the line of one provider, the fastest of those tried."""
    name = provider.label + ("" if provider.same_function else " *")
    time = found[TIME]
    spread = f"{_short(time.p50)} ({_short(time.p20)}-{_short(time.p80)})"
    values = [_short(found[column].p50) if column in found else "-" for column in COLUMNS]
    return [f"{name}, best of {tried}" if tried > 1 else name, spread, *values]


def _columns(lines: list[list[str]]) -> list[str]:
    """Align cells: the first to the left, the others to the right."""
    name, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return [
        f"{first:<{name}}" + "".join(f"  {c:>{w}}" for c, w in zip(others, widths, strict=True))
        for first, *others in lines
    ]


def _short(value: float) -> str:
    """Return three significant digits, without an exponent where they can be read."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def call_of(prepared: Prepared, mode: str) -> Callable[[], object]:
    """Return what is timed."""
    if mode == "both":
        return prepared.forward_and_backward
    if mode == "forward":
        return torch.no_grad()(prepared.forward)
    outputs = prepared.forward()
    return lambda: prepared.gradients(outputs, retain=True)


def best_composition(providers: Iterable[Provider], times: dict[str, list[float]]) -> str | None:
    """Return the label of the fastest composition, if one was timed."""
    labels = [p.label for p in providers if p.role == "composition" and p.label in times]
    return min(labels, key=lambda label: Quantiles.of(times[label]).p50, default=None)


def choose_providers(texts: Sequence[str], operations: Sequence[Operation]) -> frozenset[str]:
    """Return the labels that were asked for: by name or label, else by a part of it.

    Raises:
        UsageError: a text fits no provider.
    """
    known = [provider for operation in operations for provider in operation.providers]
    chosen: set[str] = set()
    for text in texts:
        exact = {p.label for p in known if text.lower() in (p.name.lower(), p.label.lower())}
        found = exact or {p.label for p in known if text.lower() in p.label.lower()}
        require(bool(found), "--provider", repr(text), "part of a provider's name", "see --list")
        chosen |= found
    return frozenset(chosen)


def reason_of(error: BaseException) -> str:
    """Say in one line why something did not run."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out of memory"
    # torch.compile wraps its causes; the first line names them.
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    if "can't allocate memory" in line:
        return "out of memory"
    return f"{type(error).__name__}: {line.strip()[:160]}"


def release(device: torch.device) -> None:
    """Free what a case held: graphs, compiled code, cached memory."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def listing(operations: Sequence[Operation], shapes: Sequence[Shape], race: Race) -> str:
    """Return what would be measured and who would take part, with reasons for those who cannot."""
    lines = ["shapes: " + " ".join(shape.name for shape in shapes)]
    shape = next((shape for shape in shapes if shape.prompts), shapes[0])
    for operation in operations:
        lines += ["", f"{operation.name}:"]
        for provider in race.asked(operation):
            dtype = provider.dtypes[0]
            reasons = {m: provider.unavailable(shape, dtype, race.device, m) for m in MODES}
            able = [", ".join(mode for mode, reason in reasons.items() if reason is None)]
            notes = [note for note in dict.fromkeys([*able, *reasons.values()]) if note]
            lines.append(f"  {provider.label:<64}{'; '.join(notes)}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="tcpa-bench ops", description=summary)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    parser.add_argument("--operation", nargs="+", default=list(OPERATIONS), choices=OPERATIONS)
    parser.add_argument("--shape", nargs="+", help="names such as b16-224-p36-b128")
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--provider", nargs="+", help="names, or parts of them; default: all")
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time of a table")
    parser.add_argument("--results", type=Path, help="append rows to this file, and resume from it")
    parser.add_argument("--again", action="store_true", help="measure what --results has already")
    parser.add_argument("--list", action="store_true", help="show providers and shapes, and end")
    return parser.parse_args(argv)


@command("tcpa-bench ops")
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = parse(argv)
    device = choose_device(options.device)
    gpu = device.type == "cuda"
    # NaN is not above 0 either; an hour is more than anyone means.
    fits = 0 < options.seconds <= 3600
    require(fits, "--seconds", options.seconds, "a number above 0, at most 3600", "correct it")
    operations = [OPERATIONS[name] for name in options.operation]
    wanted = choose_providers(options.provider, operations) if options.provider else None
    shapes = standard_shapes() if gpu else small_shapes()
    if options.shape:
        shapes = [parse_shape(text) for text in options.shape]
    results = Results(None if options.list else options.results)
    race = Race(device, results, seconds=options.seconds, again=options.again, wanted=wanted)
    if options.list:
        print(listing(operations, shapes, race))
        return 0
    where = provenance(device)
    print(f"{where.device}, torch {where.torch}, triton {where.triton or '-'}, {where.date}")
    for dtype in options.dtype or ["bf16" if gpu else "fp32"]:
        for shape in shapes:
            for operation in operations:
                race.run(operation, shape, dtype, options.mode)
    if not results.rows:
        raise UsageError("nothing was measured; the lines above say why")
    if race.wrong:
        print(f"tcpa-bench ops: {race.wrong} wrong results, see above", file=sys.stderr)
    return 1 if race.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
