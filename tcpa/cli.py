"""What the commands share: one line for a mistake, a quiet end, files that can be written."""

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BROKEN_PIPE = 141
"""Exit status of a program whose reader is gone, as shells give it: 128 + SIGPIPE."""


class UsageError(Exception):
    """An argument cannot be used; the program ends with the message and exit status 2.

    Not a ValueError: the command line parser would catch that and lay out its own message.
    """


def require(condition: bool, name: str, got: object, expected: str, remedy: str) -> None:
    """Raise UsageError, with the argument's name, what came and what to do, unless all is well."""
    if not condition:
        raise UsageError(f"{name}: got {got}, expected {expected}; {remedy}")


def require_writable(path: Path, option: str = "--output") -> None:
    """Refuse, before minutes of work, a file that could not be written after them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = path.exists()
        path.open("ab").close()
        if not known:
            path.unlink()
    except OSError as error:
        raise UsageError(
            f"{option}: got {path}, expected a file that can be written ({error.strerror}); "
            "choose another name"
        ) from None


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Create a folder to write to, and say in one line if it, or a file in it, cannot be written.

    Raises:
        UsageError: so it is.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UsageError(
            f"--output: got {folder}, expected a folder that can be written ({error.strerror}); "
            "make room or choose another"
        ) from None


def choose_device(name: str) -> "torch.device":
    """Return the device that `--device` means; "auto" is a GPU if there is one.

    Raises:
        UsageError: torch cannot use it here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"--device: got {name!r}, expected auto, cpu or a device that torch can use here "
            f"({reason}); leave the option out to use the default"
        ) from None
    return device


def write_results(path: Path, text: str, option: str) -> None:
    """Write what was measured.

    Raises:
        UsageError: that failed, although `require_writable` saw nothing wrong.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{option}: {path} could not be written ({error.strerror}); what was printed above is "
            "all that is kept"
        ) from None


def command(program: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Make `main(argv) -> status` end without a traceback where the cause is not in the program.

    A mistake of the user (UsageError) or too little memory gives one line and status 2, an
    interruption status 130, and a reader that is gone (`| head`) status 141 without a word.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                try:
                    return _guarded(program, main, argv)
                finally:
                    # A pipe that nobody reads shows here at the latest, not after the last line.
                    _flush()
            except (OSError, SystemExit) as error:
                if not _broken_pipe(error):
                    raise
                _discard_output()
                return BROKEN_PIPE

        return run

    return decorate


def _guarded(program: str, main: Callable[..., int], argv: list[str] | None) -> int:
    try:
        return main(argv)
    except UsageError as error:
        message, status = str(error), 2
    except MemoryError as error:
        message, status = f"out of memory ({error}); ask for less", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    # What was printed goes first.
    _flush()
    print(f"{program}: {message}", file=sys.stderr)
    return status


def _flush() -> None:
    """Write what is buffered; a process that was started without output has no stream at all."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _broken_pipe(error: BaseException) -> bool:
    """Tell whether the reader of the output is gone; rich turns that into SystemExit."""
    cause = error.__context__ if isinstance(error, SystemExit) else error
    return isinstance(cause, OSError) and cause.errno == errno.EPIPE


def _discard_output() -> None:
    """Let what is still buffered for a closed pipe go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
