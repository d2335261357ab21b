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
import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config

from ..cli import UsageError, choose_device, command, require
from .costs import ceilings
from .harness import timing
from .harness.case import Shape, parse_shape, small_shapes, standard_shapes
from .harness.check import WrongResultError
from .harness.provider import Prepared, Provider, choose
from .harness.results import Results, Row, make_rows, provenance
from .ops_table import OperationCase, best_composition, metrics_of, table
from .providers.operations import OPERATIONS, Operation

MODES = ("forward", "backward", "both")


class Race:
    """Measures cases, keeps rows and prints tables."""

    def __init__(
        self,
        device: torch.device,
        results: Results,
        *,
        seconds: float = 0.5,
        again: bool = False,
        wanted: set[str] | None = None,
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
                self._run(operation, shape, dtype, modes)
        except (RuntimeError, MemoryError) as error:
            print(f"\n{operation.name}, {shape.name}, {dtype}: cannot run: {reason_of(error)}")
        finally:
            # Graphs, compiled code, cached memory.
            torch.compiler.reset()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _run(self, operation: Operation, shape: Shape, dtype: str, modes: Iterable[str]) -> None:
        inputs = None
        verdicts: dict[tuple[str, bool], Prepared | str] = {}
        for case in (OperationCase(operation.name, shape, dtype, mode) for mode in modes):
            able, notes = [], {}
            for provider in self.asked(operation):
                reason = provider.unavailable(shape, dtype, self.device, case.mode)
                if reason is None:
                    able.append(provider)
                else:
                    notes[provider.label] = f"not available: {reason}"
            times = {row.provider for row in self._known(case) if row.metric == "time"}
            new = [provider for provider in able if self.again or provider.label not in times]
            if new:
                if inputs is None:
                    inputs = operation.make_inputs(shape, dtype, self.device)
                # Those that are known run again beside the new ones: ratios are of one run.
                runners: dict[Provider, Prepared] = {}
                for group in (new, [provider for provider in able if provider not in new]):
                    if group is new or runners:
                        found, failed = self._verify(case, group, inputs, verdicts)
                        runners |= found
                        notes |= failed
                inputs.clear_cache()
                notes |= self._measure(case, runners)
            # What failed now gets no figure, whatever it had before.
            shown = [p for p in self.asked(operation) if p.label not in notes]
            print(table(case, shown, self._known(case), notes, new=bool(new)), flush=True)

    def _verify(
        self,
        case: OperationCase,
        providers: Sequence[Provider],
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

    def _measure(self, case: OperationCase, runners: dict[Provider, Prepared]) -> dict[str, str]:
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
        reached = self._reached(case.dtype)
        times = timing.interleave(calls, self.device, seconds=self.seconds)
        fastest = best_composition(runners, times)
        for provider in runners:
            if provider.label in times:
                metrics = metrics_of(case, provider, times, peaks, reached, fastest)
                fields = case.fields | {"provider": provider.label}
                self.results.add(make_rows(metrics, provenance(self.device), **fields))
        return notes

    def _reached(self, dtype: str) -> ceilings.Ceilings:
        """Return the ceilings of this device, measured once a run."""
        if dtype not in self._ceilings:
            found = ceilings.measure(self.device, dtype, seconds=self.seconds)
            self._ceilings[dtype] = found
            where = provenance(self.device)
            self.results.add(ceilings.rows_of(found, self.device, dtype, where))
            print(
                f"\nCeilings of this run, {dtype}: copy {found.bandwidth / 1e9:.4g} GB/s, "
                f"matrix product {found.flops / 1e12:.4g} TFLOP/s"
            )
        return self._ceilings[dtype]

    def _known(self, case: OperationCase) -> list[Row]:
        """Return rows of a case that were measured under the conditions of this run.

        A changed checkout counts as the same as long as it stays changed.
        """
        same = ("device", "driver", "torch", "triton", "commit", "dirty")
        here = provenance(self.device)
        return [
            row
            for row in self.results.measured(**case.fields)
            if all(getattr(row.provenance, name) == getattr(here, name) for name in same)
        ]


def call_of(prepared: Prepared, mode: str) -> Callable[[], object]:
    """Return what is timed."""
    if mode == "both":
        return prepared.forward_and_backward
    if mode == "forward":
        return torch.no_grad()(prepared.forward)
    outputs = prepared.forward()
    return lambda: prepared.gradients(outputs, retain=True)


def reason_of(error: BaseException) -> str:
    """Say in one line why something did not run."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out of memory"
    # torch.compile wraps its causes; the first line names them.
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    if "can't allocate memory" in line:
        return "out of memory"
    return f"{type(error).__name__}: {line.strip()[:160]}"


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
    labels = [provider.label for operation in operations for provider in operation.providers]
    wanted = choose(options.provider, labels) if options.provider else None
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
