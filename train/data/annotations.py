"""Files that describe a dataset: text, JSON, MATLAB, pickled arrays; nothing in them is run."""

import codecs
import json
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...cli import UsageError

ADVICE = "run `tcpa-train data prepare` for this dataset, or unpack its archive again"


def unusable(path: Path, got: str, expected: str, advice: str = ADVICE) -> UsageError:
    """Return the one error for a file of a dataset that is not as it should be."""
    return UsageError(f"{path}: got {got}, expected {expected}; {advice}")


def require_file(path: Path, expected: str) -> None:
    """Raise UsageError unless a file is there."""
    if not path.is_file():
        raise unusable(path, "no such file", expected)


def require_folder(path: Path, expected: str, advice: str = ADVICE) -> None:
    """Raise UsageError unless a folder is there."""
    if not path.is_dir():
        raise unusable(path, "no such folder", expected, advice)


def read_lines(path: Path, expected: str) -> list[str]:
    """Return the lines of a text file that hold anything, without their ends."""
    require_file(path, expected)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unusable(path, f"a file that cannot be read ({error})", expected) from None
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def read_pairs(path: Path, expected: str) -> dict[str, str]:
    """Return first word -> rest of the line."""
    pairs = {}
    for number, line in enumerate(read_lines(path, expected), start=1):
        first, _, rest = line.strip().partition(" ")
        if not rest.strip():
            raise unusable(path, f"line {number}: {line!r}", f"{expected}, two words a line")
        pairs[first] = rest.strip()
    return pairs


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """Return a JSON object in the order of the file."""
    require_file(path, expected)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(path, f"a file that is not JSON ({error})", expected) from None
    if not isinstance(found, dict):
        raise unusable(path, f"a JSON {type(found).__name__}", expected)
    return found


def read_mat(path: Path, *names: str) -> list[np.ndarray]:
    """Return variables of a MATLAB file, format 4 or 5; nothing in it is executed."""
    expected = f"a MATLAB file with {' and '.join(names)}"
    require_file(path, expected)
    from scipy.io import loadmat

    try:
        found = loadmat(path, variable_names=names)
    except Exception as error:
        # scipy raises whatever its parser trips over: TypeError, KeyError, zlib.error, ...
        raise unusable(path, f"a file that cannot be read ({error})", expected) from None
    missing = [name for name in names if name not in found]
    if missing:
        raise unusable(path, f"no variable {missing[0]!r}", expected)
    return [found[name] for name in names]


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Rebuild bytes, as protocol 2 writes them; no other codec is let through."""
    if codecs.lookup(encoding).name != "iso8859-1":
        raise pickle.UnpicklingError(f"it wants the codec {encoding}")
    return text.encode("latin1")


class _DataUnpickler(pickle.Unpickler):
    """Knows numpy arrays of numbers and nothing else, so that a pickle cannot call anything."""

    _KNOWN: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode_latin1,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        wanted = module_name.replace("numpy._core", "numpy.core"), global_name
        if wanted not in self._KNOWN:
            raise pickle.UnpicklingError(f"it wants to call {module_name}.{global_name}")
        return self._KNOWN[wanted]


def read_pickled(path: Path, *names: str) -> list[Any]:
    """Return entries of a dictionary that CIFAR's authors pickled, without running any code.

    Raises:
        UsageError: the file is missing, cut off, or wants anything but arrays and plain values.
    """
    expected = f"a CIFAR batch with {' and '.join(names)}"
    require_file(path, expected)
    try:
        with path.open("rb") as stream:
            found = _DataUnpickler(stream, encoding="latin1").load()
    except Exception as error:
        # A damaged pickle raises anything; what it could have called was refused above.
        raise unusable(path, f"a file that cannot be read safely ({error})", expected) from None
    if not isinstance(found, dict):
        raise unusable(path, f"a pickled {type(found).__name__}", expected)
    missing = [name for name in names if name not in found]
    if missing:
        raise unusable(path, f"no entry {missing[0]!r}", expected)
    return [found[name] for name in names]
