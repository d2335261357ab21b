"""With what a run was made: versions, commit, device; one entry for every start of the run."""

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tcpa

from .distributed import World

ENVIRONMENT = "environment.json"
PACKAGES = ("torch", "timm", "triton", "torchvision", "numpy", "safetensors")


def describe_environment(world: World) -> dict[str, Any]:
    """Return versions, commit and device of this process, as JSON data."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "system": f"{platform.system()} {platform.machine()}",
        "device": _device_name(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, of this library and of what it computes with."""
    found = {"python": platform.python_version(), "tcpa": tcpa.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.cpu.get_capabilities().get('cpu_name', platform.processor())} ({device.type})"


def _git(*arguments: str) -> str:
    """Ask git about the checkout that this file is in; "" where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
