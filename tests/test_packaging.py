"""Promise: a wheel holds the whole library, under the package `tcpa` alone."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("tcpa", "kernels", "train", "bench")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(source / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_every_module_is_in_the_wheel(wheel):
    names = set(wheel.namelist())
    for folder in FOLDERS:
        prefix = "tcpa" if folder == "tcpa" else f"tcpa/{folder}"
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".safetensors", ".csv"):
                assert f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"tcpa"}


def test_the_wheel_names_commands_licence_and_dependencies(wheel):
    info = {n.split("/")[-1]: wheel.read(n).decode() for n in wheel.namelist() if "dist-info" in n}
    assert "tcpa-train = tcpa.train.__main__:main" in info["entry_points.txt"]
    assert "tcpa-bench = tcpa.bench.__main__:main" in info["entry_points.txt"]
    assert "Apache License" in info["LICENSE"]
    for requirement in ("torch>=2.11", "timm", "safetensors", "numpy"):
        assert f"Requires-Dist: {requirement}" in info["METADATA"]
    for requirement in ("tyro", "torchvision", "pillow", "filelock", "scipy"):
        found = f"Requires-Dist: {requirement}.*; extra == ['\"]train['\"]"
        assert re.search(found, info["METADATA"]), requirement


def test_importing_tcpa_does_not_import_triton():
    code = "import sys, tcpa; sys.exit('triton.language' in sys.modules)"
    # torch may import triton by itself; what counts is what tcpa adds.
    before = "import sys, torch, timm; sys.exit('triton.language' in sys.modules)"
    status = [subprocess.run([sys.executable, "-c", c]).returncode for c in (before, code)]
    assert status[1] <= status[0]
