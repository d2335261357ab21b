"""Shared test set-up."""

import functools
import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter; it has to be chosen before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads that wait for each other would cost more than they bring.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _poison_uninitialized_memory() -> Iterator[None]:
    """Fill what the library allocates without writing to it: a read before a write shows."""
    # `torch.device` as a context knows these functions themselves: not their stand-ins.
    _device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(Tensor, name, _poisoned(getattr(Tensor, name)))
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def call(*args, **kwargs) -> Tensor:
        out = allocate(*args, **kwargs)
        # Compiled graphs stay as they are, and so does what other packages allocate.
        if torch.compiler.is_compiling() or type(out) is not Tensor or out.is_meta:
            return out
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "tcpa":
            with torch.no_grad():
                out.fill_(_poison(out.dtype))
        return out

    return call


def _poison(dtype: torch.dtype) -> float:
    """A value that no result survives: NaN, or an integer too large for any index."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max
