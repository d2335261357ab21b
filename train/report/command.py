"""`tcpa-train report`: from folders of runs to a page, Markdown and CSV."""

import sys
from collections.abc import Sequence

from rich.console import Console

from ...cli import output_folder
from ..options.run import ReportConfig
from ..storage import replace_file
from .document import RunsReport, html_page, markdown
from .groups import RunGroup, Setting, group_runs, names_of, setting_of
from .runs import Problem, Run, read_runs
from .table1 import table1_csv, times
from .table2 import table2_csv, tasks_csv
from .tables import to_csv, to_grid


def report(config: ReportConfig) -> None:
    """Carry out `tcpa-train report`.

    Raises:
        UsageError: there are no runs, or the report cannot be written.
    """
    from .curves import draw

    runs, problems = read_runs(config.folders)
    groups, repeated = group_runs(runs)
    # A run that was killed before its first step has no setting yet.
    begun = [run for run in runs if run.starts]
    names = _names(groups, begun)
    found = RunsReport(
        groups=groups, names=names, problems=[*problems, *repeated], curves=draw(begun, names)
    )
    timing = times(groups, names)
    texts = {
        "report.html": html_page(found),
        "report.md": markdown(found),
        "table1.csv": table1_csv(groups),
        "table2.csv": table2_csv(groups),
        "vtab.csv": tasks_csv(groups),
        "times.csv": to_csv(timing.header, timing.rows),
    }
    with output_folder(config.output):
        for name, text in texts.items():
            replace_file(config.output / name, text.encode())
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    _print(console, found)
    console.print(f"{found.counted.partition(' (')[0]}; {config.output / 'report.html'}")


def print_runs(runs: Sequence[Run], problems: Sequence[Problem], console: Console) -> None:
    """Print finished runs beside the published values, and the runs that do not count."""
    groups, repeated = group_runs(runs)
    problems = [*problems, *repeated]
    _print(console, RunsReport(groups=groups, names=_names(groups, []), problems=problems))


def _names(groups: Sequence[RunGroup], runs: Sequence[Run]) -> dict[Setting, str]:
    settings = [group.setting for group in groups] + [setting_of(run) for run in runs]
    return names_of(list(dict.fromkeys(settings)))


def _print(console: Console, found: RunsReport) -> None:
    for shown in found.details:
        console.print(f"\n{shown.title}", soft_wrap=True, markup=False, style="bold")
        console.print(to_grid(shown))
        for note in shown.notes:
            console.print(f"  {note}", soft_wrap=True, markup=False)
    for problem in found.problems:
        text = f"not counted: {problem.folder}: {problem.text}"
        console.print(text, soft_wrap=True, markup=False)
