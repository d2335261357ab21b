"""A picture of a study: validation accuracies as a heat map."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from tcpa.inspect.style import panel, styled

from .studies import Study
from .tables import SettingSummary, mean, spread

COLOURS = "cividis"
MISSING = "#e0e0e0"


@styled
def draw_study(
    study: Study, found: Sequence[SettingSummary], seeds: Sequence[int], title: str
) -> Figure:
    """Draw a grid of means, or for one thing that is varied every seed beside the mean.

    Args:
        study: what was varied.
        found: its settings, in order.
        seeds: what was asked for; runs that are missing stay grey.
        title: second line of the title: what was trained on what.
    """
    rows = list(dict.fromkeys(one.setting.row for one in found))
    if study.is_grid:
        columns = list(dict.fromkeys(one.setting.column for one in found))
        places = {(one.setting.row, one.setting.column): one for one in found}
        cells = [[places[row, column].validation for column in columns] for row in rows]
        axis, what = study.columns, f"mean of {len(seeds)} seeds"
    else:
        columns = [*(f"seed {seed}" for seed in seeds), "mean"]
        cells = [
            [*([one.runs[s].validation] if s in one.runs else [] for s in seeds), one.validation]
            for one in found
        ]
        axis, what = "", f"{len(seeds)} seeds and their mean"
    return _draw(study, rows, columns, cells, axis, f"{study.title}\n{title}; {what}")


def _draw(
    study: Study,
    rows: list[str],
    columns: list[str],
    cells: list[list[list[float]]],
    axis: str,
    title: str,
) -> Figure:
    means = [[mean(values) for values in line] for line in cells]
    values = np.array([[np.nan if m is None else m for m in line] for line in means])
    longest = max(map(len, rows))
    size = (1.05 * len(columns) + 0.09 * longest + 2.8, 0.55 * len(rows) + 1.9)
    figure, axes = panel((max(size[0], 0.075 * max(map(len, title.split("\n")))), size[1]))
    shades = colormaps[COLOURS].with_extremes(bad=MISSING)
    shown = axes.imshow(np.ma.masked_invalid(values), cmap=shades, aspect="auto")
    middle = sum(shown.get_clim()) / 2
    for (row, column), value in np.ndenumerate(values):
        missing = np.isnan(value)
        colour = "black" if missing or value > middle else "white"
        text = "not\nfinished" if missing else _text(cells[row][column])
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=axis, ylabel=study.rows)
    axes.set_title(title, fontsize=10)
    if np.isfinite(values).any():
        figure.colorbar(shown, ax=axes).set_label("validation accuracy, %")
    return figure


def _text(values: list[float]) -> str:
    deviation = spread(values)
    text = f"{mean(values):.1f}"
    return text if deviation is None else f"{text}\n± {deviation:.1f}"
