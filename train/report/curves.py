"""Curves of runs as SVG: training loss and accuracy against epochs, one colour a setting."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tcpa.inspect.style import COLOURS, panel, styled, to_svg

from .groups import Setting, place_of, setting_of
from .runs import Run

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))


@dataclass(frozen=True, slots=True)
class Curves:
    """The figures of one dataset."""

    label: str
    svgs: tuple[str, ...]
    """<svg> elements without any outside reference, in the reader's text colour."""


@styled
def draw(runs: Sequence[Run], names: dict[Setting, str]) -> list[Curves]:
    """Draw the curves of every dataset, a thin line a seed; unfinished runs stop where they are.

    Args:
        runs: those that have begun are drawn.
        names: of their settings, in the order of the legend.
    """
    # Neighbours in the legend differ in both.
    chosen = {
        setting: (COLOURS[place % 7], DASHES[place % len(DASHES)])
        for place, setting in enumerate(names)
    }
    found = []
    for label, shown in _by_label(runs):
        figures = [_loss(shown, chosen, names), *_accuracies(shown, chosen, names)]
        found.append(Curves(label, tuple(map(to_svg, figures))))
    return found


def _by_label(runs: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    drawn = [run for run in runs if run.points("epoch", "loss")]
    for label in sorted({run.recipe["label"] for run in drawn}, key=place_of):
        yield label, [run for run in drawn if run.recipe["label"] == label]


def _loss(runs: Sequence[Run], styles: dict, names: dict[Setting, str]) -> Figure:
    figure, axes = _empty("training loss, nats")
    for run in runs:
        _line(axes, run.points("epoch", "loss"), styles[setting_of(run)])
    return _finish(figure, runs, styles, names)


def _accuracies(runs: Sequence[Run], styles: dict, names: dict[Setting, str]) -> Iterator[Figure]:
    """Draw the splits that were evaluated after every epoch."""
    for split in ("test", "val"):
        shown = [run for run in runs if len(_measured(run, split)) > 1]
        if not shown:
            continue
        figure, axes = _empty(f"{split} accuracy, %")
        for run in shown:
            _line(axes, _measured(run, split), styles[setting_of(run)])
        yield _finish(figure, shown, styles, names)


def _measured(run: Run, split: str) -> list[tuple[int, float]]:
    return run.points("evaluation", "accuracy", split=split)


def _empty(label: str) -> tuple[Figure, Any]:
    figure, axes = panel((4.4, 3.0))
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid()
    return figure, axes


def _line(axes: Any, points: list[tuple[int, float]], style: tuple[str, Any]) -> None:
    colour, dash = style
    epochs, values = zip(*points, strict=True)
    # A single epoch is no line.
    marker = "o" if len(points) == 1 else None
    axes.plot(epochs, values, color=colour, linestyle=dash, linewidth=1.3, alpha=0.9, marker=marker)


def _finish(figure: Figure, runs: Sequence[Run], styles: dict, names: dict[Setting, str]) -> Figure:
    """Put the legend below, in a figure that grows by it."""
    shown = [setting for setting in names if setting in {setting_of(run) for run in runs}]
    (axes,) = figure.axes
    handles = [
        axes.plot([], [], color=styles[s][0], linestyle=styles[s][1], linewidth=1.6)[0]
        for s in shown
    ]
    texts = [textwrap.fill(names[setting], 48) for setting in shown]
    width, height = figure.get_size_inches()
    # Inches of a line of text.
    lines = sum(text.count("\n") + 1 for text in texts)
    figure.set_size_inches(width, height + 0.19 * lines)
    figure.legend(handles, texts, loc="outside lower left", handlelength=3)
    return figure
