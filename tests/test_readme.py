"""Promise: every command and the example of the README work."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.S | re.M)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in FENCES
    for line in block.splitlines()
    if not language and line.strip()
]
(EXAMPLE,) = [block for language, block in FENCES if language == "python"]
TESTED_ELSEWHERE = {
    "make test": "this run",
    "python -m tcpa.verify tests/golden/*.npz": "test_golden.py, file by file",
}


def run(arguments, cwd):
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_the_readme_has_the_two_commands():
    assert "make demo" in COMMANDS and "make test" in COMMANDS
    assert TESTED_ELSEWHERE.keys() <= set(COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in TESTED_ELSEWHERE])
def test_commands(command, tmp_path):
    program, *arguments = shlex.split(command)
    if program == "make":
        # What the target runs, shortened; `make -n` shows that it is the same program.
        planned = run(["make", "-n", *arguments], ROOT).stdout
        assert f"-m tcpa.train {arguments[0]}" in planned
        output = ["--quick", "--output", str(tmp_path / "out")]
        words = [sys.executable, "-m", "tcpa.train", *arguments, *output]
    elif program == "python":
        words = [sys.executable, *arguments]
    else:
        found = shutil.which(program, path=str(Path(sys.executable).parent))
        assert found, f"{program} is not installed"
        words = [found, *arguments]
    done = run(words, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(EXAMPLE, encoding="utf-8")
    done = run([sys.executable, str(script)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_paths_that_the_readme_names_exist():
    for path in re.findall(r"`((?:tcpa|kernels|train|bench|tests)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
