"""Command line of the measurements: `tcpa-bench COMMAND` or `python -m tcpa.bench COMMAND`."""

import importlib
import sys

COMMANDS = {
    "static": "compile the kernels offline; registers, spills, memory, lower bounds of the time",
    "step": "one training step, the official algorithm against this library",
    "tune": "measure launches of the kernels on this GPU and write the launch table",
}
"""Commands and what they do; each is the module of its name, with `main(argv) -> exit status`."""


def usage() -> str:
    """Return the help text."""
    rows = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: tcpa-bench COMMAND [options]", "", "commands:", *rows])


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"tcpa-bench: unknown command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(f"tcpa.bench.{command}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
