"""One training step: the official algorithm against this library, interleaved in one run.

Usage: tcpa-bench step [--model NAME] [--dataset NAME] [--batch N] [--dtype NAME] [--rounds N]

Units: time in milliseconds a step (median and quartiles over the rounds), peak memory in MiB of
resident set of a process that runs nothing else, interpreter and weights included.

Every provider lives in a process of its own, so that its peak memory is its own; the rounds go
through the providers in turn, so that a noisy machine disturbs all of them alike. No figure is
printed for a provider whose loss and gradients differ from the official algorithm's.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing as mp
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

from tcpa import HTA_DATASETS, Savings, TCPAConfig, wrap

PROVIDERS: dict[str, Savings] = {
    "official": Savings.none(),
    "official, frozen": dataclasses.replace(Savings.none(), frozen_backbone=True),
    "tcpa": Savings(),
}
"""Forms of the same computation; `Savings.none()` is the official algorithm as it stands."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float64": 1e-9}
NUM_CLASSES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCase:
    """What one step computes."""

    model: str = "vit_base_patch16_224"
    """timm name of the backbone; weights are random."""

    dataset: str = "cub"
    """Whose official settings to use, without the image prompt."""

    batch: int = 8
    """Images a step."""

    dtype: str = "float32"
    """Precision; bfloat16 means autocast over float32 weights."""

    threads: int = 0
    """CPU threads; 0 leaves torch's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What was measured for one provider."""

    provider: str
    milliseconds: list[float]
    peak_mib: float
    loss: float
    gradient_error: float


def _make_step(case: StepCase, savings: Savings) -> Callable[[], tuple[float, list[torch.Tensor]]]:
    """Build model and optimiser; return a function that runs one step."""
    if case.threads:
        torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    exact = torch.float64 if case.dtype == "float64" else torch.float32
    # Without dropout and random selection all providers compute the same numbers.
    config = dataclasses.replace(
        TCPAConfig.official(case.dataset),
        image_prompt=False,
        prompt_dropout=0.0,
        random_selection_epochs=0,
    )
    backbone = timm.create_model(case.model).to(exact)
    model = wrap(backbone, config, num_classes=NUM_CLASSES, savings=savings).to(exact)
    size = backbone.pretrained_cfg["input_size"]
    images = torch.randn(case.batch, *size, dtype=exact)
    labels = torch.randint(0, NUM_CLASSES, (case.batch,))
    parameters = model.trainable_parameters()
    # A zero learning rate keeps every step at the same point; AdamW still does its work.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    amp = case.dtype == "bfloat16"

    def step() -> tuple[float, list[torch.Tensor]]:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits, distance = model(images, return_distance=True)
        loss = F.cross_entropy(logits.float() if amp else logits, labels)
        (loss + config.match_weight * distance).backward()
        optimizer.step()
        return loss.item(), [p.grad for p in parameters if p.grad is not None]

    return step


def _serve(connection: Connection, case: StepCase, savings: Savings) -> None:
    """Run steps on request in a process of its own."""
    step = _make_step(case, savings)
    loss, gradients = step()
    connection.send((loss, [g.numpy() for g in gradients]))
    while connection.recv():
        start = time.perf_counter()
        step()
        elapsed = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        connection.send((elapsed * 1e3, peak))


def measure(
    case: StepCase, rounds: int, providers: dict[str, Savings] | None = None
) -> list[StepResult]:
    """Measure one training step.

    Args:
        case: what to compute.
        rounds: timed steps of every provider.
        providers: name and form of each; the first one is the yardstick.

    Returns:
        One result per provider.

    Raises:
        RuntimeError: a provider's loss or gradients differ from the first one's.
    """
    providers = providers or PROVIDERS
    context = mp.get_context("spawn")
    ends: dict[str, Connection] = {}
    first: dict[str, Any] = {}
    processes = []
    try:
        for name, savings in providers.items():
            ends[name], far = context.Pipe()
            processes.append(context.Process(target=_serve, args=(far, case, savings), daemon=True))
            processes[-1].start()
            far.close()
            # One at a time: two first steps at once would fight for the cores.
            first[name] = ends[name].recv()
        errors = _verify(case, first)
        times: dict[str, list[float]] = {name: [] for name in ends}
        peaks: dict[str, float] = {}
        for _ in range(rounds):
            for name, end in ends.items():
                end.send(True)
                elapsed, peaks[name] = end.recv()
                times[name].append(elapsed)
        for end in ends.values():
            end.send(False)
    finally:
        for process in processes:
            process.join(timeout=5)
            process.terminate()
    return [
        StepResult(
            provider=name,
            milliseconds=times[name],
            peak_mib=peaks[name],
            loss=first[name][0],
            gradient_error=errors[name],
        )
        for name in ends
    ]


def _verify(case: StepCase, first: dict[str, Any]) -> dict[str, float]:
    """Return every provider's largest relative gradient error against the first one."""
    expected_loss, expected = next(iter(first.values()))
    errors = {}
    for name, (loss, gradients) in first.items():
        pairs = zip(gradients, expected, strict=True)
        found = [float(abs(g - e).max() / max(abs(e).max(), 1e-30)) for g, e in pairs]
        found.append(abs(loss - expected_loss) / abs(expected_loss))
        # NaN compares as neither larger nor smaller: it has to be looked for.
        error = float("nan") if any(map(math.isnan, found)) else max(found)
        if not error <= TOLERANCE[case.dtype]:
            raise RuntimeError(
                f"provider {name!r} differs from the official algorithm by {error:.1e} "
                f"(allowed {TOLERANCE[case.dtype]:.0e}); no figures of a wrong result"
            )
        errors[name] = error
    return errors


def report(case: StepCase, results: list[StepResult]) -> str:
    """Return the table that is printed."""
    size = f"{case.model}, batch {case.batch}, {case.dtype}, {torch.get_num_threads()} threads"
    rounds = len(results[0].milliseconds)
    lines = [
        f"One training step of TCPA ({case.dataset} settings): {size}",
        f"torch {torch.__version__}, {platform.machine()} CPU, {rounds} rounds",
        f"{'provider':<18}{'ms (quartiles)':>24}{'speed':>8}{'peak MiB':>10}"
        f"{'memory':>8}{'error':>9}",
    ]
    base = results[0]
    base_ms = statistics.median(base.milliseconds)
    for result in results:
        ms = statistics.median(result.milliseconds)
        low, high = min(result.milliseconds), max(result.milliseconds)
        if len(result.milliseconds) >= 2:
            low, _, high = statistics.quantiles(result.milliseconds, n=4, method="inclusive")
        spread = f"{ms:.0f} ({low:.0f}-{high:.0f})"
        lines.append(
            f"{result.provider:<18}{spread:>24}{base_ms / ms:>7.2f}x{result.peak_mib:>10.0f}"
            f"{result.peak_mib / base.peak_mib:>7.2f}x{result.gradient_error:>9.0e}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    default = StepCase()
    parser = argparse.ArgumentParser(prog="tcpa-bench step", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=default.model, help="timm name of the backbone")
    parser.add_argument("--dataset", default=default.dataset, choices=HTA_DATASETS)
    parser.add_argument("--batch", type=int, default=default.batch, help="images a step")
    parser.add_argument("--dtype", default=default.dtype, choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per provider")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(argv)
    for name in ("batch", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least 1")
    if not timm.is_model(options.model):
        parser.error(f"--model: timm does not know {options.model!r}; see timm.list_models()")
    case = StepCase(
        model=options.model,
        dataset=options.dataset,
        batch=options.batch,
        dtype=options.dtype,
        threads=options.threads,
    )
    results = measure(case, options.rounds)
    print(report(case, results))
    if options.json:
        rows = {"case": dataclasses.asdict(case), "results": list(map(dataclasses.asdict, results))}
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
