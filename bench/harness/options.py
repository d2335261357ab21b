"""Options that several commands share."""

import argparse
from pathlib import Path

import timm

from ...cli import require
from .case import StepCase


def step_parser(
    command: str, doc: str | None, *, batch: int = StepCase().batch, device: str = "cpu"
) -> argparse.ArgumentParser:
    """Return the parser of a command that runs steps of a model; `batch`, `device`: defaults."""
    summary = (doc or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=f"tcpa-bench {command}", description=summary)
    parser.add_argument("--model", default=StepCase().model, help="timm name of the backbone")
    parser.add_argument("--batch", type=int, default=batch, help="images a step")
    parser.add_argument("--device", default=device, help=f"cpu, cuda, cuda:1, ... ({device})")
    return parser


def add_results(parser: argparse.ArgumentParser) -> None:
    """Add `--results`."""
    parser.add_argument("--results", type=Path, help="file to append the results to, JSON lines")


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, **least: int
) -> argparse.Namespace:
    """Read the command line.

    Args:
        parser: of `step_parser`.
        argv: without the program's name; None: the process's own.
        least: smallest value of each option.

    Raises:
        UsageError: a value is too small, or timm does not know the model.
    """
    options = parser.parse_args(argv)
    for name, low in least.items():
        value = getattr(options, name)
        require(value >= low, f"--{name}", value, f"at least {low}", "raise it")
    known, remedy = timm.is_model(options.model), "timm.list_models() lists them"
    require(known, "--model", repr(options.model), "a timm model", remedy)
    return options
