"""The table of a study: Markdown for readers, CSV for programs."""

import csv
import io
import itertools
import statistics
from collections.abc import Sequence

from ...options.ablate import DEMO, AblateConfig
from .measured import Summary, mean, spread
from .studies import Study, shown_name

COLUMNS: tuple[str, ...] = ("study", "setting", "row", "column", "protocol", "seed", "seeds")
COLUMNS += ("validation", "mean_validation", "spread_validation")
COLUMNS += ("test", "mean_test", "spread_test", "trained_values", "seconds_per_epoch")

EPOCH_OF = {
    "val": "the epoch that is best on them",
    "tune": "the last epoch",
}


def headings(study: Study) -> list[str]:
    """Return the heads of the columns."""
    varied = [study.rows, study.columns] if study.is_grid else [study.rows]
    accuracies = ["validation, %", "spread", "by seed", "test, %", "spread"]
    return [*varied, *accuracies, "seeds", "trained values", "s / epoch"]


def cells(study: Study, found: Summary) -> list[str]:
    """Return a line of the table; "-" for what is not known."""
    setting, runs = found.setting, found.runs
    varied = [setting.row, setting.column] if study.is_grid else [setting.row]
    seconds = [run.seconds_per_epoch for run in runs]
    return [
        *varied,
        _number(mean(found.validation)),
        _number(spread(found.validation)),
        ", ".join(f"{value:.1f}" for value in found.validation) or "-",
        _number(mean(found.test)),
        _number(spread(found.test)),
        ", ".join(map(str, found.seeds)) or "-",
        f"{runs[0].trainable:,}" if runs else "-",
        f"{min(seconds):.2f}" if seconds else "-",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


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


def conclusions(study: Study, found: Sequence[Summary], seeds: int) -> list[str]:
    """Say what the validation images show: gains step by step, or the best setting."""
    if study.name == "components":
        pairs = itertools.pairwise(found)
        return [_gain(before, after) for before, after in pairs if before.runs and after.runs]
    finished = [one for one in found if len(one.runs) == seeds]
    if not finished:
        return []
    means = [one.mean or 0.0 for one in finished]
    best = [one.setting for one, value in zip(finished, means, strict=True) if value == max(means)]
    where = [
        f"{study.rows} {one.row}" + (f", {study.columns} {one.column}" if study.is_grid else "")
        for one in best
    ]
    return [
        f"Best mean on validation images: {' and '.join(where)} ({max(means):.1f} %); all settings "
        f"lie within {max(means) - min(means):.1f} points."
    ]


def _gain(before: Summary, after: Summary) -> str:
    """Compare runs of the same seed."""
    first = dict(zip(before.seeds, before.validation, strict=True))
    pairs = zip(after.seeds, after.validation, strict=True)
    gains = [value - first[seed] for seed, value in pairs if seed in first]
    if not gains:
        return f"{after.setting.row} and {before.setting.row} have no seed in common."
    each = ", ".join(f"{gain:+.1f}" for gain in gains)
    return (
        f"{after.setting.row} - {before.setting.row}: {statistics.fmean(gains):+.1f} points on "
        f"validation images (by seed: {each})."
    )


def markdown(study: Study, found: Sequence[Summary], lines: Sequence[str]) -> str:
    """Return title, table and notes."""
    head, body = headings(study), [cells(study, one) for one in found]
    rule = ["---", *["---:"] * (len(head) - 1)]
    rows = [f"| {' | '.join(line)} |" for line in (head, rule, *body)]
    return "\n".join([f"### {study.title}", "", *rows, "", *(f"- {n}" for n in lines)]) + "\n"


def csv_text(config: AblateConfig, study: Study, found: Sequence[Summary]) -> str:
    """Return a line for every setting and seed."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for one in found:
        totals = {
            "mean_validation": mean(one.validation),
            "spread_validation": spread(one.validation),
            "mean_test": mean(one.test),
            "spread_test": spread(one.test),
        }
        setting = one.setting
        for seed, run in zip(one.seeds, one.runs, strict=True):
            numbers = {"validation": run.validation, "test": run.test, **totals}
            writer.writerow(
                {
                    "study": study.name,
                    "setting": shown_name(setting.name),
                    "row": setting.row,
                    "column": setting.column,
                    "protocol": config.protocol,
                    "seed": seed,
                    "seeds": len(one.seeds),
                    "trained_values": run.trainable,
                    "seconds_per_epoch": f"{run.seconds_per_epoch:.4f}",
                    **{n: "" if v is None else f"{v:.4f}" for n, v in numbers.items()},
                }
            )
    return text.getvalue()
