"""The race of `tcpa-bench ops`: providers are checked, timed in turn, and their rows kept."""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._functorch import config as functorch_config

from .costs import ceilings
from .harness import timing
from .harness.case import Shape
from .harness.provider import DTYPES, Prepared, Provider, WrongResultError
from .harness.results import Results, Row, make_rows, provenance
from .harness.timing import Quantiles
from .ops_cases import Case, Operation, metrics_of, table


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
                metrics = metrics_of(case, provider, times, peaks, rates, fastest)
                fields = case.fields | {"provider": provider.label}
                self.results.add(make_rows(metrics, provenance(self.device), **fields))
        return notes

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
        # What failed now gets no figure, whatever it had before.
        shown = [p for p in self.asked(case.operation) if p.label not in notes]
        return table(case, shown, self._known(case), notes, new=new)


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
