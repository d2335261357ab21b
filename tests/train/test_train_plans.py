"""Promise: names of a sweep stand for the datasets, methods and seeds of the tables."""

import pytest

import tcpa
from tcpa.cli import UsageError
from tcpa.train.data.vtab_tasks import GROUPS, SEEDS, TASKS
from tcpa.train.jobs.sweep import jobs_of
from tcpa.train.jobs.sweep_names import plan
from tcpa.train.options.run import SweepConfig
from tcpa.train.recipes.rows import METHODS
from tcpa.train.report.paper import ROWS, table1, table2


def test_table1_is_every_row_on_every_dataset() -> None:
    found = plan(("table1",), None, None)
    methods = list(dict.fromkeys(method for _, method, _ in found))
    assert {ROWS[method] for method in methods} == set(table1())
    assert len(methods) == 20, "one method a row"
    assert found == [(d, m, 3407) for d in tcpa.HTA_DATASETS for m in methods]


def test_table2_is_every_row_on_every_task_with_five_seeds() -> None:
    found = plan(("table2",), None, None)
    methods = list(dict.fromkeys(method for _, method, _ in found))
    assert {ROWS[method] for method in methods} == set(table2()) and len(methods) == 9
    assert found == [(d, m, s) for d in TASKS for m in methods for s in SEEDS]


def test_options_go_before_what_a_name_stands_for() -> None:
    found = plan(("table2",), ("linear",), (1, 2))
    assert found == [(dataset, "linear", seed) for dataset in TASKS for seed in (1, 2)]
    assert plan(("hta",), None, None)[0] == ("dtd", "vfpt+tcpa", 3407)
    both = plan(("table1", "hta"), None, None)
    assert both == plan(("table1",), None, None), "nothing twice"


@pytest.mark.parametrize("group", GROUPS)
def test_groups_stand_for_their_tasks(group) -> None:
    found = plan((f"vtab-{group}",), ("linear",), (1,))
    assert [dataset for dataset, _, _ in found] == list(GROUPS[group])
    assert {m for m in METHODS if m not in ROWS} == {"gated-prompt", "vpt-shallow"}


def test_each_dataset_has_its_protocol() -> None:
    jobs = jobs_of(SweepConfig(datasets=("table2", "dtd"), methods=("linear",)))
    protocols = {job.config.dataset: job.config.protocol for job in jobs}
    assert protocols == dict.fromkeys(TASKS, "last") | {"dtd": "official"}
    assert len({job.folder for job in jobs}) == len(jobs) == 19 * 5 + 1


def test_unknown_names_are_told() -> None:
    with pytest.raises(UsageError, match=r"DATASETS: got 'table3', .*; did you mean table"):
        plan(("table3",), None, None)
    with pytest.raises(UsageError, match=r"got 'vtab-dtdd', expected hta, dtd, .*mean vtab-dtd\?"):
        plan(("vtab-dtdd",), None, None)
