"""One step of training or evaluation: every way to compute it, interleaved in one run.

Usage: tcpa-bench step [--device cpu] [--mode train] [--precision float32] [--provider TEXT ...]

Milliseconds a step are medians with their 20th and 80th percentile; images/s follow from them. MFU
is the fraction of GEMM peak, measured in the same run with a large matrix product, at which the
method's model FLOPs are computed, HFU that of the FLOPs which a form really computes
(`costs/step.py`). Peak memory is that of a process that runs nothing else: resident set with
interpreter and weights on a CPU, what the allocator held on a GPU.

--ladder goes from the official algorithm to our fastest form, one change after the other.

Every provider lives in a process of its own; the rounds go through the providers in turn, so that a
noisy machine disturbs all of them alike. A provider whose loss and gradients differ from the plain
form of its method, computed by the reference, or that cannot be computed here, is skipped and
named. When one fails later or the run is interrupted, the figures of the rounds before are printed.

Exit status 1: a provider computes something else. 2: it cannot be measured.
"""

import sys
from collections.abc import Sequence

import torch

from tcpa import HTA_DATASETS

from ..cli import choose_device, command
from .costs import ceilings
from .costs.step import flops_of
from .harness.case import StepCase
from .harness.check import Skipped, WrongResultError
from .harness.options import add_results, parse, step_parser
from .harness.provider import StepProvider, choose
from .harness.results import Provenance, Results, Row, make_rows, provenance
from .harness.timing import Quantiles
from .harness.worker import StepResult, StoppedError, measure
from .providers.step import ladder, providers

DTYPES = {"float32": "fp32", "float64": "fp64", "autocast": "bf16", "bfloat16": "bf16"}
"""Precision of a provider -> dtype of its products."""

Utilisation = dict[str, tuple[Quantiles, Quantiles]]
"""MFU and HFU in percent, by provider."""


def utilisation_of(case: StepCase, results: Sequence[StepResult]) -> Utilisation:
    """Measure the rates of large matrix products and set every result against them.

    A backbone whose FLOPs are not known has none.
    """
    device, peaks, found = torch.device(case.device), dict[str, float](), Utilisation()
    for result in results:
        flops, dtype = flops_of(case, result.provider), DTYPES[result.provider.precision]
        if flops is None:
            continue
        if dtype not in peaks:
            peaks[dtype] = ceilings.measure(device, dtype, seconds=0.5).flops
        time = Quantiles.of(result.seconds)
        mfu, hfu = (time.rate(count).scaled(100 / peaks[dtype]) for count in flops)
        found[result.provider.name] = mfu, hfu
    return found


def rows_of(
    case: StepCase, results: Sequence[StepResult], used: Utilisation, where: Provenance
) -> list[Row]:
    """Return the rows of a measurement: times, rates, memory, ratios to the first provider.

    The operation names the precision that was asked for: the yardstick may have another one, and
    belongs to its own run.
    """
    rows = []
    first = results[0]
    base = Quantiles.of(first.seconds).p50
    for result in results:
        time = Quantiles.of(result.seconds)
        memory = result.peak_bytes / first.peak_bytes
        figures = {
            ("time", "ms"): time.scaled(1e3),
            ("rate", "images/s"): time.rate(case.batch),
            ("peak memory", "MiB"): Quantiles.of([result.peak_bytes / 2**20]),
            ("speed against the first", "x"): time.rate(base),
            ("memory against the first", "x"): Quantiles.of([memory]),
            ("error", "relative"): Quantiles.of([result.error]),
        }
        if result.provider.name in used:
            figures["MFU", "%"], figures["HFU", "%"] = used[result.provider.name]
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


def table(
    case: StepCase, results: Sequence[StepResult], used: Utilisation, where: Provenance
) -> str:
    """Return the table that is printed."""
    width = max(len(result.provider.name) for result in results) + 2
    lines = [
        f"One {case.mode} step, {case.model}, {case.dataset} settings, batch {case.batch}",
        f"{where.device}, torch {where.torch}, {len(results[0].seconds)} rounds, medians (p20-p80)",
        f"{'provider':<{width}}{'precision':<10}{'ms':>22}{'speed':>8}"
        f"{'images/s':>10}{'MFU %':>7}{'HFU %':>7}{'peak MiB':>10}{'memory':>8}{'error':>9}",
    ]
    base = results[0]
    for result in results:
        name, time = result.provider.name, Quantiles.of(result.seconds).scaled(1e3)
        spread = f" ({time.p20:.0f}-{time.p80:.0f})" if time.samples > 1 else ""
        speed = Quantiles.of(base.seconds).p50 * 1e3 / time.p50
        mfu, hfu = (f"{one.p50:.0f}" for one in used[name]) if name in used else ("", "")
        lines.append(
            f"{name:<{width}}{result.provider.precision:<10}{f'{time.p50:.0f}{spread}':>22}"
            f"{speed:>7.2f}x{1e3 * case.batch / time.p50:>10.1f}{mfu:>7}{hfu:>7}"
            f"{result.peak_bytes / 2**20:>10.0f}"
            f"{result.peak_bytes / base.peak_bytes:>7.2f}x{result.error:>9.0e}"
        )
    kinds = next((list(result.kinds) for result in results if result.kinds), [])
    if kinds:
        lines += ["", "ms by kind of kernel, one step under the profiler"]
        lines.append(f"{'provider':<{width}}" + "".join(f"{kind:>18}" for kind in kinds))
        for result in results:
            times = "".join(f"{1e3 * result.kinds[kind]:>18.1f}" for kind in kinds)
            lines.append(f"{result.provider.name:<{width}}{times}")
    return "\n".join(lines)


def choose_steps(available: Sequence[StepProvider], texts: Sequence[str]) -> list[StepProvider]:
    """Return the yardstick, which is the first, and the providers that are named, or all."""
    wanted = choose(texts, (provider.name for provider in available))
    first, *rest = available
    return [first, *(p for p in rest if not texts or p.name in wanted)]


@command("tcpa-bench step")
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = step_parser("step", __doc__)
    parser.add_argument("--dataset", default=StepCase().dataset, choices=HTA_DATASETS)
    parser.add_argument("--mode", default="train", choices=("train", "eval"))
    precisions = ("float32", "bfloat16", "float64")
    parser.add_argument("--precision", default="float32", choices=precisions)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per provider")
    text = "only these, by name or a part of it"
    parser.add_argument("--provider", nargs="+", default=[], metavar="TEXT", help=text)
    text = "prompts on images, too, and on a CPU what is compiled"
    parser.add_argument("--all", action="store_true", help=text)
    parser.add_argument("--ladder", action="store_true", help="one change after the other")
    parser.add_argument("--kinds", action="store_true", help="also: kernel-time breakdown")
    add_results(parser)
    options = parse(parser, argv, batch=1, rounds=1, threads=0)
    device = choose_device(options.device)
    case = StepCase(
        model=options.model,
        dataset=options.dataset,
        batch=options.batch,
        mode=options.mode,
        device=str(device),
        threads=options.threads,
        precision=options.precision,
        table="ladder" if options.ladder else "step",
    )
    available = (ladder if options.ladder else providers)(options.precision, device.type)
    chosen = choose_steps(list(available), options.provider)
    if not options.all and not options.provider:
        chosen = [p for p in chosen if p.input_prompt is None]
        if device.type == "cpu":
            chosen = [p for p in chosen if not p.compiled and (options.ladder or not p.folded)]
    results = Results(options.results)
    if options.threads:
        torch.set_num_threads(options.threads)
    where, skipped = provenance(device), Skipped()
    stopped = None
    try:
        found = measure(case, chosen, options.rounds, kinds=options.kinds, skipped=skipped)
    except WrongResultError as error:
        print(f"tcpa-bench step: {error}", file=sys.stderr)
        return 1
    except StoppedError as error:
        stopped, found = error, error.results
    used = utilisation_of(case, found)
    try:
        print(table(case, found, used, where), flush=True)
    finally:
        results.add(rows_of(case, found, used, where))
    status = skipped.report("tcpa-bench step")
    if stopped is not None:
        raise (stopped.__cause__ or stopped) from None
    return status


if __name__ == "__main__":
    sys.exit(main())
