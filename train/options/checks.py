"""Checks of the values of options: what came, what is expected, what to do."""

import math
from collections.abc import Collection

from ...checks import did_you_mean
from ...cli import UsageError, require

MAX_SEED = 2**63 - 1
"""The largest seed that torch takes."""

NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Name -> mean and standard deviation of the three channels, for pixels from 0 to 1."""


def parse_normalization(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation by name or from six numbers.

    Raises:
        UsageError: it is neither.
    """
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    usable = len(values) == 6 and all(map(math.isfinite, values)) and min(values[3:]) > 0
    if not usable:
        hint = did_you_mean(text, NORMALIZATIONS, "0.5,0.5,0.5,0.5,0.5,0.5 for instance")
        raise UsageError(
            f"--normalize: got {text!r}, expected imagenet, half, none or six numbers with "
            f"positive deviations; {hint}"
        )
    return values[:3], values[3:]


def require_range(name: str, value: float | None, low: float, high: float) -> None:
    """Check `low <= value < high`; None stands for the recipe's value."""
    option = "--" + name.replace("_", "-")
    bound = f"{low} or more" + (f" and less than {high}" if high != math.inf else "")
    usable = value is None or low <= value < high
    require(usable, option, value, bound, "leave it out for the default")


def require_name(option: str, value: str) -> None:
    """Refuse what would be no name of a folder in the output."""
    usable = value and not set(value) & set("/\\\0") and not value.startswith(".")
    require(bool(usable), option, repr(value), "a name without slashes", "change it")


def require_known(
    option: str, value: str, known: Collection[str], otherwise: str = "choose one of these"
) -> None:
    """Raise UsageError unless a value is one of a few words; suggests the nearest one."""
    hint = did_you_mean(value, known, otherwise)
    require(value in known, option, repr(value), ", ".join(known), hint)


def require_different(option: str, values: tuple) -> None:
    """Raise UsageError unless there are values, each once."""
    shown = ", ".join(map(str, values)) or "no value"
    usable = 0 < len(values) == len(set(values))
    require(usable, option, shown, "one or more different values", "change them")


def require_gpus(gpus: tuple[int, ...] | None) -> None:
    """Raise UsageError unless these can be numbers of GPUs."""
    if gpus is not None:
        require_different("--gpus", gpus)
        negative = [gpu for gpu in gpus if gpu < 0]
        require(not negative, "--gpus", negative, "numbers of GPUs from 0", "change them")


def require_seed(option: str, seed: int) -> None:
    """Raise UsageError unless torch takes a seed."""
    expected = "an integer from 0 to 2**63 - 1"
    require(0 <= seed <= MAX_SEED, option, seed, expected, "choose another")
