"""`tcpa-train methods`: one line a method, and what each comes from."""

import csv
import io
import sys

from rich.console import Console
from rich.table import Table

from ..data.splits import NAMES
from ..options.checks import require_known
from ..options.methods import MethodsConfig
from ..recipes.recipe import recipe
from ..recipes.rows import METHODS
from ..report.paper import ROWS
from .method_costs import method_cost
from .search import published

OWN_TESTS = "tests of its formulas, sizes and initial values alone"
"""Verification of a method whose row names no other."""

GIGA = 10**9

COLUMNS: tuple[str, ...] = (
    "method", "name", "table_row", "on_image", "tokens", "tuning", "trained_values", "head_values",
    "trained_parts", "gflop_evaluation", "gflop_training", "optimizer", "grid", "source",
    "verified", "note",
)  # fmt: skip


def listed(config: MethodsConfig) -> list[dict[str, str]]:
    """Return everything that is told of all methods on a dataset, in the order of the tables.

    Raises:
        UsageError: the dataset is unknown, or a backbone does not fit.
    """
    require_known("--dataset", config.dataset, NAMES)
    return [_row(config, name) for name in METHODS]


def _row(config: MethodsConfig, name: str) -> dict[str, str]:
    made, row = recipe(config.dataset, name), METHODS[name]
    cost = method_cost(made, config.backbone, config.classes, config.image_size)
    prompts, on_image = made.prompts, made.input_prompt
    besides = None if prompts is None else prompts.on_image()
    rates, decays, source = published(made)
    optimizer = f"{made.optimizer}, rate {made.peak_rate:g}, decay {made.weight_decay:g}"
    cells = (
        name,
        row.label,
        ROWS.get(name, ""),
        on_image.describe() if on_image is not None else besides or made.input_name,
        "none" if prompts is None else prompts.describe(),
        made.tuning_name,
        str(cost.total),
        str(cost.trained.get("head", 0)),
        "; ".join(f"{part} {count}" for part, count in cost.trained.items()),
        f"{cost.evaluation / GIGA:.3f}",
        f"{cost.training / GIGA:.3f}",
        f"{optimizer}, batch {made.batch_size}, {made.epochs} epochs",
        f"{len(rates)} rates x {len(decays)} decays, {source}" if rates else "",
        made.source,
        row.verified or OWN_TESTS,
        made.note,
    )
    return dict(zip(COLUMNS, cells, strict=True))


def print_methods(config: MethodsConfig) -> None:
    """Carry out `tcpa-train methods`."""
    found = listed(config)
    if config.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
        print(text.getvalue(), end="")
        return
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(_table(config, found))
    console.print(
        "GFLOP an image of evaluation and of training (forward and backward), products and "
        "convolutions, a multiply-add as two. *: not in Table 1 of the paper.",
        soft_wrap=True,
    )
    for row in found:
        console.print(f"\n{row['method']}", style="bold", markup=False)
        search = f"; search tries {row['grid']}" if row["grid"] else ""
        told = {"source": row["source"], "trained by": row["optimizer"] + search,
                "verified": row["verified"], "note": row["note"]}  # fmt: skip
        for word, text in told.items():
            if text:
                console.print(f"  {word}: {text}", soft_wrap=True, markup=False)


def _table(config: MethodsConfig, found: list[dict[str, str]]) -> Table:
    where = f"{config.backbone}, {config.classes} classes"
    shown = Table(title=f"Methods on {config.dataset}, {where}")
    for name in ("method", "on the image", "prompt tokens", "tuning"):
        shown.add_column(name, overflow="fold")
    for name in ("trained", "of them head", "GFLOP", "training"):
        shown.add_column(name, justify="right")
    for row in found:
        shown.add_row(
            row["method"] + ("" if row["table_row"] else "*"),
            row["on_image"],
            row["tokens"],
            row["tuning"],
            f"{int(row['trained_values']):,}",
            f"{int(row['head_values']):,}",
            f"{float(row['gflop_evaluation']):.2f}",
            f"{float(row['gflop_training']):.2f}",
        )
    return shown
