"""Seconds per epoch of a data set of CUB's size (the paper's Table 4), with the data pipeline.

Usage: tcpa-bench epoch [--device cpu] [--images N] [--source disk cache device] [--provider TEXT]

Every method, with TCPA and without, is trained and tested on generated photos that come from disk,
from a cache or from the device's memory (see `harness/images.py`). Three rates in images/s are told
apart: the pipeline alone, the model alone on images that are there already, and both together,
which is what an epoch takes. With fewer photos than CUB has, seconds are scaled up to its 5,394
training and 5,794 test images.

Methods are interleaved: every method runs its part of an epoch in turn, alone and with the
pipeline, as often as --rounds says; the pipeline alone runs once a round for all of them. Before
that, every method's loss, gradients and logits are checked against its plain form; one that
differs, or cannot be computed here, is left out and named. When the run is interrupted, the rounds
before are kept.

Exit status 1: a method computes something else. 2: one cannot be measured.
"""

import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from tcpa import Savings

from ..cli import choose_device, command, require
from ..train.data.speed import cached_photos, write_photos
from .harness.case import StepCase
from .harness.check import Skipped, WrongResultError
from .harness.images import SOURCES, Cached, Files, Pair, Source, resize_of
from .harness.model import checked_runners
from .harness.options import add_results, parse, step_parser
from .harness.provider import StepProvider
from .harness.results import Provenance, Results, Row, make_rows, provenance
from .harness.timing import Quantiles
from .providers.step import providers
from .step import choose_steps

IMAGES = {"train": 5394, "eval": 5794}
"""CUB-200-2011 as the official code splits it: 90 % of the training part, and the test part."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What was measured of one source with one method: images per second, one value a round."""

    provider: str
    precision: str
    source: str
    mode: str
    together: list[float]
    pipeline: list[float]
    model: list[float]
    speed: list[float]
    """How many times as fast as the first provider it is, with the pipeline."""
    cost: list[float] | None = None
    """How many times as long as the same method without TCPA it takes, where that is measured."""


def measure(
    case: StepCase,
    chosen: Sequence[StepProvider],
    data: dict[str, Source],
    *,
    rounds: int,
    skipped: Skipped,
) -> Iterator[Rate]:
    """Measure every method with every source, training and test apart.

    Args:
        case: model, batch and device; the mode is not looked at.
        chosen: the methods.
        data: images by source.
        rounds: passes over the images for every figure.
        skipped: takes the methods that fail before anything is measured, except for the first.

    Yields:
        One rate per mode, source and method.

    Raises:
        WrongResultError, UsageError: as `checked_runners`.
    """
    device = torch.device(case.device)
    runners = checked_runners(case, chosen, skipped)
    chosen = [provider for provider in chosen if provider.name in runners]
    for mode, (source, images) in itertools.product(("train", "eval"), data.items()):

        def epoch(number: int, images: Source = images, mode: str = mode) -> Iterator[Pair]:
            return images.epoch(number, train=mode == "train")

        # The queue of a GPU has to fill.
        ready = [next(iter(epoch(0)))] * (10 if device.type == "cuda" else 1)
        alone: dict[str, list[float]] = {name: [] for name in runners}
        together: dict[str, list[float]] = {name: [] for name in runners}
        pipeline = []
        interrupted = None
        try:
            for number in range(rounds):
                pipeline.append(images_per_second(epoch(number), None, device))
                for name, runner in runners.items():
                    runner.use(mode)
                    alone[name].append(images_per_second(ready, runner.run, device))
                    together[name].append(images_per_second(epoch(number), runner.run, device))
        except KeyboardInterrupt as error:
            interrupted = error
        done = min(map(len, together.values()))
        for p in chosen if done else ():
            own, base = together[p.name][:done], without_tcpa(p, chosen)
            speed = _ratios(own, together[chosen[0].name][:done])
            cost = None if base is None else _ratios(together[base.name][:done], own)
            rates = own, pipeline[:done], alone[p.name][:done]
            yield Rate(p.name, p.precision, source, mode, *rates, speed, cost)
        if interrupted is not None:
            raise interrupted


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def without_tcpa(provider: StepProvider, chosen: Sequence[StepProvider]) -> StepProvider | None:
    """Return the same method without TCPA in the same form, if it is among the chosen."""
    if provider.base_method is None:
        return None
    form = replace(provider, name="", method=provider.base_method)
    return next((p for p in chosen if replace(p, name="") == form), None)


def images_per_second(
    epoch: Iterable[Pair], run: Callable[[Tensor, Tensor], Any] | None, device: torch.device
) -> float:
    """Go through batches, with the model or without, and return the rate."""
    count, start = 0, time.perf_counter()
    for images, labels in epoch:
        if run is not None:
            run(images, labels)
        count += len(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count / (time.perf_counter() - start)


def rows_of(case: StepCase, rate: Rate, images: int, where: Provenance) -> list[Row]:
    """Return the rows of a rate: seconds for CUB's number of images, and the three rates."""
    seconds = [IMAGES[rate.mode] / value for value in rate.together]
    figures = {
        ("seconds per epoch", "s"): seconds,
        ("rate with pipeline", "images/s"): rate.together,
        ("rate of the pipeline alone", "images/s"): rate.pipeline,
        ("rate of the model alone", "images/s"): rate.model,
        ("speed against the first", "x"): rate.speed,
    }
    if rate.cost is not None:
        figures["time against the same without TCPA", "x"] = rate.cost
    return make_rows(
        {name: Quantiles.of(values) for name, values in figures.items()},
        where,
        command="epoch",
        operation=f"epoch from {rate.source}",
        shape=f"{case.model}-{case.dataset}-b{case.batch}-n{images}",
        dtype=rate.precision,
        mode=rate.mode,
        provider=rate.provider,
    )


def table(rates: Sequence[Rate], images: int) -> str:
    """Return the table that is printed."""
    width = max(len(rate.provider) for rate in rates) + 2
    lines = [
        f"{'provider':<{width}}{'source':<8}{'mode':<7}{'s/epoch':>9}{'speed':>8}{'TCPA':>8}"
        f"{'images/s':>10}{'pipeline':>10}{'model':>10}"
    ]
    for rate in rates:
        together, pipeline, model = (
            statistics.median(values) for values in (rate.together, rate.pipeline, rate.model)
        )
        speed = statistics.median(rate.speed)
        cost = "" if rate.cost is None else f"{statistics.median(rate.cost):.2f}x"
        lines.append(
            f"{rate.provider:<{width}}{rate.source:<8}{rate.mode:<7}"
            f"{IMAGES[rate.mode] / together:>9.1f}{speed:>7.2f}x{cost:>8}"
            f"{together:>10.1f}{pipeline:>10.1f}{model:>10.1f}"
        )
    scaled = "" if images >= IMAGES["train"] else f", scaled up from {images} images"
    lines.append(
        f"s/epoch: for {IMAGES['train']:,} training, {IMAGES['eval']:,} test images{scaled}"
    )
    lines.append("pipeline, model: images/s of either alone; speed: against the first provider")
    lines.append("TCPA: time against the same method without TCPA")
    return "\n".join(lines)


_ORDER = ("vp", "vpt-deep", "dam-vp", "autovp", "vfpt", "linear")


def one_form_each(available: Sequence[StepProvider], precision: str) -> list[StepProvider]:
    """Return the yardstick and all methods, each as a user runs it, behind its like without TCPA.

    On a GPU our best form comes on top.
    """
    first, *rest = available
    plain = [
        provider
        for provider in rest
        if provider.precision == precision
        and provider.savings == Savings()
        and not (provider.compiled or provider.folded)
    ]
    plain.sort(key=lambda p: (_ORDER.index(p.base_method or p.method), p.base_method is not None))
    return [first, *plain, *(provider for provider in rest if provider.graph)]


@command("tcpa-bench epoch")
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = step_parser("epoch", __doc__)
    text = f"photos; CUB has {IMAGES['train']:,}"
    parser.add_argument("--images", type=int, default=16, help=text)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--source", nargs="+", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--workers", type=int, default=2, help="processes that read files")
    parser.add_argument("--rounds", type=int, default=2, help="passes for every figure")
    parser.add_argument("--provider", nargs="+", default=[], metavar="TEXT", help="only these")
    add_results(parser)
    options = parse(parser, argv, batch=1, rounds=1, workers=0)
    fits = options.images >= options.batch
    require(fits, "--images", options.images, f"at least {options.batch}, one --batch", "raise it")
    _, *sides = timm.get_pretrained_cfg_value(options.model, "input_size") or (3, 224, 224)
    size = sides[0]
    require(sides == [size, size], "--model", f"images of {sides}", "squares", "choose another")
    device = choose_device(options.device)
    case = StepCase(model=options.model, batch=options.batch, device=str(device))
    available = providers(options.precision, device.type)
    chosen = choose_steps(available, options.provider)
    if not options.provider:
        chosen = one_form_each(available, options.precision)
    sources = [s for s in options.source if s != "device" or device.type != "cpu"]
    remedy = "name one of them"
    require(bool(sources), "--source", "device with --device cpu", "disk or cache there", remedy)
    results, where = Results(options.results), provenance(device)
    print(f"{options.model}, batch {options.batch}, {where.device}, torch {where.torch}")
    found: list[Rate] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as at_end:
        at_end.callback(lambda: found and print(table(found, options.images)))
        photos = Path(folder) / "photos"
        photos.mkdir()
        paths = write_photos(photos, options.images)
        data: dict[str, Source] = {}
        for source in sources:
            shared = {"batch": case.batch, "size": size}
            if source == "disk":
                data[source] = Files(paths, device, workers=options.workers, **shared)
            else:
                split = cached_photos(paths, Path(folder) / "cache", resize=resize_of(size))
                data[source] = Cached(split, device, resident=source == "device", **shared)
        skipped = Skipped()
        try:
            for rate in measure(case, chosen, data, rounds=options.rounds, skipped=skipped):
                found.append(rate)
                results.add(rows_of(case, rate, options.images, where))
        except WrongResultError as error:
            print(f"tcpa-bench epoch: {error}", file=sys.stderr)
            return 1
    return skipped.report("tcpa-bench epoch")


if __name__ == "__main__":
    sys.exit(main())
