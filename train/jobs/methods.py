"""`tcpa-train methods`: one line a method, and what each comes from."""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

import tcpa

from ...cli import require
from ..data.splits import NAMES
from ..options.methods import MethodsConfig
from ..recipes.recipe import Recipe, recipe
from ..recipes.rows import METHODS
from ..report.paper import ROWS
from .method_costs import MethodCost, method_cost
from .search import published

OWN_TESTS = "tests of its formulas, sizes and initial values alone"
"""Verification of a method whose row names no other."""

GIGA = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One method with everything that is told of it."""

    name: str
    recipe: Recipe
    cost: MethodCost

    @property
    def on_image(self) -> str:
        """What is done to the image."""
        config = self.recipe.input_prompt
        if isinstance(config, tcpa.DAMVPConfig):
            return f"dam-vp, {config.num_clusters} frames"
        own = isinstance(self.recipe.prompts, tcpa.TCPAConfig) and self.recipe.prompts.image_prompt
        return "convolutions" if own and config is None else self.recipe.input_name

    @property
    def tokens(self) -> str:
        """Which tokens are prompts."""
        config = self.recipe.prompts
        if isinstance(config, tcpa.TCPAConfig):
            kind = "Fourier " if config.prompt_transform == "fourier" else ""
            entries = f"{config.cls_pool_size} + {config.image_pool_size}"
            return f"{kind}TCPA {entries}, top {config.cls_top_k}, {config.image_top_k}"
        if isinstance(config, tcpa.VPTConfig):
            kind = "Fourier " if config.fourier_fraction else ""
            return f"{kind}{config.length} {'a block' if config.deep else 'at the first block'}"
        if isinstance(config, tcpa.E2VPTConfig):
            return f"{config.length} a block, {config.kv_length} as keys and values"
        if isinstance(config, tcpa.GatedPromptConfig):
            return f"{config.length} with gates"
        return "none"

    @property
    def optimizer(self) -> str:
        """Optimiser with its peak rate at the recipe's batch size, and weight decay."""
        made = self.recipe
        rates = f"rate {made.peak_rate:g}, decay {made.weight_decay:g}"
        return f"{made.optimizer}, {rates}, batch {made.batch_size}, {made.epochs} epochs"

    @property
    def grid(self) -> str:
        """What `search` tries: rates, decays, and who published them; "" for nothing."""
        rates, decays, source = published(self.recipe)
        return f"{len(rates)} rates x {len(decays)} decays, {source}" if rates else ""

    @property
    def verified(self) -> str:
        """Against what the implementation was compared."""
        return METHODS[self.name].verified or OWN_TESTS


COLUMNS: tuple[str, ...] = (
    "method", "name", "table_row", "on_image", "tokens", "tuning", "trained_values", "head_values",
    "trained_parts", "gflop_evaluation", "gflop_training", "optimizer", "grid", "source",
    "verified", "note",
)  # fmt: skip


def listed(config: MethodsConfig) -> list[Listed]:
    """Return all methods on a dataset, in the order of the tables.

    Raises:
        UsageError: the dataset is unknown, or a backbone does not fit.
    """
    known = config.dataset in NAMES
    require(known, "--dataset", repr(config.dataset), ", ".join(NAMES), "choose one of these")
    found = []
    for name in METHODS:
        made = recipe(config.dataset, name)
        cost = method_cost(made, config.backbone, config.classes, config.image_size)
        found.append(Listed(name=name, recipe=made, cost=cost))
    return found


def as_rows(found: Sequence[Listed]) -> list[dict[str, str]]:
    """Return everything as text, column by column."""
    return [
        dict(
            zip(
                COLUMNS,
                (
                    line.name,
                    METHODS[line.name].label,
                    ROWS.get(line.name, ""),
                    line.on_image,
                    line.tokens,
                    line.recipe.tuning_name,
                    str(line.cost.total),
                    str(line.cost.trained.get("head", 0)),
                    "; ".join(f"{part} {count}" for part, count in line.cost.trained.items()),
                    f"{line.cost.evaluation / GIGA:.3f}",
                    f"{line.cost.training / GIGA:.3f}",
                    line.optimizer,
                    line.grid,
                    line.recipe.source,
                    line.verified,
                    line.recipe.note,
                ),
                strict=True,
            )
        )
        for line in found
    ]


def print_methods(config: MethodsConfig) -> None:
    """Carry out `tcpa-train methods`."""
    found = listed(config)
    if config.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(as_rows(found))
        print(text.getvalue(), end="")
        return
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(_table(config, found))
    console.print(
        "GFLOP an image of evaluation and of training (forward and backward), products and "
        "convolutions, a multiply-add as two. *: not in Table 1 of the paper.",
        soft_wrap=True,
    )
    for line in found:
        console.print(f"\n{line.name}", style="bold", markup=False)
        told = {"source": line.recipe.source, "trained by": line.optimizer,
                "verified": line.verified, "note": line.recipe.note}  # fmt: skip
        if line.grid:
            told["trained by"] += f"; search tries {line.grid}"
        for word, text in told.items():
            if text:
                console.print(f"  {word}: {text}", soft_wrap=True, markup=False)


def _table(config: MethodsConfig, found: Sequence[Listed]) -> Table:
    where = f"{config.backbone}, {config.classes} classes"
    shown = Table(title=f"Methods on {config.dataset}, {where}")
    for name in ("method", "on the image", "prompt tokens", "tuning"):
        shown.add_column(name, overflow="fold")
    for name in ("trained", "of them head", "GFLOP", "training"):
        shown.add_column(name, justify="right")
    for line in found:
        cost = line.cost
        shown.add_row(
            line.name + ("" if line.name in ROWS else "*"),
            line.on_image,
            line.tokens,
            line.recipe.tuning_name,
            f"{cost.total:,}",
            f"{cost.trained.get('head', 0):,}",
            f"{cost.evaluation / GIGA:.2f}",
            f"{cost.training / GIGA:.2f}",
        )
    return shown
