"""Random numbers as functions of (seed, epoch, step): a resumed run draws what it would have drawn.

Nothing of a generator's state is saved. Before every step the generators are seeded for that step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

MIXING, MODEL, STAGE = 1, 2, 3
"""What numbers are drawn for; every purpose has a stream of its own."""


def derive(seed: int, purpose: int, *position: int) -> int:
    """Return a seed of 63 bits for a purpose and a position, e.g. (epoch, step, rank)."""
    sequence = np.random.SeedSequence([seed, purpose, *position])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def seed_model(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed dropout, random selection and noise of one step; each process draws its own."""
    torch.manual_seed(derive(seed, MODEL, epoch, step, rank))


@contextmanager
def numpy_seeded(seed: int, epoch: int, step: int) -> Iterator[None]:
    """Seed numpy's global generator, from which timm's Mixup draws, and restore it afterwards.

    The same on all processes: they hold parts of one batch, which is mixed by one weight.
    """
    before = np.random.get_state()
    np.random.seed(derive(seed, MIXING, epoch, step) % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
