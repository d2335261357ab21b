"""Promise: every command and the example of the README work."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from dataset_trees import write_tree

from tcpa.train.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.S | re.M)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in FENCES
    for line in block.splitlines()
    if not language and line.strip()
]
PROGRAMS = "torchrun|tcpa-train (data|run|sweep|report|search|ablate cub)"
TRAINING = [c for c in COMMANDS if re.match(PROGRAMS, c)]
(EXAMPLE,) = [block for language, block in FENCES if language == "python"]
TESTED_ELSEWHERE = {
    "make test": "this run",
    "python -m tcpa.verify tests/golden/*.npz": "test_golden.py, file by file",
    "python -m tcpa.verify --plain tests/golden/vfpt_deep_10.npz": "test_golden.py, every file",
    "tcpa-train inspect --demo": "test_inspect_command.py, with --quick",
    "tcpa-train methods": "test_train_methods_command.py, with a small backbone",
    **dict.fromkeys(TRAINING, "test_training_commands"),
}
QUICK = ["--quick", "--output", "TMP/out"]
SMALL = shlex.split(
    "--backbone test_vit --weights none --image-size 32 --resize 40 --epochs 1 --batch-size 8 "
    "--precision fp32 --device cpu --no-tensorboard"
)


def run(arguments, cwd):
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_the_readme_has_the_two_commands():
    assert "make demo" in COMMANDS and "make test" in COMMANDS
    assert TESTED_ELSEWHERE.keys() <= set(COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in TESTED_ELSEWHERE])
def test_commands(command, tmp_path, monkeypatch):
    """In this process, which has done the imports."""
    program, *arguments = shlex.split(command)
    if program == "make":
        # What the target runs, shortened; `make -n` shows that it is the same program.
        planned = run(["make", "-n", *arguments], ROOT).stdout
        assert f"-m tcpa.train {arguments[0]}" in planned
        program = "tcpa-train"
    quick = program == "tcpa-train" and arguments[0] in ("demo", "ablate", "inspect")
    if quick and "--help" not in arguments:
        arguments += [word for word in QUICK if word not in arguments]
    (entry,) = entry_points(group="console_scripts", name=program)
    assert shutil.which(program, path=str(Path(sys.executable).parent)), f"{program} is missing"
    monkeypatch.chdir(ROOT)
    try:
        status = entry.load()([word.replace("TMP", str(tmp_path)) for word in arguments])
    except SystemExit as end:
        status = end.code
    assert status == 0


def test_training_commands(tmp_path, monkeypatch, capsys):
    """In their order, on a generated CUB, with a small model and one epoch."""
    write_tree("cub", tmp_path / "data", classes=3, per_class=4)
    monkeypatch.chdir(tmp_path)
    said = {}
    for command in TRAINING:
        program, *arguments = shlex.split(command)
        expected = 0
        if program == "torchrun":
            # No GPUs: fewer processes, on the CPU.
            arguments[arguments.index("8")] = "2"
        if "run" in arguments:
            arguments += SMALL
        elif arguments[0] in ("sweep", "search", "ablate"):
            # So many real runs are too many; the commands' own tests start real ones.
            arguments += [*SMALL, "--print-jobs"]
        elif "prepare" in arguments:
            arguments += ["--offline"]
        elif "verify" in arguments:
            expected = 2
        if program == "torchrun":
            done = run([str(Path(sys.executable).parent / program), *arguments], tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            assert main(arguments) == expected
        said[" ".join(arguments[:2])] = "".join(capsys.readouterr())
    assert "train (official): got 10 images, expected 5,394" in said["data verify"]
    assert len(said["sweep hta"].splitlines()) == 30
    assert len(said["sweep table1"].splitlines()) == 200
    assert len(said["search vpt-deep"].splitlines()) == 36
    assert len(said["ablate cub"].splitlines()) == 9
    assert "2 runs counted" in said["report runs"]
    assert (tmp_path / "report" / "report.html").is_file()
    assert (tmp_path / "data" / "archives" / "cub").is_dir() and (tmp_path / "data/cache").is_dir()
    found = {path.name for path in (tmp_path / "runs/cub/vfpt+tcpa").iterdir()}
    assert found == {"official-seed3407", "official-seed4"}


def test_the_example(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(EXAMPLE, encoding="utf-8")
    done = run([sys.executable, str(script)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_paths_that_the_readme_names_exist():
    for path in re.findall(r"`((?:tcpa|kernels|train|bench|tests|examples)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path


def test_the_tree_of_contributing_exists():
    """Every name in its tree that ends in .py or in a slash, below its folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folder, found = "", set()
    for line in re.search(r"^```\n(.*?)^```$", text, flags=re.S | re.M)[1].splitlines():
        names = re.findall(r"(?<!\S)([\w]+(?:\.py|/))", line)
        folder = names.pop(0) if not line.startswith(" ") else folder
        found |= {folder, *(folder + name for name in names)}
    assert not [path for path in sorted(found) if not (ROOT / path).exists()]
    assert len(found) > 20
