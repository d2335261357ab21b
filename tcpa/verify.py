"""Check this library against outputs of the official code: `python -m tcpa.verify FILE...`.

Prints one line per file with the largest relative error of each field. The exit status is 0 when
all errors are within the tolerance, 1 when one is not, 2 when a file cannot be used.
"""

import argparse
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import Savings
from .dispatch import IMPLS, choose_impl
from .golden import check

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def load_golden(path: Path) -> dict[str, Any]:
    """Read a golden file.

    Raises:
        ValueError: it is not a golden file; the message says why.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            golden = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; golden files are in tests/golden") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as .npz ({error}); is it damaged?") from error
    if "lr" not in golden and "case/seed" not in golden:
        raise ValueError(f"{path}: no case/* fields, expected a golden file; see tests/golden")
    return golden


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tcpa.verify", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="golden .npz file")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float64")
    parser.add_argument(
        "--plain", action="store_true", help="check the plain computation, without any saving"
    )
    parser.add_argument("--impl", choices=IMPLS, default="auto", help="what computes (auto)")
    parser.add_argument("--device", default="cpu", help="where: cpu (default), cuda, cuda:1, ...")
    options = parser.parse_args(argv)
    dtype, savings = getattr(torch, options.dtype), Savings.none() if options.plain else None
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).item()
        name, reason = choose_impl(options.impl, device, dtype=dtype)
        if name == "triton" and dtype == torch.float64:
            raise RuntimeError("the kernels compute in float32 at most; pass --dtype float32")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = str(error).strip().splitlines()[0]
        print(f"--impl {options.impl} --device {options.device}: {message}", file=sys.stderr)
        return 2
    print(f"{options.dtype} on {device}, {name}: {reason}", file=sys.stderr)
    status = 0
    for path in options.files:
        try:
            golden = load_golden(path)
            errors = check(golden, dtype=dtype, savings=savings, impl=options.impl, device=device)
        except KeyError as error:
            print(f"{path}: no field case/{error.args[0]}; is it a golden file?", file=sys.stderr)
            status = 2
            continue
        except ValueError as error:
            print(error, file=sys.stderr)
            status = 2
            continue
        passed = all(error <= TOLERANCE[options.dtype] for error in errors.values())
        fields = "  ".join(f"{name} {error:.0e}" for name, error in errors.items())
        print(f"{'ok  ' if passed else 'FAIL'} {path.name}: {fields}", flush=True)
        status = status or int(not passed)
    return status


if __name__ == "__main__":
    sys.exit(main())
