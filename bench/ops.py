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
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import UsageError, choose_device, command, require
from .harness.case import Shape, parse_shape, small_shapes, standard_shapes
from .harness.results import Results, provenance
from .ops_cases import MODES, OPERATIONS, Operation
from .ops_race import Race


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
