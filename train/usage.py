"""Mistakes in what the user asked for: reported in one sentence, without a traceback."""


class UsageError(Exception):
    """An argument cannot be used; the program ends with the message and exit status 2.

    Not a ValueError: the command line parser would catch that and lay out its own message.
    """


def require(condition: bool, name: str, got: object, expected: str, remedy: str) -> None:
    """Raise UsageError, with the argument's name, what came and what to do, unless all is well."""
    if not condition:
        raise UsageError(f"{name}: got {got}, expected {expected}; {remedy}")
