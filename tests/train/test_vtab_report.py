"""Promise: Table 2 has means of whole groups alone, beside the paper's; what is missing is said."""

import csv
import io
import json
from statistics import fmean, stdev

import pytest
from train_runs import make_config
from vtab_trees import ONE_PER_GROUP, write_task
from written_runs import write_run

from tcpa.train.__main__ import main
from tcpa.train.data.vtab_tasks import GROUPS, SEEDS, TASKS
from tcpa.train.report.groups import group_runs, names_of
from tcpa.train.report.paper import VPT_ROWS, published_mean, table2, vpt_value
from tcpa.train.report.runs import read_runs
from tcpa.train.report.table2 import (
    details_vtab,
    means_of,
    overview_vtab,
    table2_csv,
    tasks_csv,
)


def write_tasks(output, tasks=tuple(TASKS), seeds=(42,), accuracy=lambda task, seed: 50.0,
                kind="original", **options) -> None:  # fmt: skip
    """Write finished runs of the last epoch, of whole tasks."""
    for task in tasks:
        for seed in seeds:
            value = accuracy(task, seed)
            given = {"method": "vpt-deep", "dataset": task, "seed": seed, "protocol": "last"}
            folder = write_run(output, (value,), **given | options)
            path = folder / "environment.json"
            (start,) = json.loads(path.read_text())
            for split in start["data"].values():
                split["source"] = {"kind": kind, "reason": "looked at"}
            path.write_text(json.dumps([start]))


def groups_of(output):
    runs, problems = read_runs([output])
    groups, others = group_runs(runs)
    return groups, [*problems, *others]


# The published values.


def test_the_carried_table_subtracts_as_it_prints() -> None:
    assert len(table2()) == 9
    for name, row in table2().items():
        if name.endswith("+TCPA"):
            for group in GROUPS:
                base = table2()[name.removesuffix("+TCPA")]
                printed = float(row[f"delta_{group}_printed"])
                assert float(row[group]) - float(base[group]) == pytest.approx(printed, abs=0.051)
    assert published_mean("vpt+tcpa", "natural") == 79.7
    assert published_mean("vfpt", "natural") is None and published_mean("linear", "natural") is None


@pytest.mark.parametrize("method", VPT_ROWS)
def test_vpts_tasks_average_to_the_rows_of_the_paper(method) -> None:
    name = {"full": "Full", "vpt-deep": "VPT"}[method]
    for group, tasks in GROUPS.items():
        values = [vpt_value(method, task) for task in tasks]
        assert fmean(values) == pytest.approx(float(table2()[name][group]), abs=0.0501)
    assert vpt_value("vpt+tcpa", "vtab-dtd") is None


# Means.


def test_a_group_mean_is_the_mean_of_its_tasks_means(tmp_path) -> None:
    def accuracy(task: str, seed: int) -> float:
        return 10.0 + list(TASKS).index(task) + seed / 100

    write_tasks(tmp_path, seeds=SEEDS, accuracy=accuracy)
    groups, problems = groups_of(tmp_path)
    assert problems == [] and [group.label for group in groups] == list(TASKS)
    means = means_of(groups)
    assert [mean.name for mean in means] == list(GROUPS)
    for mean in means:
        tasks = GROUPS[mean.name]
        expected = fmean(fmean(accuracy(task, seed) for seed in SEEDS) for task in tasks)
        assert mean.mean == pytest.approx(expected) and mean.runs == "5"
        by_seed = [fmean(accuracy(task, seed) for task in tasks) for seed in SEEDS]
        assert mean.spread == pytest.approx(stdev(by_seed))
        assert mean.delta == pytest.approx(expected - published_mean("vpt-deep", mean.name))
    names = names_of([groups[0].setting])
    shown = overview_vtab(groups, names)
    assert shown.rows[0] == ["VPT, paper", "78.5", "82.4", "55.0", "-", "-", "-", "-"]
    assert shown.rows[1][1:4] == [f"{v} \N{PLUS-MINUS SIGN} 3.3" for v in (15.1, 20.6, 26.6)]
    assert shown.rows[1][4:] == ["-63.4", "-61.8", "-28.4", "5"]
    assert shown.notes == ()


def test_a_group_with_missing_tasks_says_so_and_has_no_mean(tmp_path) -> None:
    gone = ("vtab-pets", "vtab-svhn", *GROUPS["structured"])
    there = [name for name in TASKS if name not in gone]
    write_tasks(tmp_path, there)
    groups, _ = groups_of(tmp_path)
    names = names_of([groups[0].setting])
    shown = overview_vtab(groups, names)
    assert shown.rows[1][1:4] == ["5 of 7 tasks", "50.0", "0 of 8 tasks"]
    (note,) = shown.notes
    assert note.endswith(": no mean of natural, as Pets, SVHN are missing.")
    (detail,) = details_vtab(groups, names)
    assert ["natural, mean", "", "78.5", "-", "-", "1", "-"] in detail.rows
    assert ["DTD", "original", "65.8", "50.00", "-", "1", "-"] in detail.rows
    rows = list(csv.DictReader(io.StringIO(table2_csv(groups))))
    assert [row["group"] for row in rows] == ["natural", "specialized"]
    assert (rows[0]["mean_percent"], rows[0]["missing"]) == ("", "Pets; SVHN")
    assert (rows[1]["mean_percent"], rows[1]["difference_points"][:5]) == ("50.0", "-32.4")
    assert len(list(csv.DictReader(io.StringIO(tasks_csv(groups))))) == len(there)


def test_copies_get_no_delta_and_share_no_mean_with_originals(tmp_path) -> None:
    write_tasks(tmp_path / "a", GROUPS["specialized"], kind="jpeg")
    groups, _ = groups_of(tmp_path / "a")
    (mean,) = means_of(groups)
    assert mean.mean == 50.0 and mean.delta is None
    names = names_of([groups[0].setting])
    (note,) = overview_vtab(groups, names).notes
    assert "no delta of specialized, as not all images are the published originals" in note
    (detail,) = details_vtab(groups, names)
    told = " ".join(detail.notes)
    assert told.count("vtab-eurosat") == 1, "once for train and test"
    assert "images are lossy copies (looked at): not comparable" in told
    assert "JAX weights of the ViT-B/16" in told
    write_tasks(tmp_path / "b", ["vtab-eurosat"], seeds=(44,))
    groups, _ = groups_of(tmp_path)
    (mean,) = means_of(groups)
    assert mean.twice == ["EuroSAT"] and mean.mean is None
    assert "EuroSAT have several results" in overview_vtab(groups, names).notes[0]


def test_methods_stand_in_the_order_of_the_table(tmp_path) -> None:
    methods = ["vpt-deep", "full", "vp+tcpa", "vp", "vpt-shallow"]
    for method in methods:
        write_tasks(tmp_path, ["vtab-dtd"], method=method)
    groups, _ = groups_of(tmp_path)
    found = [group.setting.method for group in groups]
    assert found == ["full", "vp", "vp+tcpa", "vpt-deep", "vpt-shallow"]
    shown = overview_vtab(groups, names_of([group.setting for group in groups]))
    first = [row[0].partition(",")[0] for row in shown.rows]
    assert first == ["Full", "full", "VP", "vp", "VP+TCPA", "vp+tcpa", "VPT", "vpt-deep",
                     "vpt-shallow"]  # fmt: skip


def edit_recipe(folder, **changes) -> None:
    path = folder / "config.json"
    found = json.loads(path.read_text())
    found["recipe"] |= changes
    path.write_text(json.dumps(found))


def test_what_searches_chose_is_one_setting(tmp_path) -> None:
    tasks = GROUPS["specialized"]
    write_tasks(tmp_path, tasks)
    groups, _ = groups_of(tmp_path)
    usual = groups[0].setting
    for number, folder in enumerate(sorted(path.parent for path in tmp_path.rglob("config.json"))):
        edit_recipe(folder, learning_rate=1.0 + number, weight_decay=0.5, rate_batch=0)
    groups, _ = groups_of(tmp_path)
    assert len({group.setting for group in groups}) == 4, "given by hand, one by one"
    for folder in (path.parent for path in tmp_path.rglob("config.json")):
        edit_recipe(folder, chosen="grid of KMnP/vpt 4410440")
    groups, _ = groups_of(tmp_path)
    (setting,) = {group.setting for group in groups}
    assert setting != usual
    assert (
        "rate and decay chosen on validation images (grid of KMnP/vpt 4410440)" in setting.changes
    )
    (mean,) = means_of(groups)
    assert mean.mean == 50.0


def test_trials_of_a_search_are_not_counted(tmp_path) -> None:
    folder = write_run(tmp_path, (70.0,), dataset="vtab-dtd", method="linear", protocol="tune")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"test"', '"val"'))
    groups, (problem,) = groups_of(tmp_path)
    assert groups == [] and "a trial of a search, which never reads the test images" in problem.text


# The whole way.


def test_a_task_of_each_group_is_trained_and_reported(reported) -> None:
    for name in ("report.html", "report.md"):
        text = (reported / name).read_text()
        assert "Table 2" in text and "1 of 7 tasks" in text and "1 of 8 tasks" in text
        assert "as CIFAR-100, Caltech101, DTD, Flowers102, SVHN, Sun397 are missing" in text
        assert "lossy copies of the originals" in text and "INCOMPLETE data" in text
        assert "Table 1, top-1" not in text and ("## Table 1\n" not in text)
        assert all(TASKS[task].title in text for task in ONE_PER_GROUP)
    rows = list(csv.DictReader((reported / "vtab.csv").read_text().splitlines()))
    assert [row["task"] for row in rows] == list(ONE_PER_GROUP)
    assert [row["images"] for row in rows] == ["jpeg", "original", "original"]
    assert all(float(row["mean_percent"]) >= 0 and row["seeds"] == "42 44" for row in rows)
    means = list(csv.DictReader((reported / "table2.csv").read_text().splitlines()))
    assert [row["tasks"] for row in means] == ["1", "1", "1"]
    assert len((reported / "table1.csv").read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A report of real runs: one task of each group, two seeds."""
    from tcpa.train.jobs.run import run

    root = tmp_path_factory.mktemp("vtab")
    for task in ONE_PER_GROUP:
        write_task(task, root / "data", kind="jpg" if task == "vtab-pets" else "png")
        for seed in (42, 44):
            given = {"dataset": task, "method": "linear", "protocol": "auto", "epochs": 1}
            run(make_config(root / "runs", data=root / "data", seed=seed, **given))
    assert main(["report", str(root / "runs"), "--output", str(root / "report")]) == 0
    return root / "report"
