"""Argument checks shared by the public entries: every message names argument, value and remedy."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, name: str, got: object, expected: str, remedy: str) -> None:
    """Raise ValueError with the house's message unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}: got {got}, expected {expected}; {remedy}")


def require_tensor(name: str, value: object, layout: str, *ndims: int) -> Tensor:
    """Check that `value` is a floating-point tensor of one of the given ranks and return it."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: got {type(value).__name__}, expected a torch.Tensor {layout}; "
            "convert it with torch.as_tensor"
        )
    require(value.ndim in ndims, name, f"shape {list(value.shape)}", layout, "reshape it")
    dense = value.layout == torch.strided
    require(dense, name, value.layout, "a dense tensor", "convert it with .to_dense()")
    if value.dtype not in FLOAT_DTYPES:
        supported = "float16, bfloat16, float32 or float64"
        raise TypeError(f"{name}: got {value.dtype}, expected {supported}; convert it with .to()")
    return value


def require_dtype(name: str, value: object, dtype: torch.dtype, layout: str, remedy: str) -> None:
    """Check that `value` is a tensor with at least one axis and of exactly this dtype."""
    expected = f"{dtype} {layout}".removeprefix("torch.")
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected {expected}; {remedy}")
    require(value.ndim >= 1, name, "a tensor without axes", expected, "reshape it")


def require_gate(gate: object, layout: str = "[..., W]") -> None:
    """Check that `gate` is a tensor of gate words."""
    require_dtype("gate", gate, torch.int32, f"gate words {layout}", "make them with pack_gate")


def require_same_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Check that two tensors share a device."""
    got, remedy = f"device {value.device}", f"move {name} with .to({like_name}.device)"
    require(value.device == like.device, name, got, f"{like.device}", remedy)


def require_shape(name: str, value: Tensor, expected: tuple[int, ...], layout: str) -> None:
    """Check an exact shape; `layout` names the axes."""
    got = f"shape {list(value.shape)}"
    require(tuple(value.shape) == expected, name, got, f"{list(expected)} ({layout})", "check it")


def did_you_mean(word: object, choices: Iterable[str], otherwise: str = "") -> str:
    """Return "did you mean 'x'?" with the choice nearest to `word`, or `otherwise`."""
    near = difflib.get_close_matches(str(word), list(choices), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that `value` is one of a few words; suggests the nearest one."""
    if not isinstance(value, str) or value not in choices:
        hint = did_you_mean(value, choices, "choose one of these")
        require(False, name, repr(value), " or ".join(map(repr, choices)), hint)


def require_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Check an integer range; booleans do not count as integers."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an integer; pass a plain int")
    bound = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    require(low <= value and (high is None or value <= high), name, value, bound, "change it")


def require_int_pair(
    name: str, value: Any, low: int, high: tuple[int, int] | tuple[None, None] = (None, None)
) -> None:
    """Check two integers, of the CLS pool and of the image pool."""
    expected = "two integers, of the CLS pool and of the image pool"
    remedy = f"pass a tuple, {name}=(1, 1) for instance"
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name}: got {value!r}, expected {expected}; {remedy}")
    require(len(value) == 2, name, value, expected, remedy)
    for index in range(2):
        require_int(f"{name}[{index}]", value[index], low, high[index])


def require_number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Check a finite number in `[low, high)`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r}, expected a number; pass a plain float")
    bound = f"a finite number >= {low}" + (f" and < {high}" if high != float("inf") else "")
    require(low <= value < high, name, value, bound, "change it")


def require_bool(name: str, value: Any) -> None:
    """Check a flag."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False; pass a bool")


def config_from_dict(cls: type, values: object, where: str) -> Any:
    """Build a config dataclass from parsed JSON: no name unknown, none left to a default.

    Raises:
        ValueError: `values` is no mapping, or its names are not exactly the fields of `cls`.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: got {type(values).__name__}, expected an object; is it ours?")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"{where}: unknown names {unknown}, expected a subset of {sorted(known)}; "
            "it was written by another program or by a newer version of tcpa"
        )
    missing = sorted(known - set(values))
    if missing:
        raise ValueError(
            f"{where}: no {missing}, expected all of {sorted(known)}; restore the file, or save "
            "the adapter again"
        )
    return cls(**values)
