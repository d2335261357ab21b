"""Entry of the training program: `python -m tcpa.train` and the console command `tcpa-train`.

A command is a configuration (its fields are the options) and a function that takes it.
"""

import importlib
import sys
import textwrap
from typing import Any

from tcpa.checks import did_you_mean

from ..cli import UsageError, command
from .engine.interruption import Interrupted
from .options.ablate import AblateConfig
from .options.data import PrepareConfig, VerifyConfig
from .options.demo import DemoConfig, PretrainConfig, TuneConfig
from .options.inspect import InspectConfig
from .options.meta_prompt import MetaPromptConfig
from .options.methods import MethodsConfig
from .options.run import RecipesConfig, ReportConfig, RunConfig, SweepConfig
from .options.search import SearchConfig

COMMANDS: dict[str, tuple[type, str, str]] = {
    "run": (RunConfig, ".jobs.run", "run"),
    "sweep": (SweepConfig, ".jobs.sweep", "sweep"),
    "search": (SearchConfig, ".jobs.search", "search"),
    "ablate": (AblateConfig, ".jobs.ablate.command", "ablate"),
    "report": (ReportConfig, ".report.command", "report"),
    "meta-prompt": (MetaPromptConfig, ".jobs.meta_prompt", "train_meta_prompt"),
    "methods": (MethodsConfig, ".jobs.methods", "print_methods"),
    "inspect": (InspectConfig, ".inspect.run", "run_inspect"),
    "recipes": (RecipesConfig, ".recipes.recipe", "print_recipes"),
    "data prepare": (PrepareConfig, ".data.prepare", "run_prepare"),
    "data verify": (VerifyConfig, ".data.verify", "run_verify"),
    "demo": (DemoConfig, ".demo.compare", "run_demo"),
    "tune-demo": (TuneConfig, ".demo.tune", "tune"),
    "pretrain-demo": (PretrainConfig, ".demo.pretrain", "pretrain"),
}
"""Command -> its configuration, and the module and function that carry it out.

The module is imported only when its command runs."""

GROUPS = {name.split()[0] for name in COMMANDS if " " in name}
"""First words of commands that have two."""

EXTRAS = {
    **dict.fromkeys(("tyro", "rich", "filelock", "scipy", "tensorboard", "PIL"), "train"),
    **dict.fromkeys(("torchvision", "huggingface_hub"), "train"),
    **dict.fromkeys(("sklearn", "matplotlib"), "plot"),
}
"""Optional package -> the extra of tcpa that installs it."""


def usage(group: str = "") -> str:
    """Return the help on all commands, or on those of a group such as `data`."""
    lines = [f"usage: tcpa-train {f'{group} '.lstrip()}COMMAND [options]", "", "commands:"]
    for name, (config, _, _) in COMMANDS.items():
        if name.startswith(f"{group} ".lstrip()):
            text = (config.__doc__ or "").partition("\n")[0]
            lines += textwrap.wrap(text, 100, initial_indent=f"  {name:<14} ",
                                   subsequent_indent=" " * 17)  # fmt: skip
    return "\n".join([*lines, "", "tcpa-train COMMAND --help explains its options."])


def parse(words: list[str]) -> tuple[str, Any]:
    """Return the command's name and its configuration; leaves with status 2 on bad options.

    Raises:
        UsageError: there is no such command.
    """
    import tyro

    name = " ".join(words[:2]) if words[0] in GROUPS else words[0]
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        hint = f"; {near}" if near else ""
        group = words[0] if words[0] in GROUPS else ""
        raise UsageError(f"unknown command {name!r}{hint}\n\n{usage(group)}")
    config = tyro.cli(
        COMMANDS[name][0],
        prog=f"tcpa-train {name}",
        args=words[len(name.split()) :],
        config=(tyro.conf.PositionalMetavarFromFieldName,),
    )
    return name, config


@command("tcpa-train")
def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status (2: the request cannot be met, 128 + n: signal n)."""
    words = sys.argv[1:] if arguments is None else arguments
    asked = words[1:] if words and words[0] in GROUPS else words
    if not asked or asked[0] in ("-h", "--help"):
        print(usage("" if asked is words else words[0]))
        return 0 if asked else 2
    try:
        name, config = parse(words)
        _, module, function = COMMANDS[name]
        getattr(importlib.import_module(module, __package__), function)(config)
    except Interrupted as ended:
        if str(ended):
            print(f"tcpa-train: {ended}", file=sys.stderr)
        return ended.status
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
