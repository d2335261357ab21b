"""Command line of the measurements: `tcpa-bench COMMAND` or `python -m tcpa.bench COMMAND`."""

import importlib
import sys

from ..cli import UsageError, command

COMMANDS = {
    "ops": "the operations against the official algorithm and compositions of stock kernels",
    "step": "one step of training or evaluation, every way to compute it",
    "epoch": "seconds per epoch with images from disk, from a cache, from the device",
    "converge": "train with the fast attention and with the reference: the same losses?",
    "profile": "one step as a trace, by operator, by kind of kernel, and its memory",
    "static": "compile the kernels offline; registers, spills, shared memory, occupancy",
    "tune": "measure launches of the kernels on this GPU and write the launch table",
    "gpu": "all that needs a GPU, most valuable first, in nine minutes",
    "report": "figures, tables and one HTML page from results files",
    "compare": "two results files: what became slower or faster beyond the noise",
}
"""Commands and what they do; each is the module of its name, with `main(argv) -> exit status`."""


def usage() -> str:
    """Return the help text."""
    rows = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: tcpa-bench COMMAND [options]", "", "commands:", *rows])


@command("tcpa-bench")
def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}\n\n{usage()}")
    try:
        module = importlib.import_module(f"tcpa.bench.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise UsageError(
            f"{name} needs triton, which is not installed; run: pip install triton (Linux)"
        ) from None
    return module.main(rest)


if __name__ == "__main__":
    sys.exit(main())
