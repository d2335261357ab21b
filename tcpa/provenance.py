"""With what, where and when something is computed: commit, versions, device, date."""

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

__version__ = "0.1.0"


def commit(length: int = 40) -> str:
    """Return the git commit of the library; "" outside a checkout."""
    return _git("rev-parse", f"--short={length}", "HEAD")


def has_changes() -> bool:
    """Tell whether the checkout differs from its commit."""
    return bool(_git("status", "--porcelain", "--untracked-files=no"))


def version(package: str) -> str:
    """Return the version of an installed package; "" without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def driver(device: torch.device) -> str:
    """Return the version of a GPU's driver; "" on a CPU."""
    if device.type != "cuda":
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return next(iter(output_of(query).splitlines()), f"hip {torch.version.hip}")


def system() -> str:
    """Return operating system and machine."""
    return f"{platform.system()} {platform.machine()}"


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def output_of(command: list[str]) -> str:
    """Return what a command prints; "" if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _git(*arguments: str) -> str:
    return output_of(["git", "-C", str(Path(__file__).parent), *arguments])


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
