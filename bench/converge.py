"""Train with the fast attention and with the reference from one start: are the losses the same?

Usage: tcpa-bench converge [--device cuda] [--precision bfloat16] [--steps 200] [--repeats 100]

Both train the same model on the same generated images in the same order; the reference also in two
other orders. In low precision curves drift apart by rounding alone, so the yardstick is how far the
reference is from itself when only the order changes. Losses are averaged over windows of ten steps.

Then one step is computed again and again: loss and gradients must be equal to the last bit.

Exit status 1: the curves are further apart than orders are, or a repeat differs.
"""

import itertools
import sys
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tcpa.dispatch import IMPLS

from ..cli import UsageError, choose_device, command
from .harness.case import StepCase
from .harness.model import Runner, build_model
from .harness.options import add_results, parse, step_parser
from .harness.provider import StepProvider
from .harness.results import Results, make_rows, provenance
from .harness.timing import Quantiles

CLASSES = 16
IMAGES = 256
ORDERS = 3
WINDOW = 10
LEARNING_RATE = 1e-3


def make_images(case: StepCase, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return images `[256, 3, height, width]` on the device: a pattern for each class and noise,
    and their labels."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(CLASSES, size[0], 4, 4, generator=generator)
    patterns = torch.nn.functional.interpolate(coarse, size[1:], mode="bilinear")
    labels = torch.arange(IMAGES) % CLASSES
    images = patterns[labels] + torch.randn(IMAGES, *size, generator=generator)
    return images.to(case.device), labels.to(case.device)


def losses(case: StepCase, provider: StepProvider, steps: int, order: int) -> np.ndarray:
    """Train and return the loss of every step, float64 `[steps]`."""
    runner = Runner(case, provider, learning_rate=LEARNING_RATE)
    images, labels = make_images(case, runner.model.backbone.pretrained_cfg["input_size"])
    generator = torch.Generator().manual_seed(order)
    found = []
    for _ in range(steps):
        chosen = torch.randint(0, IMAGES, (case.batch,), generator=generator).to(case.device)
        found.append(runner.run(images[chosen], labels[chosen]))
    return torch.stack(found).double().cpu().numpy()


def windows(curve: np.ndarray) -> np.ndarray:
    """Return the means of ten steps each; what is left over at the end goes to the last one."""
    return np.array([part.mean() for part in np.array_split(curve, max(len(curve) // WINDOW, 1))])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean distance of two curves, window by window."""
    return float(np.abs(windows(one) - windows(other)).mean())


def equal_repeats(case: StepCase, provider: StepProvider, repeats: int) -> int:
    """Compute one step again and again; return how often all of it was equal to the first time."""
    runner = Runner(case, provider)
    images, labels = make_images(case, runner.model.backbone.pretrained_cfg["input_size"])

    def step() -> list[Tensor]:
        found = runner.step.backward(images[: case.batch], labels[: case.batch])
        gradients = (p.grad for p in runner.model.trainable_parameters())
        return [found.losses[0], *(grad for grad in gradients if grad is not None)]

    first = step()
    return sum(
        all(torch.equal(a, b) for a, b in zip(first, step(), strict=True)) for _ in range(repeats)
    )


@command("tcpa-bench converge")
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = step_parser("converge", __doc__, batch=32, device="cuda")
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--impl", default="auto", choices=IMPLS, help="what is compared")
    parser.add_argument("--steps", type=int, default=200, help="of every training")
    parser.add_argument("--repeats", type=int, default=100, help="of one step")
    add_results(parser)
    options = parse(parser, argv, batch=1, steps=1, repeats=1)
    device = choose_device(options.device)
    case = StepCase(model=options.model, batch=options.batch, device=str(device))
    ours = StepProvider(name="ours", precision=options.precision, impl=options.impl)
    reference = replace(ours, name="reference", impl="reference")
    results, where = Results(options.results), provenance(device)
    try:
        chosen = build_model(case, ours).implementation
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--impl {options.impl}: {error}") from None
    print(f"{options.model}, {options.precision}, {where.device}; {chosen[0]} ({chosen[1]})")
    plain = [losses(case, reference, options.steps, order) for order in range(ORDERS)]
    apart = distance(losses(case, ours, options.steps, 0), plain[0])
    spread = [distance(one, other) for one, other in itertools.combinations(plain, 2)]
    equal = equal_repeats(case, ours, options.repeats)
    first, last = (windows(plain[0])[index] for index in (0, -1))
    print(f"loss of the reference: {first:.3f} at first, {last:.3f} in the end")
    print(f"mean distance of the curves: {apart:.2e}; of orders from each other: {min(spread):.2e}")
    print(f"equal to the last bit: {equal} of {options.repeats} repeats of a step")
    figures = {
        ("distance from the reference", "loss"): Quantiles.of([apart]),
        ("distance between orders", "loss"): Quantiles.of(spread),
        ("repeats equal to the last bit", "%"): Quantiles.of([100 * equal / options.repeats]),
    }
    fields = {"command": "converge", "operation": f"{options.steps} steps", "mode": "train"}
    fields |= {"shape": f"{case.model}-b{case.batch}", "dtype": options.precision}
    results.add(make_rows(figures, where, provider=chosen[0], **fields))
    return int(not apart <= min(spread) or equal < options.repeats)


if __name__ == "__main__":
    sys.exit(main())
