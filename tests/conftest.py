"""Shared test set-up."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter; it has to be chosen before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads that wait for each other would cost more than they bring.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
