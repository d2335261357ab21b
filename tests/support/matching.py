"""Cases and oracles of the tests of the matching kernels."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from tcpa.kernels.launch import Launch, override
from tcpa.reference import split_gate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Case:
    batch: int = 2
    tokens: int = 21
    width: int = 64
    pool: tuple[int, int] = (5, 9)
    top_k: tuple[int, int] = (2, 4)
    prefix: int = 1
    lengths: tuple[int, int] = (1, 1)
    selection: str = "nearest"

    @property
    def settings(self) -> dict:
        return {
            "cls_top_k": self.top_k[0],
            "image_top_k": self.top_k[1],
            "num_prefix_tokens": self.prefix,
            "lengths": self.lengths,
            "selection": self.selection,
        }


CASES = {
    "small": Case(),
    "farthest": Case(selection="farthest"),
    # The paper's pools and width; a sample ends inside a tile of rows.
    "paper": Case(tokens=34, width=768, pool=(18, 18), top_k=(10, 10)),
    # Widths that fill no chunk of columns: 100 is no multiple of 8, 30 of nothing.
    "width-100": Case(width=100, pool=(7, 33), top_k=(3, 5)),
    "width-30": Case(width=30),
    "width-192": Case(batch=1, width=192),
    "width-384": Case(batch=1, tokens=17, width=384),
    "width-1280": Case(batch=1, tokens=15, width=1280),
    "width-1": Case(width=1),
    # Row counts around a tile of 16 rows.
    "tokens-1": Case(tokens=1),
    "tokens-17": Case(batch=1, tokens=17),
    "tokens-18": Case(batch=3, tokens=18),
    # Roles: no prefix token, registers, prefix tokens only.
    "prefix-0": Case(prefix=0),
    "prefix-5": Case(prefix=5, pool=(9, 9), top_k=(4, 4)),
    "prefix-all": Case(prefix=21),
    # Pools: empty, whole, one entry, the largest; 33 is one past half of it.
    "no-cls-pool": Case(pool=(0, 6), top_k=(0, 3)),
    "no-image-pool": Case(pool=(6, 0), top_k=(3, 0)),
    "no-pool": Case(pool=(0, 0), top_k=(0, 0)),
    "top-k-0": Case(top_k=(0, 0)),
    "top-k-all": Case(top_k=(5, 9)),
    "pool-64": Case(batch=1, pool=(64, 33), top_k=(20, 32)),
    "pool-1": Case(pool=(1, 1), top_k=(1, 1)),
    # Prompts of several rows: entries that cross words, entries longer than a word.
    "lengths": Case(lengths=(4, 5)),
    "lengths-long": Case(pool=(3, 4), top_k=(1, 2), lengths=(37, 64)),
}


# Halves and slices of a tile, warps: rows held in registers, and rows read once per pass.
TILES = {"held": (2, 4, 4), "tall": (8, 1, 4), "taller": (16, 1, 8)}


@contextlib.contextmanager
def tiles(name: str) -> Iterator[None]:
    """Launch the kernels of tokens with such tiles, whatever the launch table says."""
    halves, slices, warps = TILES[name]
    blocks = MappingProxyType({"HALVES": halves, "SLICES": slices})
    launch = Launch(blocks=blocks, num_warps=warps, num_stages=1)
    with contextlib.ExitStack() as stack:
        for operation in ("match_prompts", "norm_match"):
            for kernel in ("fwd", "dx"):
                stack.enter_context(override(f"{operation}_{kernel}", launch))
        yield


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x in `dtype` and float32 keys."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    x = (draw(case.batch, case.tokens, case.width) + 0.5).to(dtype)
    return x, draw(case.pool[0], case.width), draw(case.pool[1], case.width)


def assert_close(name: str, ours: Tensor, plain: Tensor, truth: Tensor, terms: float = 0) -> None:
    """Our error is at most twice that of plain PyTorch, beside a few units in the last place.

    `terms` is the size of what the result is a difference of.
    """
    assert ours.shape == truth.shape, name
    if truth.numel() == 0:
        return
    error = (ours.double() - truth).abs().max().item()
    plain_error = (plain.double() - truth).abs().max().item()
    floor = 4 * torch.finfo(torch.float32).eps * max(truth.abs().max().item(), terms)
    assert error <= 2 * plain_error + floor, f"{name}: error {error:.3g}, plain {plain_error:.3g}"


def similarities(inputs, case: Case) -> list[Tensor]:
    """Return the float64 cosines of prefix tokens and of patches with their pools."""
    x, *keys = (t.double() for t in inputs)
    unit = torch.nn.functional.normalize
    rows = (x[:, : case.prefix], x[:, case.prefix :])
    return [unit(r, dim=-1) @ unit(k, dim=-1).mT for r, k in zip(rows, keys, strict=True)]


def wrong_margin(gate: Tensor, truth: Tensor, inputs, case: Case) -> float:
    """Return the largest float64 margin of a row whose selection is not the reference's."""
    largest = 0.0
    selected = split_gate(gate, case.pool, case.lengths, case.prefix)
    expected = split_gate(truth, case.pool, case.lengths, case.prefix)
    for ours, theirs, cosine, k in zip(
        selected, expected, similarities(inputs, case), case.top_k, strict=True
    ):
        wrong = (ours != theirs).any(-1)
        if wrong.any():
            ordered = cosine[wrong].sort(-1, descending=case.selection == "nearest").values
            largest = max(largest, (ordered[:, k - 1] - ordered[:, k]).abs().max().item())
    return largest


def bound(width: int) -> float:
    """Twice the bound on the error of a similarity that the kernels state."""
    return 2 * (width / 8 + 40) * 2.0**-24
