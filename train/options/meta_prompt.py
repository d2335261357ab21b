"""What a meta-training can be asked for."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...cli import require
from .run import RunConfig

try:
    from tyro.conf import Positional
except ModuleNotFoundError:
    # The command line says which extra is missing.
    Positional = None  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaPromptConfig:
    """Find one frame from which DAM-VP's frames start on other datasets, by Reptile.

    `run --method dam-vp --meta-prompt FILE` starts from it. In float32, on one device; no test
    image is read.
    """

    datasets: Annotated[tuple[str, ...], Positional]
    """Datasets to learn from, see `run`; the original took six, none of which it was tested on."""

    data: Path = Path("data")
    """Folder that holds the datasets, as `data prepare` fills it."""

    cache: Path | None = None
    """Folder for decoded images; DATA/cache by default."""

    output: Path = Path("meta_prompt.safetensors")
    """File to write; an earlier one is replaced when the training has ended."""

    backbone: str = "orig_in21k"
    """As for `run`; the meta-prompt fits models of the same image size alone."""

    weights: str = "pretrained"
    """As for `run`."""

    normalize: str = "imagenet"
    """As for `run`."""

    epochs: int = 200
    """Passes over the largest dataset (DAM-VP's code: 200)."""

    batch_size: int = 128
    """Images of a step of one dataset."""

    learning_rate: float = 1.0
    """Of the frames' SGD steps, annealed by a cosine."""

    update_steps: int = 4
    """SGD steps of a dataset's frames before the meta-prompt moves."""

    seed: int = 2023
    """Decides the first values, the order of the images and the random weights of --weights
    none."""

    resize: int | None = None
    """Shorter side to which images are resized, pixels; the recipe's by default."""

    image_size: int | None = None
    """Side of the crop that the model sees, pixels; the recipe's by default."""

    device: str = "auto"
    """Where to train: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        shown = ", ".join(self.datasets) or "no value"
        different = 0 < len(self.datasets) == len(set(self.datasets))
        require(different, "DATASETS", shown, "one or more different datasets", "change them")
        for name in ("epochs", "update_steps"):
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            require(value >= 1, option, value, "1 or more", "leave it out for the default")
        rate, remedy = self.learning_rate, "leave it out for the default"
        require(0 < rate < math.inf, "--learning-rate", rate, "a number above 0", remedy)
        for dataset in self.datasets:
            # The other options are checked as those of a run.
            self.task(dataset)

    def task(self, dataset: str) -> RunConfig:
        """Return the run whose images, model and clusters a dataset contributes."""
        return RunConfig(
            dataset=dataset,
            method="dam-vp",
            protocol="tune",
            data=self.data,
            cache=self.cache,
            backbone=self.backbone,
            weights=self.weights,
            normalize=self.normalize,
            batch_size=self.batch_size,
            seed=self.seed,
            resize=self.resize,
            image_size=self.image_size,
            precision="fp32",
            device=self.device,
        )
