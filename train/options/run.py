"""What a training run can be asked for."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ...cli import require
from .checks import (
    parse_normalization,
    require_different,
    require_gpus,
    require_name,
    require_range,
    require_seed,
)

try:
    from tyro.conf import Positional
except ModuleNotFoundError:
    # The command line says which extra is missing.
    Positional = None  # pyright: ignore[reportAssignmentType]

VTAB_PREFIX = "vtab-"
"""What the names of the tasks of VTAB-1k begin with."""

RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("epochs", "batch_size", "eval_batch_size", "pool_size"), (1, math.inf)),
    **dict.fromkeys(("resize", "image_size", "log_steps"), (1, math.inf)),
    **dict.fromkeys(("top_k", "random_selection_epochs", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("match_weight", "mixup_alpha", "checkpoint_seconds"), (0, math.inf)),
    **dict.fromkeys(("prompt_dropout", "label_smoothing"), (0, 1)),
    **dict.fromkeys(("prune_tokens", "prune_segments"), (0, 1)),
}
"""Option -> lowest value, and the one above all."""

Protocol = Literal["auto", "official", "val", "last", "tune"]
Precision = Literal["auto", "bf16", "bf16-autocast", "fp16", "fp32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """What `run` and `sweep` share."""

    data: Path = Path("data")
    """Folder that holds the datasets, as `data prepare` fills it."""

    cache: Path | None = None
    """Folder for decoded images; DATA/cache by default. Give a fast local disk."""

    output: Path = Path("runs")
    """Folder for all runs; one run goes to OUTPUT/DATASET/METHOD/PROTOCOL-seedN."""

    protocol: Protocol = "auto"
    """official: test after every epoch and report the best test epoch, as the official code does
    (chosen on the test images). val: choose the epoch on validation images, then test once.
    last: test once, after the last epoch. tune: validate once, after the last epoch, and test
    never. All of them train on the same part of the data, but for VTAB-1k, where official and last
    train on the validation images too. auto: last on VTAB-1k, as VPT does, else official."""

    backbone: str = "orig_in21k"
    """ViT-B/16 weights orig_in21k (those of the paper, as far as is known) or augreg_in21k, or any
    timm model name."""

    weights: str = "pretrained"
    """pretrained: timm's, from the hub or its local cache. none: random, for tests. Otherwise a
    file: .safetensors, .pth or .pt (state dict), .npz (Google)."""

    normalize: str = "imagenet"
    """Normalisation of the images: imagenet (official code), half (0.5 and 0.5, with which both
    in21k weights were trained), none (pixels of 0 to 1), or six numbers:
    MEAN,MEAN,MEAN,STD,STD,STD for pixels of 0 to 1."""

    vtab_source: Literal["auto", "original", "jpeg"] = "auto"
    """VTAB-1k: whether the images are the originals or lossy copies, which are not comparable;
    auto looks at the files. Recorded with every result."""

    input_prompt: str | None = None
    """What is done to the image, in place of the method's own: none, vp, dam-vp, autovp or lion."""

    tuning: str | None = None
    """What is trained besides, in place of the method's own: head, mlp-head, last-block,
    bias, adapter, adaptformer, side or full."""

    parity: bool = False
    """dam-vp, adapter: repeat the known bugs of the source, which are corrected otherwise."""

    mapping: Literal["head", "full", "frequency", "iterative"] | None = None
    """autovp: how classes come from the model: a linear head on the feature (the default), or the
    logits of the model's own head mapped by a linear layer, or by the source classes that training
    images are most often taken for, chosen once (frequency) or every epoch (iterative)."""

    mapping_sources: int | None = None
    """autovp: source classes of a class for frequency and iterative, 1 by default."""

    clusters: int | None = None
    """dam-vp: clusters of training images, 2 or more; the recipe's by default."""

    prune_tokens: float = 0.0
    """e2vpt: share of the prompt tokens to prune after the training, which is then done once more
    with what is left, from the first values (rewinding)."""

    prune_segments: float = 0.0
    """e2vpt: likewise, share of the segments of every token that is left."""

    meta_prompt: Path | None = None
    """dam-vp: frame from which those of all clusters start, a file of meta-training."""

    epochs: int | None = None
    """Passes over the training images; the recipe's by default."""

    batch_size: int | None = None
    """Images of a step, over all devices; the recipe's by default."""

    eval_batch_size: int | None = None
    """Images at once in an evaluation, over all devices; the batch size by default."""

    learning_rate: float | None = None
    """Peak of the schedule; the recipe's by default."""

    weight_decay: float | None = None
    """Weight decay on every parameter for which the recipe has none of its own; the recipe's by
    default."""

    match_weight: float | None = None
    """TCPA: weight of the match distance in the loss; the recipe's by default."""

    pool_size: int | None = None
    """TCPA: entries of the CLS pool and of the image pool; the recipe's by default."""

    top_k: int | None = None
    """TCPA: entries of each pool that a token sees; the recipe's by default."""

    random_selection_epochs: int | None = None
    """TCPA: first epochs with random selection; the recipe's by default."""

    prompt_dropout: float | None = None
    """Probability with which training zeroes a prompt element; the recipe's by default."""

    mixup_alpha: float | None = None
    """Parameter of Mixup's Beta distribution, 0 for none; the recipe's by default."""

    label_smoothing: float | None = None
    """Share of the target that is spread over all classes; the recipe's by default."""

    resize: int | None = None
    """Shorter side to which images are resized, pixels; the recipe's by default."""

    image_size: int | None = None
    """Side of the crop that the model sees, pixels; the recipe's by default."""

    precision: Precision = "auto"
    """bf16: frozen weights stored in bfloat16, trainable parameters in float32. bf16-autocast:
    float32 weights under autocast. fp16: float16 autocast with loss scaling, as the official code.
    fp32. auto: bf16 where the device computes it natively, else fp32."""

    eval_precision: Literal["train", "fp32"] = "train"
    """Precision of evaluations: that of the training, or float32 as in the official code."""

    choices: Path | None = None
    """Folder of searches (`search`): learning rate and weight decay are those chosen there for the
    dataset and the method, in place of the recipe's."""

    device: str = "auto"
    """Where to train: auto (a GPU if there is one), cpu, cuda, cuda:1, ... Under torchrun every
    process takes the GPU of its local rank."""

    compile: bool = False
    """Compile the model with torch.compile."""

    cuda_graph: bool = False
    """Replay every training step as one CUDA graph; for one CUDA device, without fp16."""

    resident: bool | None = None
    """Keep all images in the device's memory; by default where they fit."""

    log_steps: int = 50
    """Steps between two looks at the loss, which wait for the device."""

    checkpoint_seconds: float = 30.0
    """Seconds of work that a killed run may lose at most, apart from the last LOG_STEPS steps; 0
    saves at every look at the loss."""

    tensorboard: bool = True
    """Also write scalars for TensorBoard, in the run's folder."""

    def __post_init__(self) -> None:
        parse_normalization(self.normalize)
        for name in RANGES:
            require_range(name, getattr(self, name), *RANGES[name])
        rate = self.learning_rate
        above = rate is None or 0 < rate < math.inf
        require(above, "--learning-rate", rate, "a number above 0", "leave it out for the recipe's")

    def run_of(self, *, dataset: str, method: str, seed: int | None, **changes: Any) -> "RunConfig":
        """Return the configuration of one run with these options, but for some changes."""
        shared = {name: getattr(self, name) for name in TrainOptions.__dataclass_fields__}
        return RunConfig(dataset=dataset, method=method, seed=seed, **shared | changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(TrainOptions):
    """Train one method on one dataset; started again, the same command resumes where it was."""

    dataset: Annotated[str, Positional]
    """One of the ten HTA datasets (dtd, cub, nabirds, stanford_dogs, flower102, food101, cifar100,
    cifar10, gtsrb, svhn), a task of VTAB-1k (vtab-dtd for instance), or `folder` for images of your
    own."""

    method: str = "vfpt+tcpa"
    """Row of the paper's tables: full, linear, partial-1, mlp-3, bias, sidetune, adapter,
    adaptformer, e2vpt, lion, gated-prompt, vp, vpt-shallow, vpt-deep, dam-vp, autovp, vfpt,
    vp+tcpa, vpt+tcpa, dam-vp+tcpa, autovp+tcpa or vfpt+tcpa."""

    seed: int | None = None
    """Decides initial values, order of the images, augmentation and dropout; the recipe's 3407 by
    default."""

    def __post_init__(self) -> None:
        if self.protocol == "auto":
            usual: Protocol = "last" if self.dataset.startswith(VTAB_PREFIX) else "official"
            object.__setattr__(self, "protocol", usual)
        TrainOptions.__post_init__(self)
        require_name("DATASET", self.dataset)
        require_name("--method", self.method)
        if self.seed is not None:
            require_seed("--seed", self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig(TrainOptions):
    """Train every method on every dataset with every seed: one job per GPU, or one after the other.

    Finished runs are skipped and interrupted ones resume, so that the command can be repeated.
    """

    datasets: Annotated[tuple[str, ...], Positional] = ("hta",)
    """Datasets; hta stands for all ten, vtab for the nineteen tasks of VTAB-1k, vtab-natural,
    vtab-specialized and vtab-structured for its groups; table1 and table2 for a published table:
    its datasets with all its methods."""

    methods: tuple[str, ...] | None = None
    """Methods, see `run`; by default vfpt+tcpa, and those of table1 and table2."""

    seeds: tuple[int, ...] | None = None
    """One run of every method on every dataset for each of them; by default 3407, and on VTAB-1k
    VPT's five: 42, 44, 82, 100, 800."""

    gpus: tuple[int, ...] | None = None
    """GPUs to use, one job at a time each; all by default."""

    print_jobs: bool = False
    """Print the command of every run on a line of its own, for an array job, and run nothing."""

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        for option, values in (("DATASETS", self.datasets), ("--methods", self.methods)):
            if values is not None:
                require_different(option, values)
                for value in values:
                    require_name(option, value)
        if self.seeds is not None:
            require_different("--seeds", self.seeds)
            for seed in self.seeds:
                require_seed("--seeds", seed)
        require_gpus(self.gpus)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipesConfig:
    """Print the recipes of the official scripts."""

    csv: bool = False
    """Print every cell as comma-separated values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Compare runs with the published tables: one HTML page, Markdown and CSV."""

    folders: Annotated[tuple[Path, ...], Positional] = (Path("runs"),)
    """Folders of runs, or folders that hold some at any depth."""

    output: Path = Path("report")
    """Folder for report.html, report.md, table1.csv, table2.csv and vtab.csv (group means and tasks
    of VTAB-1k) and times.csv; earlier ones are replaced."""

    def __post_init__(self) -> None:
        require_different("FOLDERS", self.folders)
