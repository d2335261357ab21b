"""Entry of the training program: `python -m tcpa.train` and the console command `tcpa-train`.

A command is a configuration (its fields are the options) and a function that takes it.
"""

import importlib
import sys
from typing import Annotated, Any, Union

from ..cli import UsageError, command
from .demo.config import DemoConfig, PretrainConfig, TuneConfig

COMMANDS: dict[str, tuple[type, str, str]] = {
    "demo": (DemoConfig, ".demo.run", "run_demo"),
    "tune-demo": (TuneConfig, ".demo.tune", "tune"),
    "pretrain-demo": (PretrainConfig, ".demo.pretrain", "pretrain"),
}
"""Command -> its configuration, and the module and function that carry it out.

The module is imported only when its command runs."""

EXTRAS = {"tyro": "train", "rich": "train", "sklearn": "plot", "matplotlib": "plot"}
"""Optional package -> the extra of tcpa that installs it."""


def parse(arguments: list[str] | None) -> tuple[str, Any]:
    """Return the command's name and its configuration; leaves with status 2 on bad syntax."""
    import tyro

    options = tuple(
        Annotated[config, tyro.conf.subcommand(name)] for name, (config, _, _) in COMMANDS.items()
    )
    config = tyro.cli(
        Union[options],  # noqa: UP007 - the members are known only at run time
        prog="tcpa-train",
        description="Train and compare prompts on frozen Vision Transformers.",
        args=arguments,
    )
    name = next(name for name, (kind, _, _) in COMMANDS.items() if type(config) is kind)
    return name, config


@command("tcpa-train")
def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status (2: the request cannot be met)."""
    try:
        name, config = parse(arguments)
        _, module, function = COMMANDS[name]
        getattr(importlib.import_module(module, __package__), function)(config)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise UsageError(
            f"{package} is not installed (extra {EXTRAS[package]!r}); "
            "run: pip install 'tcpa[train,plot]'"
        ) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
