"""Promise: a checkpoint is whole or refused, never unpickled, and the one before it is kept."""

import fcntl
import functools
import json
import pickle
import re
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from train_runs import make_config, make_splits

from tcpa.cli import UsageError
from tcpa.train.engine.checkpoint import (
    CURRENT,
    PREVIOUS,
    Journal,
    load_checkpoint,
    read_metrics,
    save_checkpoint,
)
from tcpa.train.engine.rundir import brief, claim, differences
from tcpa.train.jobs import run as running
from tcpa.train.jobs.run import run

TENSORS = {
    "model/x": torch.arange(12.0).reshape(3, 4).T,
    "step": torch.tensor(3),
    "half": torch.randn(5).bfloat16(),
    "empty": torch.zeros(0, 2),
}
STATE = {"step": 3, "accuracy": 0.1 + 0.2, "name": "Möwe"}


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints: step 2, then step 3."""
    save_checkpoint(tmp_path, TENSORS, STATE | {"step": 2})
    save_checkpoint(tmp_path, TENSORS, STATE)
    return tmp_path


def loaded(folder):
    found, warnings = load_checkpoint(folder)
    assert found is not None
    return found, warnings


def test_a_checkpoint_comes_back_bit_exact(folder):
    found, warnings = loaded(folder)
    assert found.state == STATE and warnings == []
    assert found.tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(found.tensors[name], value) and found.tensors[name].dtype == value.dtype
    assert sorted(path.name for path in folder.iterdir()) == sorted([CURRENT, PREVIOUS])


def test_no_checkpoint_is_a_new_run(tmp_path):
    assert load_checkpoint(tmp_path) == (None, [])


def test_between_two_renames_the_previous_one_counts(folder):
    (folder / CURRENT).unlink()
    found, warnings = loaded(folder)
    assert found.state["step"] == 2 and warnings == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_changed_or_missing_byte_is_noticed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder, TENSORS, STATE | {"step": 2})
    save_checkpoint(folder, TENSORS, STATE)
    path = folder / CURRENT
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    path.write_bytes(bytes(content))
    found, warnings = loaded(folder)
    if found.state["step"] == 3:
        # Padding of the header, which means nothing.
        assert chr(content[place]).isspace() or found.state == STATE
        assert all(torch.equal(found.tensors[name], value) for name, value in TENSORS.items())
    else:
        (warning,) = warnings
        assert str(path) in warning and warning.endswith("the one before it is used")


def test_without_a_whole_one_the_message_names_both(folder):
    (folder / CURRENT).write_bytes((folder / CURRENT).read_bytes()[:-1])
    (folder / PREVIOUS).write_bytes(pickle.dumps({"os": "system"}))
    with pytest.raises(UsageError) as caught:
        load_checkpoint(folder)
    for part in (CURRENT, PREVIOUS, "damaged", "no whole checkpoint is left", "delete"):
        assert part in str(caught.value)


def test_files_of_others_are_refused(folder):
    (folder / PREVIOUS).unlink()
    save_file({"x": torch.zeros(2)}, folder / CURRENT)
    with pytest.raises(UsageError, match="no checkpoint of tcpa"):
        load_checkpoint(folder)
    header = {"format": "tcpa-checkpoint", "version": "9", "state": "{}", "sha256": ""}
    save_file({"x": torch.zeros(2)}, folder / CURRENT, header)
    with pytest.raises(UsageError, match="has format 9, expected 1"):
        load_checkpoint(folder)


def test_what_cannot_be_written_leaves_the_earlier_ones(folder):
    (folder / f".{CURRENT}.part").mkdir()
    before = (folder / CURRENT).read_bytes(), (folder / PREVIOUS).read_bytes()
    with pytest.raises(UsageError, match=r"could not be written .*; what was there before is"):
        save_checkpoint(folder, TENSORS, STATE | {"step": 4})
    assert ((folder / CURRENT).read_bytes(), (folder / PREVIOUS).read_bytes()) == before


# The run's folder around it.


def finished_run(tmp_path, **options):
    config = make_config(tmp_path, **options)
    run(config, make_splits())
    (folder,) = tmp_path.glob("*/*/*")
    return config, folder


def test_a_damaged_checkpoint_is_told_and_the_previous_one_goes_on(tmp_path, capsys):
    config, folder = finished_run(tmp_path)
    expected = json.loads((folder / "result.json").read_text())["accuracy"]
    (folder / "result.json").unlink()
    (folder / CURRENT).write_bytes(b"garbage" * 100)
    capsys.readouterr()
    assert run(config, make_splits()).accuracy == expected
    printed = capsys.readouterr().out
    assert "warning: " in printed and CURRENT in printed and "the one before it is used" in printed
    assert "resumes after step 6 of 6" not in printed and "resumes after step" in printed


def test_a_finished_run_is_not_repeated(tmp_path, capsys):
    config, folder = finished_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    found = run(config, make_splits())
    assert found.versions["torch"] == torch.__version__.split("+")[0]
    assert "is finished" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    del before[folder / ".lock"], after[folder / ".lock"]
    assert after == before


def test_another_configuration_is_refused_by_name(tmp_path):
    finished_run(tmp_path)
    with pytest.raises(UsageError) as caught:
        run(make_config(tmp_path, learning_rate=0.3, epochs=5), make_splits())
    message = str(caught.value)
    for part in ("recipe.epochs: got 5, expected 2", "config.json", "1 more", "--output"):
        assert part in message


def test_a_start_that_fails_before_its_first_step_leaves_nothing(tmp_path, monkeypatch):
    for name in ("describe_environment", "_pipeline_rate", "Journal", "_introduce"):
        with monkeypatch.context() as patch:
            patch.setattr(running, name, functools.partial(fail, name))
            with pytest.raises(UsageError, match=name):
                run(make_config(tmp_path / "runs", tensorboard=True), make_splits())
        assert not list(tmp_path.glob("runs/*")), name
    # Nobody is bound by it; what others left stays.
    (tmp_path / "runs/cub/vfpt+tcpa/official-seed3407").mkdir(parents=True)
    (tmp_path / "runs/cub/vfpt+tcpa/official-seed3407/log.txt").write_text("")
    with pytest.raises(UsageError, match="--weights"):
        run(make_config(tmp_path / "runs", weights="missing.pth"), make_splits())
    assert [p.name for p in tmp_path.glob("runs/*/*/*/*")] == ["log.txt"]
    run(make_config(tmp_path / "runs", epochs=1), make_splits())


def fail(name, *_, **__):
    raise UsageError(name)


def test_a_later_start_that_fails_removes_nothing(tmp_path, monkeypatch):
    config, folder = finished_run(tmp_path)
    (folder / "result.json").unlink()
    before = sorted(path.name for path in folder.rglob("*"))
    monkeypatch.setattr(running, "_pipeline_rate", functools.partial(fail, "later"))
    with pytest.raises(UsageError, match="later"):
        run(config, make_splits())
    assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "[]", "config.json: got a JSON list, expected the configuration with"),
        ("config.json", "3", "config.json: got a JSON int, expected the configuration with"),
        ("config.json", None, "config.json: got no such file, expected the configuration with"),
        (
            "config.json",
            '{"recipe": []}',
            r"normalization: got \{.*\}, expected None as in .* 2 more",
        ),
        ("environment.json", "[]", r"environment.json: got \[\], expected an entry for every"),
        ("environment.json", "{}", r"environment.json: got \{\}, expected an entry for every"),
        ("environment.json", "[3]", r"environment.json: got \[3\], expected an entry for every"),
        ("environment.json", '[{"data": {}}]', "environment.json: got .*, expected an entry for"),
    ],
)
def test_damaged_records_are_named(file, text, message, tmp_path):
    config, folder = finished_run(tmp_path)
    (folder / "result.json").unlink()
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        run(config, make_splits())
    assert len(str(caught.value)) < 600 and (folder / CURRENT).exists()


def test_a_message_shows_no_whole_configuration():
    assert brief([1, 2]) == "[1, 2]"
    assert re.fullmatch(r"\[0, 1, .{60,80} \.\.\.", brief(list(range(500))))


def test_a_removed_lock_holds_nothing(tmp_path):
    """Who opened the file before its owner removed it takes the new one."""
    folder = tmp_path / "run"
    flock, opened = fcntl.flock, []

    def removed_meanwhile(file, how):
        if not opened:
            (folder / ".lock").unlink()
        opened.append(file.name)
        flock(file, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcpa.train.engine.rundir.fcntl.flock", removed_meanwhile)
        with claim(folder, {}):
            assert len(opened) == 2 and (folder / ".lock").exists()
            with pytest.raises(UsageError, match="in use by another process"), claim(folder, {}):
                pass


def test_options_that_change_no_result_may_differ(tmp_path):
    finished_run(tmp_path)
    config = make_config(tmp_path, log_steps=7, checkpoint_seconds=3.0, tensorboard=True)
    run(config, make_splits())


def test_other_weights_or_images_are_refused_on_the_way(tmp_path):
    torch.manual_seed(1)
    for name in ("one", "other"):
        state = timm.create_model("test_vit", img_size=32, num_classes=0).state_dict()
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "w.safetensors")

    def start(weights, key="a"):
        splits = replace(make_splits(), record={"train": {"images": 22, "cache": {"key": key}}})
        path = str(tmp_path / weights / "w.safetensors")
        return run(make_config(tmp_path / "runs", weights=path), splits)

    start("one")
    (result,) = tmp_path.glob("runs/*/*/*/result.json")
    result.unlink()
    for arguments, message in (
        (("other",), "backbone: got"),
        (("one", "b"), "data.train.key: got b, expected a"),
    ):
        with pytest.raises(UsageError, match=f"{message}.*restore those weights and images"):
            start(*arguments)
    # The same file in another place is the same.
    (tmp_path / "moved").mkdir()
    (tmp_path / "one" / "w.safetensors").rename(tmp_path / "moved" / "w.safetensors")
    start("moved")


def test_differences_are_named_by_path():
    before = {"a": {"b": [1, 2], "c": 3}, "d": None}
    assert differences(before, {"a": {"b": (1, 2), "c": 4}, "e": 1, "d": None}) == [
        ("a.c", 3, 4),
        ("e", None, 1),
    ]


def test_a_folder_has_one_run_at_a_time(tmp_path):
    refused = pytest.raises(UsageError, match="in use by another process")
    with claim(tmp_path, {}), refused, claim(tmp_path, {}):
        pass
    with claim(tmp_path, {}):
        pass


def test_a_file_in_the_way_of_the_output_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--output: got .*, expected a folder that can be"):
        run(make_config(tmp_path / "file"), make_splits())


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    journal = Journal(tmp_path, keep=0, step=0, tensorboard=False)
    journal.add("steps", 1, {"loss": 0.5}, epoch=1)
    kept = journal.sync()
    journal.add("steps", 2, {"loss": 0.25}, epoch=1)
    journal.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "ste')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    again = Journal(tmp_path, keep=kept, step=1, tensorboard=False)
    again.add("steps", 2, {"loss": 0.125}, epoch=1)
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.125)]


def test_metrics_that_are_lost_are_told(tmp_path):
    with pytest.raises(UsageError, match="got 0 bytes, expected 10 or more"):
        Journal(tmp_path, keep=10, step=1, tensorboard=False)
