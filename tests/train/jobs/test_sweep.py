"""Promise: a sweep carries out every run once, whatever happens to one of them."""

import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from train_runs import make_config, make_splits

import tcpa
from tcpa.cli import UsageError
from tcpa.train.data.vtab_tasks import GROUPS, SEEDS, TASKS
from tcpa.train.engine.interruption import Interrupted
from tcpa.train.engine.rundir import CONFIG, RESULT
from tcpa.train.jobs import scheduler
from tcpa.train.jobs import sweep as sweeping
from tcpa.train.jobs.run import run
from tcpa.train.jobs.scheduler import Conflict, Job, arguments
from tcpa.train.jobs.sweep import jobs_of, plan, sweep
from tcpa.train.options.run import RunConfig, SweepConfig
from tcpa.train.recipes.runspec import resolve
from tcpa.train.report.paper import ROWS, table1, table2
from tcpa.train.storage import read_json

OPTIONS = {"device": "cpu", "backbone": "test_vit", "weights": "none", "epochs": 1}

STAND_IN = """
import json, os, sys
from pathlib import Path

dataset, *words = sys.argv[1:]
options = dict(zip(words[::2], words[1::2]))
seed = int(options["--seed"])
folder = Path(options["--output"]) / dataset / "vfpt+tcpa" / f"official-seed{seed}"
count = folder / "starts"
count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
(folder / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
if dataset == "svhn" and not Path("mended").exists():
    sys.exit("svhn.mat is missing")
result = {"dataset": dataset, "method": "vfpt+tcpa", "protocol": "official", "seed": seed,
          "accuracy": 90.0, "epoch": 1, "seconds_per_epoch": 1.0}
(folder / "result.json").write_text(json.dumps(result))
"""
"""Ends as a run does, without the training."""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(scheduler, "PROGRAM", (sys.executable, str(script)))
    # It leaves none of the files that a result is checked against.
    monkeypatch.setattr(scheduler, "saved_description", lambda folder: None)
    monkeypatch.setattr(scheduler, "finished_result", lambda folder: read_json(folder / RESULT))


@pytest.fixture(autouse=True)
def heard():
    """Let Ctrl-C be heard: a shell starts what goes to the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def starts(output):
    return {p.parent.parent.parent.name: int(p.read_text()) for p in output.rglob("starts")}


# What names stand for.


def test_table1_is_every_row_on_every_dataset():
    found = plan(("table1",), None, None)
    methods = list(dict.fromkeys(method for _, method, _ in found))
    assert {ROWS[method] for method in methods} == set(table1())
    assert len(methods) == 20, "one method a row"
    assert found == [(d, m, 3407) for d in tcpa.HTA_DATASETS for m in methods]


def test_table2_is_every_row_on_every_task_with_five_seeds():
    found = plan(("table2",), None, None)
    methods = list(dict.fromkeys(method for _, method, _ in found))
    assert {ROWS[method] for method in methods} == set(table2()) and len(methods) == 9
    assert found == [(d, m, s) for d in TASKS for m in methods for s in SEEDS]


def test_options_go_before_what_a_name_stands_for():
    found = plan(("table2",), ("linear",), (1, 2))
    assert found == [(dataset, "linear", seed) for dataset in TASKS for seed in (1, 2)]
    assert plan(("hta",), None, None)[0] == ("dtd", "vfpt+tcpa", 3407)
    both = plan(("table1", "hta"), None, None)
    assert both == plan(("table1",), None, None), "nothing twice"
    for group, tasks in GROUPS.items():
        assert plan((f"vtab-{group}",), ("linear",), (1,)) == [(d, "linear", 1) for d in tasks]
    jobs = jobs_of(SweepConfig(datasets=("svhn", "hta"), methods=("linear", "vfpt"), seeds=(1, 2)))
    assert len({job.folder for job in jobs}) == len(jobs) == 10 * 2 * 2
    assert {job.config.dataset for job in jobs} == set(tcpa.HTA_DATASETS)
    assert jobs[0].folder == Path("runs/svhn/linear/official-seed1")


def test_each_dataset_has_its_protocol():
    jobs = jobs_of(SweepConfig(datasets=("table2", "dtd"), methods=("linear",)))
    protocols = {job.config.dataset: job.config.protocol for job in jobs}
    assert protocols == dict.fromkeys(TASKS, "last") | {"dtd": "official"}
    assert len({job.folder for job in jobs}) == len(jobs) == 19 * 5 + 1


def test_unknown_names_are_told():
    with pytest.raises(UsageError, match=r"DATASETS: got 'table3', .*; did you mean 'table"):
        plan(("table3",), None, None)
    with pytest.raises(UsageError, match=r"got 'vtab-dtdd', expected hta, dtd, .*mean 'vtab-dtd'"):
        plan(("vtab-dtdd",), None, None)


# Command lines.

CONFIGS = {
    "defaults": RunConfig(dataset="cub"),
    "everything": RunConfig(
        dataset="folder",
        method="vpt+tcpa",
        seed=2**63 - 1,
        data=Path("my data"),
        cache=Path("c"),
        output=Path("o"),
        protocol="val",
        backbone="test_vit",
        weights="none",
        normalize="0.5,0.5,0.5,1,1,1",
        vtab_source="jpeg",
        choices=Path("s"),
        input_prompt="vp",
        tuning="bias",
        mapping="full",
        mapping_sources=5,
        clusters=7,
        parity=True,
        prune_tokens=0.5,
        prune_segments=0.25,
        meta_prompt=Path("m"),
        epochs=3,
        batch_size=4,
        eval_batch_size=7,
        learning_rate=1e-05,
        weight_decay=0.0,
        match_weight=0.5,
        pool_size=3,
        top_k=0,
        random_selection_epochs=0,
        prompt_dropout=0.0,
        mixup_alpha=0.0,
        label_smoothing=0.0,
        resize=64,
        image_size=32,
        precision="fp16",
        eval_precision="fp32",
        device="cpu",
        compile=True,
        cuda_graph=True,
        resident=False,
        log_steps=3,
        checkpoint_seconds=0.5,
        tensorboard=False,
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_command_line_gives_its_configuration_back(config):
    assert tyro.cli(RunConfig, args=arguments(config)) == config


def test_every_option_is_tried_above():
    default, everything = CONFIGS["defaults"], CONFIGS["everything"]
    same = [
        n for n in RunConfig.__dataclass_fields__ if getattr(default, n) == getattr(everything, n)
    ]
    assert same == []


def test_jobs_are_printed_one_a_line(capsys):
    config = SweepConfig(
        datasets=("cub", "dtd"), seeds=(1, 2), data=Path("my data"), print_jobs=True
    )
    assert sweep(config) == []
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] for line in lines] == [[sys.executable, "-m", "tcpa.train", "run"]] * 4
    parsed = [tyro.cli(RunConfig, args=line[4:]) for line in lines]
    assert [(run.dataset, run.seed) for run in parsed] == [
        (d, s) for d in ("cub", "dtd") for s in (1, 2)
    ]
    assert {run.data for run in parsed} == {Path("my data")}


def test_a_failed_run_stops_no_other_and_is_repeated(stand_in, tmp_path, capsys):
    config = SweepConfig(datasets=("dtd", "svhn", "gtsrb"), output=tmp_path / "runs", **OPTIONS)
    with pytest.raises(UsageError) as caught:
        sweep(config)
    for part in ("1 of 3 runs failed", "svhn", "svhn.mat is missing", "log.txt", "again"):
        assert part in str(caught.value)
    assert starts(tmp_path) == {"dtd": 1, "svhn": 1, "gtsrb": 1}
    assert "90.00" in capsys.readouterr().out
    (tmp_path / "mended").touch()
    assert [found["dataset"] for found in sweep(config)] == ["dtd", "svhn", "gtsrb"]
    assert starts(tmp_path) == {"dtd": 1, "svhn": 2, "gtsrb": 1}
    assert "3 runs, 2 of them finished" in capsys.readouterr().out


def test_runs_of_another_configuration_are_no_results(tmp_path):
    config = make_config(tmp_path)
    job = Job(config, resolve(config))
    assert job.result() is None
    accuracy = run(config, make_splits()).accuracy
    found = job.result()
    assert found is not None and found["accuracy"] == accuracy
    other = replace(config, epochs=7)
    with pytest.raises(Conflict, match=r"recipe.epochs: got 7, expected 2 as in .*config.json"):
        Job(other, resolve(other)).result()


DAMAGES = {
    "altered result": (RESULT, lambda text: text.replace('"epoch": ', '"epoch": 1'), "says"),
    "no JSON": (RESULT, lambda text: text[:-9], "result.json is no JSON"),
    "a list": (RESULT, lambda text: "[]", "result.json holds a list"),
    "no configuration": (CONFIG, lambda text: "[]", "config.json: got a JSON list"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_is_named_and_the_others_are_carried_out(
    damage, tmp_path, monkeypatch, capsys
):
    file, change, message = damage
    config = SweepConfig(
        datasets=("cub",), seeds=(1, 2), output=tmp_path, **OPTIONS, image_size=32, batch_size=8
    )
    first, second = jobs_of(config)
    run(first.config, make_splits())
    path = first.folder / file
    path.write_text(change(path.read_text()))
    before = path.read_text()

    def carry_out(jobs, devices, console):
        for job in jobs:
            run(job.config, make_splits())
        return []

    monkeypatch.setattr(sweeping, "carry_out", carry_out)
    with pytest.raises(UsageError) as caught:
        sweep(config)
    for part in ("1 of 2 runs failed", str(first.folder), message, "run the same command again"):
        assert part in str(caught.value)
    assert second.result() is not None and path.read_text() == before
    assert f"not counted: {first.folder}: damaged" in capsys.readouterr().out


def test_every_gpu_has_one_job_at_a_time(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    options = OPTIONS | {"device": "auto"}
    config = SweepConfig(
        datasets=("dtd", "cub"), seeds=(1, 2), gpus=(0, 2), output=tmp_path / "runs", **options
    )
    assert len(sweep(config)) == 4
    used = {path.read_text() for path in tmp_path.rglob("gpu")}
    assert used == {"4", "7"}
    with pytest.raises(UsageError, match="--gpus: got 3, expected numbers below 3"):
        sweep(SweepConfig(datasets=("dtd",), gpus=(3,), output=tmp_path / "o", **options))


def test_gpus_are_refused_on_a_cpu(tmp_path):
    with pytest.raises(UsageError, match=r"--gpus: got \(0,\) with --device cpu"):
        sweep(SweepConfig(datasets=("dtd",), gpus=(0,), output=tmp_path, **OPTIONS))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"seeds": (-1,)}, "--seeds"),
        ({"methods": ()}, "--methods"),
        ({"datasets": ("a/b",)}, "DATASETS"),
        ({"gpus": (-1,)}, "--gpus"),
        ({"epochs": 0}, "--epochs"),
    ],
)
def test_bad_arguments_are_named(options, name):
    with pytest.raises(UsageError, match=f"{name}: got"):
        SweepConfig(**options)


def test_an_unknown_method_is_named_before_anything_runs(tmp_path):
    with pytest.raises(UsageError, match=r"--methods: got 'vftp', .*did you mean 'vfpt'"):
        sweep(SweepConfig(datasets=("dtd",), methods=("vftp",), output=tmp_path / "runs"))
    with pytest.raises(UsageError, match=r"--backbone: got 'test_vi', .*did you mean .test_vit"):
        sweep(SweepConfig(datasets=("dtd",), backbone="test_vi", output=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


SAVING = """
import os, signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(0.2)
    Path("saved").touch()
    sys.exit(143)

if Path("deaf").exists():
    save = signal.SIG_IGN
signal.signal(signal.SIGTERM, save)
assert os.getpgid(0) == os.getpid(), "Ctrl-C in the terminal would reach it"
Path("pid.part").write_text(str(os.getpid()))
Path("pid.part").rename("pid")
time.sleep(60)
"""
"""Saves when it is asked to end, as a run does."""


def signals(number, count):
    """Return a stand-in for as_completed that sends signals once a process runs."""

    def wait(futures):
        while not Path("pid").exists():
            time.sleep(0.01)
        for repeat in range(count - 1):
            threading.Timer(0.3 + 0.3 * repeat, os.kill, (os.getpid(), number)).start()
        os.kill(os.getpid(), number)
        time.sleep(60)

    return wait


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_runs_may_save_when_a_sweep_is_stopped(number, stand_in, tmp_path, monkeypatch, capsys):
    Path("stand_in.py").write_text(SAVING)
    monkeypatch.setattr(scheduler, "as_completed", signals(number, 1))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="the same command resumes the runs") as caught:
        sweep(SweepConfig(datasets=("dtd", "cub"), output=tmp_path / "runs", **OPTIONS))
    assert caught.value.status == 128 + number and signal.getsignal(number) is before
    assert Path("saved").exists() and not list(tmp_path.glob("runs/cub/**/log.txt"))
    assert "stopping 1 run once the step is done and saved" in capsys.readouterr().out
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


def test_a_second_signal_ends_the_runs_at_once(stand_in, tmp_path, monkeypatch):
    Path("stand_in.py").write_text(SAVING)
    Path("deaf").touch()
    monkeypatch.setattr(scheduler, "as_completed", signals(signal.SIGINT, 2))
    start = time.monotonic()
    with pytest.raises(Interrupted):
        sweep(SweepConfig(datasets=("dtd", "cub"), output=tmp_path / "runs", **OPTIONS))
    assert time.monotonic() - start < 30 and not Path("saved").exists()
    pid = int(Path("pid").read_text())
    # The thread that waits for it ends after the sweep.
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)
        assert time.monotonic() - start < 30
