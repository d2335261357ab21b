"""One step of training or evaluation: every way to compute it, interleaved in one run.

Usage: tcpa-bench step [--device cpu] [--mode train] [--precision float32] [--provider TEXT ...]

Milliseconds a step are medians with their 20th and 80th percentile; images/s follow from them. MFU
is the share of the rate of a large matrix product, measured in the same run, at which the method's
model FLOPs are computed, HFU that of the FLOPs which a form really computes (`step_costs`). Peak
memory is that of a process that runs nothing else: resident set with interpreter and weights on a
CPU, what the allocator held on a GPU.

--ladder goes from the official algorithm to our fastest form, one change after the other; what each
was thought to bring stands beside what it brought.

Every provider lives in a process of its own; the rounds go through the providers in turn, so that a
noisy machine disturbs all of them alike. A provider whose loss and gradients differ from the plain
form of its method, computed by the reference, or that cannot be computed here, is left out and
named. When one fails later or the run is interrupted, the figures of the rounds before are printed.

Exit status 1: a provider computes something else. 2: it cannot be measured.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import timm
import torch

from tcpa import HTA_DATASETS

from ..cli import UsageError, choose_device, command
from .costs import ceilings
from .hardware import Ceilings
from .harness.check import Answer, LeftOut, Truths
from .harness.provider import WrongResultError
from .harness.results import Provenance, Results, provenance
from .harness.worker import Worker
from .providers.step import INPUT, StepCase, StepProvider, ladder, providers
from .step_costs import predicted_speed, step_cost
from .step_results import StepResult, rows_of, table


class StoppedError(Exception):
    """The measurement ended early, for its cause; `results` hold the rounds before."""

    def __init__(self, results: list[StepResult]) -> None:
        super().__init__(f"ended after {len(results[0].seconds)} rounds")
        self.results = results


def measure(
    case: StepCase,
    chosen: Sequence[StepProvider],
    rounds: int,
    *,
    kinds: bool = False,
    left_out: LeftOut | None = None,
) -> list[StepResult]:
    """Measure one step.

    Args:
        case: what to compute.
        chosen: the ways to compute it; the first one is the yardstick.
        rounds: timed steps of every provider.
        kinds: also profile one step of each.
        left_out: takes providers that fail before the first round, except for the yardstick; None:
            they raise.

    Returns:
        One result per provider that is not left out.

    Raises:
        WrongResultError: a provider's loss or gradients differ from those of its method.
        UsageError: a provider cannot compute this.
        StoppedError: it ended early, but not before the first round.
    """
    truths = Truths(case, _in_its_own_process)
    running: list[Worker] = []
    errors: list[float] = []
    trained: list[int] = []
    try:
        for provider in chosen:
            try:
                truths.prepare(provider)
                running.append(Worker(case, provider))
                # One at a time: two first steps at once would fight for the cores.
                answer = running[-1].answer()
                errors.append(truths.check(provider, answer))
            except (UsageError, WrongResultError) as error:
                if left_out is None or provider is chosen[0]:
                    raise
                left_out.add(error)
                for worker in running[len(errors) :]:
                    worker.stop()
                del running[len(errors) :]
            else:
                trained.append(answer.trained)
        return _measure_rounds(running, rounds, errors, trained, kinds)
    finally:
        for worker in running:
            worker.stop()


def _in_its_own_process(case: StepCase, provider: StepProvider) -> Answer:
    worker = Worker(case, provider, plain=True)
    try:
        return worker.answer()
    finally:
        worker.stop()


def with_costs(case: StepCase, results: Sequence[StepResult]) -> list[StepResult]:
    """Measure the device's ceilings and set every result against them and the cost model."""
    device = torch.device(case.device)
    found: dict[str, Ceilings] = {}
    for precision in dict.fromkeys(result.provider.precision for result in results):
        dtype = torch.bfloat16 if precision == "autocast" else INPUT[precision]
        flops, bandwidth = ceilings.measure(device, dtype, seconds=0.5).rates
        found[precision] = Ceilings(case.device, flops, bandwidth, "measured in this run")
    return [
        replace(
            result,
            cost=step_cost(case, result.provider),
            product_rate=found[result.provider.precision].flops,
            predicted=predicted_speed(case, results[0].provider, result.provider, found),
        )
        for result in results
    ]


def _measure_rounds(
    running: list[Worker],
    rounds: int,
    errors: list[float],
    trained: list[int],
    kinds: bool = False,
) -> list[StepResult]:
    """Go through the providers in turn, as often as asked for."""
    done: list[list[tuple[float, float]]] = []
    profiles: list[dict[str, float]] = [{} for _ in running]

    def results() -> list[StepResult]:
        return [
            StepResult(
                provider=worker.provider,
                seconds=[measured[index][0] for measured in done],
                peak_bytes=done[-1][index][1],
                error=errors[index],
                trained=trained[index],
                kinds=profiles[index],
            )
            for index, worker in enumerate(running)
        ]

    try:
        for _ in range(rounds):
            done.append([worker.step() for worker in running])
        if kinds:
            profiles = [worker.kinds() for worker in running]
    except (KeyboardInterrupt, UsageError) as error:
        if not done:
            raise
        raise StoppedError(results()) from error
    return results()


def choose(available: Sequence[StepProvider], texts: Sequence[str]) -> list[StepProvider]:
    """Return the providers that are named, in full or else in part; the yardstick is the first.

    Raises:
        UsageError: a text fits none.
    """
    wanted: set[str] = set()
    for text in texts:
        names = [provider.name for provider in available]
        exact = {name for name in names if name.lower() == text.lower()}
        found = exact or {name for name in names if text.lower() in name.lower()}
        if not found:
            known = ", ".join(map(repr, names))
            raise UsageError(
                f"--provider: got {text!r}, expected a part of one of {known}; correct it"
            )
        wanted |= found
    first, *rest = available
    return [first, *(p for p in rest if not texts or p.name in wanted)]


@command("tcpa-bench step")
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    default = StepCase()
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="tcpa-bench step", description=summary)
    parser.add_argument("--model", default=default.model, help="timm name of the backbone")
    parser.add_argument("--dataset", default=default.dataset, choices=HTA_DATASETS)
    parser.add_argument("--batch", type=int, default=default.batch, help="images a step")
    parser.add_argument("--mode", default=default.mode, choices=("train", "eval"))
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "bfloat16", "float64")
    )
    parser.add_argument("--device", default=default.device, help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per provider")
    parser.add_argument(
        "--provider",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only these, by name or a part of it",
    )
    parser.add_argument(
        "--all", action="store_true", help="prompts on images, too, and on a CPU what is compiled"
    )
    parser.add_argument("--ladder", action="store_true", help="one change after the other")
    parser.add_argument("--kinds", action="store_true", help="also: time by kind of kernel")
    parser.add_argument("--results", type=Path, help="file to append the results to, JSON lines")
    options = parser.parse_args(argv)
    for name, least in (("batch", 1), ("rounds", 1), ("threads", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least {least}")
    if not timm.is_model(options.model):
        parser.error(f"--model: timm does not know {options.model!r}; see timm.list_models()")
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
    chosen = choose(list(available), options.provider)
    if not options.all and not options.provider:
        chosen = [p for p in chosen if p.input_prompt is None]
        if device.type == "cpu":
            chosen = [p for p in chosen if not p.compiled and (options.ladder or not p.folded)]
    results = Results(options.results)
    if options.threads:
        torch.set_num_threads(options.threads)
    where, left_out = provenance(device), LeftOut()
    try:
        found = measure(case, chosen, options.rounds, kinds=options.kinds, left_out=left_out)
    except WrongResultError as error:
        print(f"tcpa-bench step: {error}", file=sys.stderr)
        return 1
    except StoppedError as stopped:
        _hand_out(case, stopped.results, results, where)
        left_out.tell("tcpa-bench step")
        raise (stopped.__cause__ or stopped) from None
    _hand_out(case, found, results, where)
    return left_out.tell("tcpa-bench step")


def _hand_out(case: StepCase, found: list[StepResult], results: Results, where: Provenance) -> None:
    """Print the table, then write the file; neither keeps the other from being made."""
    found = with_costs(case, found)
    try:
        print(table(case, found, where), flush=True)
    finally:
        results.add(rows_of(case, found, where))


if __name__ == "__main__":
    sys.exit(main())
