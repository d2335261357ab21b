"""Check this library against outputs of the official code: `python -m tcpa.verify FILE...`.

Prints one line per file with the largest relative error of each field. The exit status is 0 when
all errors are within the tolerance, 1 when one is not, 2 when a file cannot be used.
"""

import argparse
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checks import require, require_bool, require_choice, require_int, require_number
from .cli import UsageError, command
from .config import Savings
from .dispatch import IMPLS, Impl, choose_impl
from .golden import case_of, check

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


DAMAGED = "the file is damaged or no golden file; take it from tests/golden again"
NUMBERS = "biuf"
"""Kinds of dtypes that count as numbers."""
COUNTS = {
    "seed": (0, 2**31),
    "n_classes": (1, 10**6),
    "batch": (1, 4096),
    "steps": (1, 4096),
    **dict.fromkeys(("p_len", "len_cls", "len_img"), (1, 4096)),
    **dict.fromkeys(("pool_cls", "pool_img", "k_cls", "k_img"), (0, 4096)),
}
"""Settings that are integers, and their ranges."""
FLAGS = ("tdvp", "advp", "iprompt", "simam")
RATES = ("lr", "wd", "w")
POOLS = ("pool_cls", "pool_img", "len_cls", "len_img", "k_cls", "k_img")
NEEDED = ("prompt_transform", "seed", "n_classes", "batch", "steps", "lr", "wd")
SCHEDULE = ("epochs", "steps_per_epoch", "base_lr")


def load_golden(path: Path) -> dict[str, np.ndarray]:
    """Read a golden file.

    Raises:
        ValueError: it is not a golden file; the message says why.
    """
    golden = _read_arrays(path)
    for name, field in golden.items():
        numeric = field.dtype.kind in NUMBERS or name == "case/prompt_transform"
        require(numeric, name, f"an array of {field.dtype}", "numbers", DAMAGED)
        if name.startswith("case/") or name in SCHEDULE:
            require(field.size == 1, name, f"shape {list(field.shape)}", "one value", DAMAGED)
    if "lr" in golden:
        _check_schedule(golden)
    elif "case/seed" in golden:
        _check_case(case_of(golden))
    else:
        raise ValueError("no case/* fields, expected a golden file; see tests/golden")
    return golden


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an archive of arrays, nothing else."""
    if path.is_dir():
        raise ValueError("is a folder, expected a golden .npz file; name the files in it")
    try:
        with path.open("rb") as stream:
            archive = zipfile.is_zipfile(stream)
            stream.seek(0)
            if archive:
                with np.load(stream, allow_pickle=False) as file:
                    return {name: _read_array(file, name) for name in file.files}
    except FileNotFoundError:
        raise ValueError("no such file; golden files are in tests/golden") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from None
    except zipfile.BadZipFile:
        pass
    raise ValueError("cannot be read as .npz, it is cut or another kind of file; see tests/golden")


def _read_array(file: Any, name: str) -> np.ndarray:
    try:
        field = file[name]
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        # numpy's own advice, to allow pickles, would run whatever the file contains.
        field = None
    if not isinstance(field, np.ndarray):
        raise ValueError(f"{name}: is no plain array of numbers; {DAMAGED}")
    return field


def _check_case(case: Mapping[str, Any]) -> None:
    """Check the settings of a case, so that none of them fails in the middle of a run."""
    needed = NEEDED if "p_len" in case else (*NEEDED, *FLAGS, *POOLS, "w")
    missing = [f"case/{name}" for name in needed if name not in case]
    if missing:
        raise ValueError(f"no field {', '.join(missing)}; {DAMAGED}")
    for name, value in case.items():
        if name in COUNTS:
            require_int(f"case/{name}", value, *COUNTS[name])
        elif name in RATES:
            require_number(f"case/{name}", value, 0.0)
        elif name in FLAGS:
            require_bool(f"case/{name}", value)
    require_choice("case/prompt_transform", case["prompt_transform"], ("fourier", "identity"))


def _check_schedule(golden: Mapping[str, np.ndarray]) -> None:
    """Check the fields of a learning-rate schedule."""
    missing = [name for name in SCHEDULE if name not in golden]
    if missing:
        raise ValueError(f"no field {', '.join(missing)}; {DAMAGED}")
    epochs, steps, base_lr = (golden[name].item() for name in SCHEDULE)
    require_int("epochs", epochs, 1)
    require_int("steps_per_epoch", steps, 1)
    require_number("base_lr", base_lr, 0.0)
    shape, expected = golden["lr"].shape, (epochs * steps,)
    require(
        shape == expected, "lr", f"shape {list(shape)}", f"{list(expected)}, its steps", DAMAGED
    )


def _device_of(name: str, impl: Impl, dtype: torch.dtype) -> tuple[torch.device, str]:
    """Return the device, and what will compute there.

    Raises:
        UsageError: it cannot be used.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        chosen, reason = choose_impl(impl, device, dtype=dtype)
        if chosen == "triton" and dtype == torch.float64:
            raise RuntimeError("the kernels compute in float32 at most; pass --dtype float32")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = str(error).strip().splitlines()[0]
        raise UsageError(f"--impl {impl} --device {name}: {message}") from None
    return device, f"{chosen}: {reason}"


@command("python -m tcpa.verify")
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
    device, what = _device_of(options.device, options.impl, dtype)
    print(f"{options.dtype} on {device}, {what}", file=sys.stderr)
    status = 0
    for path in options.files:
        try:
            golden = load_golden(path)
            errors = check(golden, dtype=dtype, savings=savings, impl=options.impl, device=device)
        except (ValueError, TypeError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            status = 2
            continue
        passed = all(error <= TOLERANCE[options.dtype] for error in errors.values())
        fields = "  ".join(f"{name} {error:.0e}" for name, error in errors.items())
        print(f"{'ok  ' if passed else 'FAIL'} {path.name}: {fields}", flush=True)
        if float("inf") in errors.values():
            print(f"{path}: inf: missing, of another shape, or NaN on one side", file=sys.stderr)
        status = status or int(not passed)
    return status


if __name__ == "__main__":
    sys.exit(main())
