"""Package description. The folders stay at the top level and install inside the package `tcpa`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = {"tcpa.kernels": "kernels", "tcpa.train": "train", "tcpa.bench": "bench"}
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "tcpa" / "provenance.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)


def packages() -> dict[str, str]:
    """Map every package to its folder."""
    found = {"tcpa": "tcpa"} | {f"tcpa.{inner}": f"tcpa/{inner}" for inner in find_packages("tcpa")}
    for package, folder in FOLDERS.items():
        found[package] = folder
        for inner in find_packages(folder):
            found[f"{package}.{inner}"] = f"{folder}/{inner.replace('.', '/')}"
    return found


TRAIN = ["tyro>=1,<2", "rich", "tensorboard>=2.21", "scipy", "huggingface_hub"]
TRAIN += ["torchvision", "pillow", "filelock"]
PLOT = ["matplotlib", "scikit-learn"]
PROFILE = ["torch-tb-profiler==0.4.3"]
DEV = [*TRAIN, *PLOT, *PROFILE, "pytest", "pytest-xdist", "hypothesis", "ruff", "pyright[nodejs]"]
DEV += ["setuptools>=77"]

setup(
    name="tcpa",
    version=VERSION,
    description="Token Coordinated Prompt Attention for timm Vision Transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=list(packages()),
    package_dir=packages(),
    package_data={
        "tcpa.train.demo": ["*.safetensors", "*.json"],
        "tcpa.train.report": ["*.csv"],
        "tcpa.kernels": ["launches/*.json"],
    },
    install_requires=[
        "torch>=2.11",
        "triton; platform_system=='Linux'",
        "timm>=1.0.26",
        "numpy",
        "safetensors",
    ],
    extras_require={"train": TRAIN, "plot": PLOT, "profile": PROFILE, "dev": DEV},
    entry_points={
        "console_scripts": [
            "tcpa-train=tcpa.train.__main__:main",
            "tcpa-bench=tcpa.bench.__main__:main",
        ]
    },
)
