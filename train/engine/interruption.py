"""Ending when asked to: SIGINT (Ctrl-C), SIGTERM and SIGHUP, deferred or raised.

A run defers the first signal and ends once its step is done and saved; the second ends it at once.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Interrupted(KeyboardInterrupt):
    """Somebody asked this process to end; the text says what is saved, "" where another says it.

    Attributes:
        number: of the signal.
        status: exit status, as shells give it.
    """

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text)
        self.number, self.status = number, 128 + number


class Requests:
    """What this process was asked."""

    received: int = 0
    """Number of the first signal; 0 for none."""


@contextmanager
def defer_signals() -> Iterator[Requests]:
    """Note the first signal for later; the next one has its usual effect."""
    requests = Requests()

    def note(number: int) -> None:
        requests.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for other in SIGNALS[1:]:
            signal.signal(other, signal.SIG_DFL)

    with _handled(note):
        yield requests


@contextmanager
def raise_on_signal(text: str = "") -> Iterator[None]:
    """Raise Interrupted, with a text, for every signal, wherever the main thread is."""

    def interrupt(number: int) -> None:
        raise Interrupted(number, text)

    with _handled(interrupt):
        yield


@contextmanager
def _handled(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` for signals that are not ignored; in other threads nothing can be handled."""

    def handle(number: int, _: FrameType | None) -> None:
        act(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
