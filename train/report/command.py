"""`tcpa-train report`: from folders of runs to a page, Markdown and CSV."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as Grid

from ...cli import UsageError
from ..config import ReportConfig
from ..files import replace_file
from .groups import Group, Setting, group_runs, names_of, setting_of
from .page import Content, html_page, markdown
from .runs import Problem, Run, read_runs
from .tables import NONE, Table, details, table1_csv, times, to_csv
from .vtab import details_vtab, table2_csv, tasks_csv


def report(config: ReportConfig) -> None:
    """Carry out `tcpa-train report`.

    Raises:
        UsageError: there are no runs, or the report cannot be written.
    """
    from .figures import draw

    runs, problems = read_runs(config.folders)
    groups, repeated = group_runs(runs)
    # A run that was killed before its first step has no setting yet.
    begun = [run for run in runs if run.starts]
    names = _names(groups, begun)
    content = Content(
        groups=groups, names=names, problems=[*problems, *repeated], curves=draw(begun, names)
    )
    timing = times(groups, names)
    texts = {
        "report.html": html_page(content),
        "report.md": markdown(content),
        "table1.csv": table1_csv(groups),
        "table2.csv": table2_csv(groups),
        "vtab.csv": tasks_csv(groups),
        "times.csv": to_csv(timing.header, timing.rows),
    }
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            replace_file(config.output / name, text.encode())
    except OSError as error:
        raise UsageError(
            f"--output: got {config.output}, expected a folder that can be written "
            f"({error.strerror}); make room or choose another"
        ) from None
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    _print(console, groups, names, content.problems)
    console.print(f"{content.counted.partition(' (')[0]}; {config.output / 'report.html'}")


def print_runs(runs: Sequence[Run], problems: Sequence[Problem], console: Console) -> None:
    """Print finished runs beside the published values, and the runs that do not count."""
    groups, repeated = group_runs(runs)
    _print(console, groups, _names(groups, []), [*problems, *repeated])


def _names(groups: Sequence[Group], runs: Sequence[Run]) -> dict[Setting, str]:
    settings = [group.setting for group in groups] + [setting_of(run) for run in runs]
    return names_of(list(dict.fromkeys(settings)))


def _print(
    console: Console,
    groups: Sequence[Group],
    names: dict[Setting, str],
    problems: Sequence[Problem],
) -> None:
    for shown in [*details(groups, names), *details_vtab(groups, names)]:
        console.print(f"\n{shown.title}", soft_wrap=True, markup=False, style="bold")
        console.print(_grid(shown))
        for note in shown.notes:
            console.print(f"  {note}", soft_wrap=True, markup=False)
    for problem in problems:
        console.print(
            f"not counted: {problem.folder}: {problem.text}", soft_wrap=True, markup=False
        )


def _grid(shown: Table) -> Grid:
    grid = Grid()
    for place, name in enumerate(shown.header):
        grid.add_column(name, justify="left" if place < shown.text_columns else "right")
    for row in shown.rows:
        grid.add_row(*(cell or NONE for cell in row))
    return grid
