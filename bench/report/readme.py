"""Tables for a README, generated in place: between `<!-- bench:NAME -->` and `<!-- /bench -->`.

NAME chooses the rows: words with slashes between them, each equal to a row's command, operation,
shape, dtype, mode, provider, metric or device, and `|` between alternatives, such as
`step/time|peak memory` or `ops/b16-224-p36-b128/bf16/time`. The name `targets` stands for the table
of `bench/targets.py`.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ...cli import UsageError, require, write_results
from ...train.report.tables import TextTable, to_markdown
from ..harness.results import Row
from ..targets import targets_table
from .data import field_of, table, tables

TARGETS_TABLE = "targets"
CHOSEN_BY = ("command", "operation", "shape", "dtype", "mode", "provider", "metric", "device")
_MARKED = re.compile(r"(<!-- bench:(.+?) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


def choose(rows: Sequence[Row], name: str) -> list[Row]:
    """Return the rows that a marker names."""
    words = [set(word.split("|")) for word in name.split("/")]
    return [row for row in rows if all(word & _values(row) for word in words)]


def _values(row: Row) -> set[str]:
    return {field_of(row, name) for name in CHOSEN_BY}


def markdown(shown: TextTable) -> str:
    """Return a table in Markdown, its conditions below."""
    return f"{to_markdown(shown)}\n{''.join(shown.notes)}\n"


def all_tables(rows: Sequence[Row]) -> str:
    """Return every table with its title."""
    return "\n".join(f"### {shown.title}\n\n{markdown(shown)}" for shown in tables(rows))


def update(path: Path, rows: Sequence[Row], option: str = "--markdown") -> tuple[int, list[str]]:
    """Put the tables between the markers of a file.

    Returns:
        How many tables were written, and the names of markers without rows, which stay as they are.

    Raises:
        UsageError: the file cannot be read or written, or has no markers that rows belong to.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option}: {path} cannot be read ({error}); check the path") from None
    written, empty = [], []
    open_names = [found[2] for found in _MARKED.finditer(text) if "<!-- bench:" in found[3]]
    require(not open_names, option, f"bench:{''.join(open_names[:1])} without an end in {path}",
            "<!-- /bench --> after every table", "add it")  # fmt: skip

    def fill(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        if name == TARGETS_TABLE:
            written.append(name)
            return f"{begin}\n{markdown(targets_table(rows))}\n{end}"
        chosen = choose(rows, name)
        (written if chosen else empty).append(name)
        return f"{begin}\n{markdown(table(chosen))}\n{end}" if chosen else found[0]

    filled = _MARKED.sub(fill, text)
    if not written:
        without = f"markers without rows: {', '.join(empty)}" if empty else "no markers"
        raise UsageError(
            f"{option}: got {path} with {without}, expected <!-- bench:NAME --> and "
            "<!-- /bench --> on lines of their own, NAME such as `step` or "
            "`ops/b16-224-p36-b128`; put them where the table belongs"
        )
    if filled != text:
        write_results(path, filled, option)
    return len(written), empty
