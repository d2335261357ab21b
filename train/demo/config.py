"""What the demo's commands can be asked for. Imports nothing heavy, so that --help is quick."""

from dataclasses import dataclass
from pathlib import Path

from ..usage import require


def _require_count(name: str, value: int) -> None:
    require(value >= 1, name, value, "an integer of 1 or more", "ask for at least one")


def _require_seeds(seeds: tuple[int, ...]) -> None:
    _require_count("--seeds", len(seeds))
    distinct = len(set(seeds)) == len(seeds) and min(seeds) >= 0
    require(distinct, "--seeds", seeds, "different integers from 0", "change them")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Compare linear probe, VPT-deep and TCPA on 1,797 handwritten digits, in about two minutes."""

    output: Path = Path("demo_output")
    """Folder for metrics, figures and the TCPA adapter; an earlier demo in it is replaced."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every method per seed; a seed decides initial values and order of the images."""

    epochs: int = 20
    """Passes over the training images."""

    device: str = "auto"
    """Where to train: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""

    quick: bool = False
    """Only see that all works: one seed, two epochs, 300 images. The figures mean nothing."""

    def __post_init__(self) -> None:
        _require_count("--epochs", self.epochs)
        _require_seeds(self.seeds)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """Choose the demo's learning rates: the same grid for every method, on validation images.

    The test images are not used. About ten minutes on two CPU cores.
    """

    output: Path = Path("learning_rates.json")
    """File to write: accuracies of the whole grid, and the best rate of every method."""

    grid: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates to try, peaks of the schedule."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every method and learning rate per seed; the best mean accuracy decides."""

    epochs: int = 20
    """Passes over the training images, as in the demo."""

    device: str = "auto"
    """Where to train: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        _require_count("--epochs", self.epochs)
        _require_seeds(self.seeds)
        _require_count("--grid", len(self.grid))
        usable = len(set(self.grid)) == len(self.grid) and 0 < min(self.grid) <= max(self.grid) < 10
        require(usable, "--grid", self.grid, "different numbers between 0 and 10", "change them")


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Pretrain the demo's small ViT on generated images and write its weights.

    About six minutes on two CPU cores. Set OMP_WAIT_POLICY=PASSIVE if the machine does other work.
    """

    output: Path = Path("demo_vit.safetensors")
    """File to write, safetensors."""

    seed: int = 0
    """Chooses the formulas, the images, the initial weights and the order."""

    images_per_class: int = 256
    """Training images of each of the 128 formulas."""

    epochs: int = 12
    """Passes over the training images."""

    batch_size: int = 128
    """Images in a step."""

    learning_rate: float = 1e-3
    """Peak of the schedule (AdamW)."""

    weight_decay: float = 0.05
    """Weight decay of the matrices (AdamW)."""

    def __post_init__(self) -> None:
        for name in ("images_per_class", "epochs", "batch_size"):
            _require_count("--" + name.replace("_", "-"), getattr(self, name))
        positive = "a positive number"
        rate = self.learning_rate
        require(rate > 0, "--learning-rate", rate, positive, "the default is 0.001")
        require(self.seed >= 0, "--seed", self.seed, "an integer from 0", "choose another")
