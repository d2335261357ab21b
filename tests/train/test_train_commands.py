"""Promise: every command of `tcpa-train` explains itself, works from the command line, and says
what is wrong in one line."""

import ast
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
from dataset_trees import write_tree

from tcpa.train.__main__ import COMMANDS, main

SMALL = shlex.split(
    "--backbone test_vit --weights none --image-size 32 --resize 40 --epochs 1 --batch-size 8 "
    "--precision fp32 --device cpu --no-tensorboard"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with CUB and DTD in its folder `data`."""
    monkeypatch.chdir(tmp_path)
    for name in ("cub", "dtd"):
        write_tree(name, tmp_path / "data", classes=3, per_class=4)
    return tmp_path


def documented(config: type) -> dict[str, str]:
    """Return field -> the docstring under it, for a configuration and what it inherits from."""
    found = {}
    for kind in reversed(config.__mro__[:-1]):
        (node,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_field(name, capsys) -> None:
    config, module, function = COMMANDS[name]
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    texts = documented(config)
    assert texts.keys() == set(config.__dataclass_fields__), "every field has its text"
    for field, text in texts.items():
        option = "--" + field.replace("_", "-")
        assert option in shown or f"{field.upper()}" in shown
        assert text[:60] in shown, f"{field}: {text}"
    assert module and function


def test_the_usage_lists_every_command(capsys) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert main(["data", "-h"]) == 0
    shown = capsys.readouterr().out
    assert "data verify" in shown and "sweep" not in shown
    assert main([]) == 2 and main(["data"]) == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["rum", "cub"], ("unknown command 'rum'; did you mean 'run'?", "tcpa-train COMMAND")),
        (["data", "prepair"], ("'data prepair'; did you mean 'data prepare'?", "data verify")),
        (["--epochs", "3"], ("unknown command '--epochs'",)),
        (["run", "cub", "--epoch", "3"], ("--epochs", "tcpa-train run --help")),
        (["run"], ("DATASET", "tcpa-train run --help")),
        (["data", "verify"], ("NAME", "tcpa-train data verify --help")),
        (["run", "cub", "--epochs", "0"], ("--epochs: got 0, expected 1 or more",)),
        (["run", "cubs"], ("DATASET: got 'cubs'", "did you mean 'cub'?")),
        (["run", "cub", "--method", "tcpa"], ("--method: got 'tcpa'",)),
        (["run", "cub", "--data", "nowhere"], ("tcpa-train data prepare cub --data nowhere",)),
        (["sweep", "cub", "cub"], ("DATASETS: got cub, cub",)),
        (["sweep", "htaa"], ("DATASETS: got 'htaa', expected hta, dtd", "did you mean 'hta'?")),
        (["run", "folder", "--data", "mine"], ("mine: got no such folder", "check --data")),
        (["data", "prepare", "cubs"], ("got 'cubs'", "cub, nabirds")),
        (["report", "nowhere"], ("FOLDERS: got nowhere",)),
    ],
    ids=" ".join,
)
def test_mistakes_point_to_the_right_place(words, parts, here, capsys) -> None:
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    told = " ".join(re.sub(r"[│─]", " ", "".join(capsys.readouterr())).split())
    for part in parts:
        assert part in told
    assert "Traceback" not in told and not list(here.rglob("metrics.jsonl"))


def test_prepare_and_verify(here, capsys) -> None:
    assert main(["data", "prepare", "dtd", "--offline"]) == 0
    assert "tcpa-train data verify dtd --data data" in capsys.readouterr().out
    assert main(["data", "verify", "dtd"]) == 2
    printed = capsys.readouterr()
    assert "dtd official train      12 images" in printed.out
    assert "train (official): got 12 images, expected 1,880" in printed.err
    assert "`tcpa-train data prepare dtd --data data`" in printed.err


def test_a_run_is_done_once(here, capsys) -> None:
    words = ["run", "cub", "--method", "vfpt", *SMALL]
    assert main(words) == 0
    folder = here / "runs/cub/vfpt/official-seed3407"
    accuracy = json.loads((folder / "result.json").read_text())["accuracy"]
    written = (folder / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert main(words) == 0
    assert f"is finished: {accuracy:.2f} %" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == written


def test_a_start_that_failed_binds_nobody(here, capsys) -> None:
    assert main(["run", "cub", *SMALL, "--weights", "missing.pth"]) == 2
    assert "missing.pth" in capsys.readouterr().err
    assert not list(here.glob("runs/*")), "it leaves nothing"
    assert main(["run", "cub", *SMALL]) == 0
    assert main(["run", "cub", *SMALL, "--learning-rate", "1"]) == 2
    assert "recipe.learning_rate: got 1.0, expected 0.0015 as in" in capsys.readouterr().err


def test_a_sweep_starts_real_runs_and_prints_them_beside_the_paper(here, capsys) -> None:
    words = ["sweep", "cub", "dtd", "--seeds", "1", *SMALL]
    (here / "data/DTD/dtd/dtd/labels/test1.txt").rename(here / "moved")
    assert main(words) == 2
    printed = capsys.readouterr()
    assert "1 of 2 runs failed" in printed.err and "test1.txt" in printed.err
    assert re.search(r"CUB +│ +89\.5 │", printed.out)
    told = "not counted: runs/dtd/vfpt+tcpa/official-seed1: has not begun; the end of its log.txt: "
    assert f"{told}tcpa-train: data/DTD/dtd/dtd/labels/test1.txt: got no such file" in printed.out
    assert main(["report", "runs", "--output", "page"]) == 0
    assert told in capsys.readouterr().out
    (here / "moved").rename(here / "data/DTD/dtd/dtd/labels/test1.txt")
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "2 runs, 1 of them finished" in printed and "not counted" not in printed
    assert re.search(r"DTD +│ +71\.2 │", printed) and "INCOMPLETE data" in printed
    logs = list(Path("runs").rglob("log.txt"))
    assert len(logs) == 2


def test_recipes_are_printed(capsys) -> None:
    assert main(["recipes", "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11
