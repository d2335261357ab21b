"""Promise: a report says what the runs are, next to the published table, and hides nothing."""

import csv
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from xml.etree import ElementTree

import pytest
from dataset_trees import write_tree
from train_runs import make_config
from written_runs import write_run

import tcpa
from tcpa.cli import UsageError
from tcpa.train.__main__ import main
from tcpa.train.jobs.run import run
from tcpa.train.options.run import ReportConfig
from tcpa.train.report.command import report
from tcpa.train.report.groups import LABELS, group_runs, names_of, setting_of
from tcpa.train.report.paper import AVERAGE, FAULTS, ROWS, published, table1
from tcpa.train.report.runs import read_runs
from tcpa.train.report.table1 import details, overview


def groups_of(*folders):
    runs, problems = read_runs(folders)
    groups, repeated = group_runs(runs)
    return groups, [*problems, *repeated]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The published table.


def test_the_carried_table_averages_as_it_prints() -> None:
    assert len(table1()) == 20 and set(ROWS.values()) == set(table1())
    for name, row in table1().items():
        cells = [row[label] for label in LABELS]
        if name == "LION":
            assert cells.count("") == 6 and row[AVERAGE] == ""
        else:
            assert abs(fmean(map(float, cells)) - float(row[AVERAGE])) <= 0.0501, name
    assert published("vfpt+tcpa", "CUB") == 89.5 and published("vfpt", AVERAGE) == 89.2
    assert published("vfpt+tcpa", "folder") is None and published("prompting", "CUB") is None


def test_the_faults_named_are_those_of_the_table1() -> None:
    """Printed differences against those of the printed accuracies."""
    wrong = {}
    for name, row in table1().items():
        if name.endswith("+TCPA"):
            base = table1()[name.removesuffix("+TCPA")]
            for label in LABELS:
                real = float(row[label]) - float(base[label])
                if abs(real - float(row[f"delta_printed_{label}"])) > 0.051:
                    wrong[name, label] = (float(row[f"delta_printed_{label}"]), round(real, 1))
    assert wrong == {("VP+TCPA", "Dog"): (3.1, 4.1), ("VFPT+TCPA", "Cifar10"): (1.4, 1.0)}
    told = " ".join(FAULTS)
    for (name, label), (printed, real) in wrong.items():
        assert f"{name} on {label} (+{printed}; they give +{real})" in told


# Means.


def test_a_mean_is_over_seeds(tmp_path) -> None:
    best = [89.0, 90.0, 91.5]
    for seed, value in enumerate(best):
        write_run(tmp_path, (80.0, value, 70.0), seed=seed)
    (group,), problems = groups_of(tmp_path)
    assert problems == [] and [run.seed for run in group.runs] == [0, 1, 2]
    assert group.label == "CUB" and group.mean == pytest.approx(fmean(best))
    assert group.spread == pytest.approx(stdev(best))
    assert group.delta == pytest.approx(fmean(best) - 89.5)
    (shown,) = details([group], names_of([group.setting]))
    assert shown.rows == [["CUB", "89.5", "90.17", "1.26", "3", "+0.67"]]


APART = {
    "protocol": {"protocol": "val"},
    "method": {"method": "vfpt"},
    "backbone": {"backbone": "augreg_in21k"},
    "normalisation": {"normalize": "half"},
    "a changed option": {"learning_rate": 0.5},
    "incomplete data": {"complete": False},
}


@pytest.mark.parametrize("options", APART.values(), ids=APART)
def test_what_differs_shares_no_mean(options, tmp_path) -> None:
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=2, **options)
    groups, problems = groups_of(tmp_path / "a", tmp_path / "b")
    assert problems == [] and [len(group.runs) for group in groups] == [1, 1]
    names = names_of([group.setting for group in groups])
    assert len(set(names.values())) == 2, "a reader can tell them apart"


@pytest.mark.parametrize("file", ["environment.json", "config.json"])
def test_other_images_or_another_recipe_share_no_mean_unseen(file, tmp_path) -> None:
    """What no name of a setting tells: the split rule, and a recipe of another version."""
    write_run(tmp_path, seed=1)
    path = write_run(tmp_path, seed=2) / file
    changed = {"VPT's split files": "a hash", '"warmup_fraction": 0.2': '"warmup_fraction": 0.1'}
    text = path.read_text()
    for before, after in changed.items():
        text = text.replace(before, after)
    path.write_text(text)
    groups, _ = groups_of(tmp_path)
    assert [len(group.runs) for group in groups] == [1, 1]
    names = names_of(list({group.setting: None for group in groups}))
    shown = " ".join(cell for row in overview(groups, names).rows for cell in row)
    assert shown.count("89.0") == 2, "neither hides the other"


def test_incomplete_data_are_not_compared(tmp_path) -> None:
    write_run(tmp_path, complete=False)
    (group,), _ = groups_of(tmp_path)
    assert group.delta is None
    names = names_of([group.setting])
    assert "INCOMPLETE data" in names[group.setting]
    (shown,) = details([group], names)
    assert shown.rows[0][-1] == "-" and "no yardstick" in shown.notes[0]
    assert "30 of 5000 train, 30 of 5000 test images" in shown.notes[1]


def test_an_average_needs_all_ten_datasets(tmp_path) -> None:
    for number, name in enumerate(tcpa.HTA_DATASETS[:-1]):
        write_run(tmp_path, (80.0 + number, 70.0, 70.0), dataset=name)
    groups, _ = groups_of(tmp_path)
    names = names_of([groups[0].setting])
    assert [row[0] for row in details(groups, names)[0].rows] == [g.label for g in groups]
    assert overview(groups, names).rows[1][-2:] == ["-", "1"]
    write_run(tmp_path, (89.0, 70.0, 70.0), dataset=tcpa.HTA_DATASETS[-1])
    groups, _ = groups_of(tmp_path)
    (shown,) = details(groups, names)
    assert [row[0] for row in shown.rows] == [*LABELS, "average"]
    assert shown.rows[-1] == ["average", "90.4", "84.50", "-", "-", "-5.90"]
    assert overview(groups, names).rows[0] == [
        "VFPT+TCPA, paper", "71.2", "89.5", "83.6", "91.5", "99.2", "89.2", "91.6", "98.4", "94.2",
        "95.6", "90.4", "-",
    ]  # fmt: skip


def test_a_copy_of_a_run_counts_once(tmp_path) -> None:
    folder = write_run(tmp_path / "runs")
    shutil.copytree(folder, tmp_path / "copy")
    groups, problems = groups_of(tmp_path / "runs", tmp_path, tmp_path / "copy")
    assert sum(len(group.runs) for group in groups) == 1
    (problem,) = problems
    assert problem.folder == tmp_path / "copy" and "repeats seed 1 of" in problem.text


def test_random_weights_of_other_seeds_share_a_mean(tmp_path) -> None:
    for seed in (1, 2):
        folder = write_run(tmp_path, seed=seed, backbone="test_vit", weights="none")
        (start,) = json.loads((folder / "environment.json").read_text())
        start["backbone"] |= {"weights": "none", "fingerprint": str(seed)}
        (folder / "environment.json").write_text(json.dumps([start]))
    groups, _ = groups_of(tmp_path)
    assert [len(group.runs) for group in groups] == [2]


# What does not count.


def drop(name):
    return lambda folder: (folder / name).unlink()


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


def alter(name, **changes):
    return lambda folder: edit(folder / name, **changes)


def only_claimed(folder):
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()


def fewer_epochs(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-2]))


BROKEN = {
    "unfinished": (drop("result.json"), "unfinished: 3 of 3 epochs"),
    "only claimed": (only_claimed, "unfinished: 0 of 3 epochs"),
    "no configuration": (drop("config.json"), "config.json is missing"),
    "broken configuration": (put("config.json", "{"), "config.json is no JSON"),
    "other JSON": (put("config.json", "[]"), "config.json holds a list"),
    "no recipe": (alter("config.json", recipe=None), "config.json: recipe is None"),
    "no environment": (drop("environment.json"), "environment.json is missing"),
    "other environment": (put("environment.json", "[1]"), "environment.json holds a int"),
    "no metrics": (drop("metrics.jsonl"), "metrics.jsonl has 0 epochs"),
    "broken metrics": (put("metrics.jsonl", '{"kind": "ep\n'), "metrics.jsonl cannot be read"),
    "other metrics": (put("metrics.jsonl", "{}\n"), "metrics.jsonl, line 1: kind is None"),
    "fewer epochs": (fewer_epochs, "metrics.jsonl has 2 epochs, config.json 3"),
    "altered accuracy": (
        alter("result.json", accuracy=99.0),
        "says 99.0 % after epoch 2, metrics.jsonl says 89.0 there",
    ),
    "no number": (alter("result.json", accuracy="high"), "result.json: accuracy is 'high'"),
    "another epoch": (
        alter("result.json", accuracy=88.0, epoch=3),
        "says that epoch 3 is the best on test, metrics.jsonl says 2",
    ),
    "another seed": (alter("result.json", seed=7), "result.json says seed 7, config.json 1"),
}


@pytest.mark.parametrize(("harm", "text"), BROKEN.values(), ids=BROKEN)
def test_a_run_that_does_not_count_is_listed(harm, text, tmp_path) -> None:
    write_run(tmp_path / "runs", seed=2)
    harm(write_run(tmp_path / "runs", seed=1))
    groups, (problem,) = groups_of(tmp_path / "runs")
    assert [run.seed for group in groups for run in group.runs] == [2]
    assert text in problem.text and problem.folder.name == "official-seed1"
    report(ReportConfig(folders=(tmp_path / "runs",), output=tmp_path / "report"))
    for name in ("report.html", "report.md"):
        written = (tmp_path / "report" / name).read_text()
        assert "official-seed1" in written and "1 run not counted" in written


def test_folders_without_runs_are_named(tmp_path, capsys) -> None:
    for folder, text in (
        (tmp_path / "no", "expected a folder of runs"),
        (tmp_path, "without any run"),
    ):
        assert main(["report", str(folder), "--output", str(tmp_path / "report")]) == 2
        assert re.search(f"FOLDERS: got {folder}.*{text}", capsys.readouterr().err)
    assert not (tmp_path / "report").exists()


def test_a_report_that_cannot_be_written_is_one_line(tmp_path) -> None:
    write_run(tmp_path / "runs")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"--output: got .*file, expected a folder that can"):
        report(ReportConfig(folders=(tmp_path / "runs",), output=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


# The files.


class Page:
    """What an HTML page says; the page is also well-formed XML."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        # HTML knows xlink without being told.
        plain = re.sub(r"<!doctype html>|<meta[^>]*>|\bxlink:", "", self.text)
        self.root = ElementTree.fromstring(plain)
        self.words = " ".join(" ".join(self.root.itertext()).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("written")
    for seed in (1, 2):
        write_run(tmp_path / "runs", (80.0, 88.0 + seed, 88.0), seed=seed)
    write_run(tmp_path / "runs", protocol="val", device="<A100>")
    drop("result.json")(write_run(tmp_path / "runs", dataset="svhn"))
    report(ReportConfig(folders=(tmp_path / "runs",), output=tmp_path / "report"))
    return tmp_path / "report"


def test_the_page_needs_nothing_else_and_has_tables_times_curves_notes(written) -> None:
    page = Page(written / "report.html")
    assert not re.search(r"<script|<link|<img|src=|url\((?!#)|@import|https?://", page.text)
    assert "prefers-color-scheme: dark" in page.text and "width=device-width" in page.text
    assert "currentColor" in page.text and "<A100>" in page.words
    for part in (
        "VFPT+TCPA, paper", "89.5 ± 0.7", "vfpt+tcpa, val", "unfinished: 3 of 3 epochs",
        "training epoch, s", "VTAB-1k", "image prompt on CUB", "official: the best test epoch",
        "3 runs counted, 1 run not counted",
    ):  # fmt: skip
        assert part in page.words, part
    labels = [text for svg in page.root.iter("svg") for text in svg.itertext() if text.strip()]
    # CUB: loss, test, val; SVHN, which is not finished: loss, test.
    assert len(list(page.root.iter("svg"))) == 5
    for axis, times in (("epoch", 5), ("training loss, nats", 2), ("test accuracy, %", 2)):
        assert [label.strip() for label in labels].count(axis) == times


def test_markdown_and_csv_say_the_same(written) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    assert "| CUB | 89.5 | 89.50 | 0.71 | 2 | +0.00 |" in text
    assert "svhn" in text and "VTAB-1k" in text
    with (written / "table1.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["protocol"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"official", "val"}
    row = rows["official"]
    assert (row["dataset"], row["runs"], row["seeds"]) == ("CUB", "2", "1 2")
    assert float(row["mean_percent"]) == 89.5 == float(row["paper_percent"])
    assert float(row["difference_points"]) == 0 and row["changes"] == "epochs=3"
    assert rows["val"]["spread_points"] == ""
    with (written / "times.csv").open(encoding="utf-8", newline="") as file:
        times = list(csv.DictReader(file))
    assert {(row["device"], row["training epoch, s"]) for row in times} == {
        ("H200", "2"),
        ("<A100>", "2"),
    }


# Runs of the real engine.


def test_a_report_reads_what_a_run_writes(tmp_path, capsys) -> None:
    data = write_tree("dtd", tmp_path / "data", classes=3, per_class=6)
    options = {"dataset": "dtd", "data": data, "resize": 40, "image_size": 32}
    results = [
        run(make_config(tmp_path / "runs", protocol=protocol, seed=5, **options))
        for protocol in ("official", "val", "last")
    ]
    groups, problems = groups_of(tmp_path / "runs")
    assert problems == [] and {g.setting.protocol: g.mean for g in groups} == {
        result.protocol: result.accuracy for result in results
    }
    capsys.readouterr()
    output = tmp_path / "report"
    assert main(["report", str(tmp_path / "runs"), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "dtd" not in printed and "DTD" in printed and "3 runs counted" in printed
    page = Page(output / "report.html")
    assert f"{results[0].accuracy:.2f}" in page.words and "INCOMPLETE data" in page.words


def test_every_field_of_a_setting_tells_settings_apart(tmp_path) -> None:
    write_run(tmp_path)
    (read,), _ = read_runs([tmp_path])
    setting = setting_of(read)
    for name, value in asdict(setting).items():
        other = replace(setting, **{name: value + "?"})
        names = names_of([setting, other])
        assert names[setting] != names[other], name
