"""`tcpa-train ablate RECIPE`: trains what is missing, then writes a table and a picture a study."""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ....cli import UsageError, choose_device, require
from ...demo.session import provenance
from ...engine.inputs import Splits
from ...options.ablate import DEMO, AblateConfig
from ...storage import cannot_write, write_whole
from . import datasets, digits
from .figures import draw_study, save
from .measured import Runs, Summary, summarise
from .studies import Study, make_studies, only, shown_name
from .tables import cells, conclusions, csv_text, headings, markdown, notes

PROGRAM = (sys.executable, "-m", "tcpa.train", "ablate")


def ablate(config: AblateConfig, splits: Splits | None = None) -> dict[str, list[Summary]]:
    """Carry out all runs that are not finished and write the tables; return them by study.

    Args:
        config: what to vary, on what.
        splits: images to use in place of those that `config.data` holds.

    Raises:
        UsageError: an option cannot be met, or runs failed (the others were carried out).
        Interrupted: somebody asked it to end; what is finished is kept.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    alone = "start it without torchrun; --print-jobs prints a command for every run"
    require(size == "1", "WORLD_SIZE", size, "one process", alone)
    if config.quick:
        config = replace(config, seeds=config.seeds[:1])
    demo = config.recipe == DEMO
    base = digits.base_prompts() if demo else datasets.base_prompts(config)
    studies = make_studies(config, base)
    settings = only(studies, config.cells)
    if config.print_jobs:
        for name in settings:
            for seed in config.seeds:
                print(shlex.join([*PROGRAM, *config.words(cell=shown_name(name), seed=seed)]))
        return {}
    _require_folder(config.output / config.recipe)
    if demo:
        runs, failures = digits.train(config, settings)
    else:
        runs, failures = datasets.train(config, settings, splits)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    found = {} if config.cells else _write(config, studies, runs, console)
    if failures:
        total = len(settings) * len(config.seeds)
        raise UsageError(
            f"{len(failures)} of {total} runs failed, the first of them {failures[0]}; run the "
            "same command again to go on with them"
        )
    return found


def _require_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output: got {folder}, expected a folder that can be written ({error.strerror}); "
            "choose another"
        ) from None


def _write(
    config: AblateConfig, studies: list[Study], runs: Runs, console: Console
) -> dict[str, list[Summary]]:
    seeds = config.seeds
    shared = notes(config, provenance(choose_device(config.device)))
    found: dict[str, list[Summary]] = {}
    for study in studies:
        summaries = found[study.name] = summarise(study.settings, seeds, runs)
        target = config.output / config.recipe / study.name
        try:
            text = markdown(study, summaries, [*conclusions(study, summaries, len(seeds)), *shared])
            write_whole(target.with_suffix(".md"), text.encode())
            write_whole(target.with_suffix(".csv"), csv_text(config, study, summaries).encode())
            title = f"{config.recipe}, {config.base_method}, protocol {config.protocol}"
            save(draw_study(study, summaries, seeds, title), target.with_suffix(".png"))
        except OSError as error:
            raise cannot_write(target, error) from None
        _print(console, study, summaries, conclusions(study, summaries, len(seeds)))
    for line in shared:
        console.print(f"- {line}")
    where, names = config.output / config.recipe, ", ".join(study.name for study in studies)
    console.print(f"{where} holds .md, .csv and .png of {names}.", soft_wrap=True)
    return found


def _print(console: Console, study: Study, found: list[Summary], lines: list[str]) -> None:
    table = Table(title=study.title)
    for index, heading in enumerate(headings(study)):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for one in found:
        table.add_row(*cells(study, one))
    console.print(table)
    for line in lines:
        console.print(f"- {line}")
