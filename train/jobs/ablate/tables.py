"""The table of a study: Markdown for readers, CSV for programs."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ...options.ablate import DEMO, AblateConfig
from ...report.tables import TextTable, formatted, to_csv, to_markdown
from .runs import AblationResult, Runs
from .studies import Study, StudySetting, shown_name

COLUMNS = ["study", "setting", "row", "column", "protocol", "seed", "seeds", "validation"]
COLUMNS += ["mean_validation", "spread_validation", "test", "mean_test", "spread_test"]
COLUMNS += ["trained_values", "seconds_per_epoch"]

EPOCH_OF = {
    "val": "the epoch that is best on them",
    "tune": "the last epoch",
}


@dataclass(frozen=True, slots=True)
class SettingSummary:
    """A setting over the seeds that are finished."""

    setting: StudySetting
    runs: dict[int, AblationResult]
    """By seed."""

    @property
    def validation(self) -> list[float]:
        """Percent, by seed."""
        return [run.validation for run in self.runs.values()]

    @property
    def test(self) -> list[float]:
        """Percent, by seed; empty where not all of them were tested."""
        found = [run.test for run in self.runs.values() if run.test is not None]
        return found if len(found) == len(self.runs) else []


def summarise(
    settings: Sequence[StudySetting], seeds: Sequence[int], runs: Runs
) -> list[SettingSummary]:
    """Gather the runs of each setting."""
    return [
        SettingSummary(one, {s: runs[one.name, s] for s in seeds if (one.name, s) in runs})
        for one in settings
    ]


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation (n - 1); None of less than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def table_of(study: Study, found: Sequence[SettingSummary]) -> TextTable:
    """Return the table of a study; "-" for what is not known."""
    varied = [study.rows, study.columns] if study.is_grid else [study.rows]
    measures = ["validation, %", "spread", "by seed", "test, %", "spread", "seeds"]
    header = [*varied, *measures, "trainable parameters", "s / epoch"]
    rows = [
        [one.setting.row, *([one.setting.column] if study.is_grid else []), *_cells(one)]
        for one in found
    ]
    return TextTable(title=study.title, header=header, rows=rows)


def _cells(found: SettingSummary) -> list[str]:
    runs = list(found.runs.values())
    return [
        formatted(mean(found.validation), ".1f"),
        formatted(spread(found.validation), ".1f"),
        ", ".join(f"{value:.1f}" for value in found.validation) or "-",
        formatted(mean(found.test), ".1f"),
        formatted(spread(found.test), ".1f"),
        ", ".join(map(str, found.runs)) or "-",
        f"{runs[0].trainable:,}" if runs else "-",
        formatted(min((run.seconds_per_epoch for run in runs), default=None), ".2f"),
    ]


def notes(config: AblateConfig, provenance: str) -> list[str]:
    """Say under the tables what was trained, and on what it was measured."""
    return [
        protocol(config),
        f"RECIPE {config.recipe}, everything else as in {config.base_method}. {provenance}",
        *(["--quick: the figures mean nothing."] if config.quick else []),
    ]


def protocol(config: AblateConfig) -> str:
    """Say on which images settings are compared, and after which epoch."""
    tested = " The test accuracy is that of the same model; nothing was chosen by it."
    tested = tested if config.protocol == "val" else " No test image was read."
    if config.recipe != DEMO:
        epoch = EPOCH_OF[config.protocol]
        return f"Protocol {config.protocol}: accuracy on validation images, after {epoch}.{tested}"
    if config.quick:
        return f"Protocol {config.protocol}: trained on 100 digits, accuracy on 200 others."
    return (
        f"Protocol {config.protocol}: trained on 750 of the 1,000 training images of the digits, "
        "accuracy on the other 250 after the last epoch. Every seed has another fold: compare "
        "seed by seed, as the spread is mostly that of the folds. Rate and decay of VPT, and of "
        "all settings of TCPA, as `tune-demo` chose them for VPT-deep and TCPA on the same folds, "
        f"unless given.{tested}"
    )


def conclusions(study: Study, found: Sequence[SettingSummary], seeds: int) -> list[str]:
    """Say what the validation images show: gains step by step, or the best setting."""
    if study.name == "components":
        pairs = itertools.pairwise(found)
        return [_gain(before, after) for before, after in pairs if before.runs and after.runs]
    finished = [one for one in found if len(one.runs) == seeds]
    if not finished:
        return []
    means = [statistics.fmean(one.validation) for one in finished]
    best = [one.setting for one, value in zip(finished, means, strict=True) if value == max(means)]
    where = [
        f"{study.rows} {one.row}" + (f", {study.columns} {one.column}" if study.is_grid else "")
        for one in best
    ]
    return [
        f"Best mean on validation images: {' and '.join(where)} ({max(means):.1f} %); all settings "
        f"lie within {max(means) - min(means):.1f} points."
    ]


def _gain(before: SettingSummary, after: SettingSummary) -> str:
    """Compare runs of the same seed."""
    gains = [
        run.validation - before.runs[seed].validation
        for seed, run in after.runs.items()
        if seed in before.runs
    ]
    if not gains:
        return f"{after.setting.row} and {before.setting.row} have no seed in common."
    each = ", ".join(f"{gain:+.1f}" for gain in gains)
    return (
        f"{after.setting.row} - {before.setting.row}: {statistics.fmean(gains):+.1f} points on "
        f"validation images (by seed: {each})."
    )


def markdown(study: Study, found: Sequence[SettingSummary], lines: Sequence[str]) -> str:
    """Return title, table and notes."""
    shown = to_markdown(table_of(study, found))
    return "\n".join([f"### {study.title}", "", shown, *(f"- {line}" for line in lines)]) + "\n"


def csv_text(config: AblateConfig, study: Study, found: Sequence[SettingSummary]) -> str:
    """Return a line for every setting and seed."""
    rows = []
    for one in found:
        setting, validation, test = one.setting, one.validation, one.test
        named = [study.name, shown_name(setting.name), setting.row, setting.column]
        for seed, run in one.runs.items():
            numbers = (run.validation, mean(validation), spread(validation))
            numbers += (run.test, mean(test), spread(test))
            rows.append(
                [*named, config.protocol, seed, len(one.runs)]
                + ["" if number is None else f"{number:.4f}" for number in numbers]
                + [run.trainable, f"{run.seconds_per_epoch:.4f}"]
            )
    return to_csv(COLUMNS, rows)
