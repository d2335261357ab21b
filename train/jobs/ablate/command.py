"""`tcpa-train ablate RECIPE`: trains what is missing, then writes a table and a picture a study."""

import os
import shlex
import sys
from dataclasses import replace

from rich.console import Console

from tcpa.inspect.style import to_png

from ....cli import UsageError, choose_device, output_folder, require
from ...demo.session import provenance
from ...engine.data import Splits
from ...options.ablate import AblateConfig
from ...report.tables import to_grid
from ...storage import write_whole
from ..scheduler import arguments
from .figures import draw_study
from .runs import Runs, base_prompts, train
from .studies import Study, make_studies, only, shown_name
from .tables import SettingSummary, conclusions, csv_text, markdown, notes, summarise, table_of

PROGRAM = (sys.executable, "-m", "tcpa.train", "ablate")


def ablate(config: AblateConfig, splits: Splits | None = None) -> dict[str, list[SettingSummary]]:
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
    studies = make_studies(config, base_prompts(config))
    settings = only(studies, config.cells)
    if config.print_jobs:
        for name in settings:
            for seed in config.seeds:
                one = replace(config, cells=(shown_name(name),), seeds=(seed,), print_jobs=False)
                print(shlex.join([*PROGRAM, *arguments(one)]))
        return {}
    with output_folder(config.output / config.recipe):
        pass
    runs, failures = train(config, settings, splits)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    found = {} if config.cells else _write(config, studies, runs, console)
    if failures:
        total = len(settings) * len(config.seeds)
        raise UsageError(
            f"{len(failures)} of {total} runs failed, the first of them {failures[0]}; run the "
            "same command again to resume them"
        )
    return found


def _write(
    config: AblateConfig, studies: list[Study], runs: Runs, console: Console
) -> dict[str, list[SettingSummary]]:
    shared = notes(config, provenance(choose_device(config.device)))
    title = f"{config.recipe}, {config.base_method}, protocol {config.protocol}"
    found: dict[str, list[SettingSummary]] = {}
    for study in studies:
        summaries = found[study.name] = summarise(study.settings, config.seeds, runs)
        lines = conclusions(study, summaries, len(config.seeds))
        picture = to_png(draw_study(study, summaries, config.seeds, title))
        target = config.output / config.recipe / study.name
        write_whole(
            target.with_suffix(".md"), markdown(study, summaries, [*lines, *shared]).encode()
        )
        write_whole(target.with_suffix(".csv"), csv_text(config, study, summaries).encode())
        write_whole(target.with_suffix(".png"), picture)
        console.print(to_grid(table_of(study, summaries), study.title))
        for line in lines:
            console.print(f"- {line}")
    for line in shared:
        console.print(f"- {line}")
    where, names = config.output / config.recipe, ", ".join(study.name for study in studies)
    console.print(f"{where} holds .md, .csv and .png of {names}.", soft_wrap=True)
    return found
