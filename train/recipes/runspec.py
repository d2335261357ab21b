"""From what a user asked for to what a run does: the recipe with all options put over it."""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tcpa.checks import did_you_mean

from ...cli import UsageError, require
from ...methods.base import MethodConfig
from ..backbones import model_name, sha256
from ..data.splits import NAMES
from ..data.vtab_tasks import VTAB
from ..options.checks import parse_normalization
from ..options.run import Precision, RunConfig
from .choices import Choice, read_choice, require_conditions
from .recipe import Recipe, compose, recipe
from .rows import GRID

DIRECT = {
    "epochs": "epochs",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "mixup_alpha": "mixup_alpha",
    "label_smoothing": "label_smoothing",
    "resize": "resize",
    "image_size": "crop",
    "seed": "seed",
}
"""Option -> field of the recipe that it replaces."""

POOLS: dict[str, tuple[str, ...]] = {
    "match_weight": ("match_weight",),
    "random_selection_epochs": ("random_selection_epochs",),
    "pool_size": ("cls_pool_size", "image_pool_size"),
    "top_k": ("cls_top_k", "image_top_k"),
}
"""Option -> settings of token prompts with pools that it replaces."""

MAPPINGS = {"mapping": ("mapping",), "mapping_sources": ("sources",)}
"""Option -> setting of a prompt on the image with an output mapping that it replaces."""

CLUSTERS = {"clusters": ("num_clusters",)}
"""Option -> setting of a prompt on the image with clusters that it replaces."""

DECISIVE = (
    "protocol",
    "backbone",
    "weights",
    "normalize",
    "precision",
    "eval_precision",
    "compile",
    "cuda_graph",
)
"""Options that are part of no recipe and still change what a run computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec(Recipe):
    """What a run does, complete: a recipe with all options put over it, and how and where it runs.

    What a recipe lacks are options of `tcpa-train run`; `RunConfig` explains them.
    """

    data: Path
    cache: Path | None
    output: Path
    protocol: Literal["official", "val", "last", "tune"]
    backbone: str
    weights: str
    normalize: str
    vtab_source: Literal["auto", "original", "jpeg"]
    meta_prompt: Path | None
    eval_batch_size: int | None
    precision: Precision
    eval_precision: Literal["train", "fp32"]
    device: str
    compile: bool
    cuda_graph: bool
    resident: bool | None
    log_steps: int
    checkpoint_seconds: float
    tensorboard: bool

    @property
    def title(self) -> str:
        """What messages call the run."""
        return f"{self.dataset}, {self.method}, seed {self.seed}"

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the channels."""
        return parse_normalization(self.normalize)

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        name = f"{self.protocol}-seed{self.seed}"
        if self.protocol == "tune":
            # One folder for each pair of a search.
            name = f"tune-lr{self.learning_rate}-wd{self.weight_decay}-seed{self.seed}"
        return self.output / self.dataset / self.method / name

    def describe(self) -> dict[str, Any]:
        """Return everything that decides a result, as JSON: what `config.json` of a run holds.

        Runs with equal descriptions compute the same; a run resumes only with the same one.
        """
        mean, std = self.normalization
        values = dataclasses.asdict(self)
        options = {name: values[name] for name in DECISIVE}
        # A file may move; its content is compared where it is loaded.
        options["weights"] = Path(self.weights).name
        if self.meta_prompt is not None:
            options["meta_prompt"] = sha256(self.meta_prompt)
        if self.dataset in VTAB:
            options["vtab_source"] = self.vtab_source
        found = {
            "recipe": {field.name: values[field.name] for field in dataclasses.fields(Recipe)},
            "options": options,
            "normalization": {"mean": list(mean), "std": list(std)},
        }
        if self.dataset == "folder":
            # Any folder has this dataset's name: a finished run must not answer for another one.
            found["folder"] = self.data.resolve().name
        return found


OPTIONS = [field.name for field in dataclasses.fields(RunSpec)][len(dataclasses.fields(Recipe)) :]
"""Options of `run` that a resolved run keeps as they are."""


def resolve(config: RunConfig) -> RunSpec:
    """Return what a run does: its recipe with the options that were given in place of its values.

    Raises:
        UsageError: there is no such dataset, an option does not fit the method, or values do not
            fit each other.
    """
    hint = did_you_mean(config.dataset, NAMES, "choose one of these")
    known = config.dataset in NAMES
    require(known, "DATASET", repr(config.dataset), ", ".join(NAMES), hint)
    # Now, and not when it is loaded: an earlier run in the folder would be spoken of first.
    model_name(config.backbone)
    chosen = {"input_prompt": config.input_prompt, "tuning": config.tuning}
    usual = recipe(config.dataset, compose(config.method, parity=config.parity, **chosen))
    values = {field.name: getattr(usual, field.name) for field in dataclasses.fields(usual)}
    given = {field: getattr(config, option) for option, field in DIRECT.items()}
    values |= {field: value for field, value in given.items() if value is not None}
    if config.learning_rate is not None:
        # The peak itself, whatever the batch.
        values["rate_batch"] = 0
    choice = None
    if config.choices is not None:
        choice = read_choice(config.choices, config.dataset, usual.method)
        values |= _chosen(config, usual, choice)
    values["prompts"] = _with_prompts(config, usual.prompts)
    values["input_prompt"] = _with_input(config, usual.input_prompt)
    spec = RunSpec(**values, **{name: getattr(config, name) for name in OPTIONS})
    spec = _with_pruning(config, spec)
    if spec.dataset in VTAB:
        option, remedy = config.resize, "images of VTAB-1k are resized to --image-size, both sides"
        require(option in (None, spec.crop), "--resize", option, str(spec.crop), remedy)
        spec = replace(spec, resize=spec.crop)
    small, remedy = spec.crop <= spec.resize, "change --resize or --image-size"
    require(small, "--image-size", spec.crop, f"at most --resize ({spec.resize})", remedy)
    if choice is not None and config.choices is not None:
        require_conditions(choice, spec.describe(), config.choices)
    return spec


def _chosen(config: RunConfig, usual: Recipe, choice: Choice) -> dict[str, Any]:
    """Return what a search chose, as fields of the recipe."""
    for option in ("learning_rate", "weight_decay"):
        name, value = f"--{option.replace('_', '-')}", getattr(config, option)
        require(value is None, name, value, "none with --choices", "leave one of them out")
    # The peak itself, whatever the batch.
    rates = {"learning_rate": choice.learning_rate, "rate_batch": 0}
    note = usual.note.replace(GRID, "rate and decay were chosen on validation images")
    return rates | {"weight_decay": choice.weight_decay, "chosen": choice.grid, "note": note}


def _with_prompts(config: RunConfig, prompts: Any) -> Any:
    """Return token prompts with the options that were given."""
    if _has(prompts, POOLS["top_k"]):
        _require_entries(config, prompts)
    prompts = _with(config, prompts, POOLS, "with TCPA")
    dropout = "dropout" if prompts is None else prompts.dropout_setting
    return _with(config, prompts, {"prompt_dropout": (dropout,)}, "with prompts")


def _require_entries(config: RunConfig, prompts: Any) -> None:
    """Check --top-k against --pool-size; either may be the recipe's."""
    for pool in ("cls", "image"):
        given, usual = config.pool_size, getattr(prompts, f"{pool}_pool_size")
        entries = usual if given is None else given
        top_k = getattr(prompts, f"{pool}_top_k") if config.top_k is None else config.top_k
        enough = top_k <= entries or prompts.coordination == "role"
        if config.top_k is not None:
            pair, remedy = f"the {pool} pool's {entries} entries", "lower it or raise --pool-size"
            require(enough, "--top-k", top_k, f"at most {pair}", remedy)
        told = f"{top_k} or more, which a token sees of the {pool} pool"
        require(enough, "--pool-size", entries, told, "raise it or lower --top-k")


def _with_input(config: RunConfig, prompt: Any) -> Any:
    """Return a prompt on the image with the options that were given."""
    clustered = "with DAM-VP's clusters"
    made = _with(config, prompt, MAPPINGS, "with AutoVP")
    if config.mapping_sources is not None:
        counts, remedy = made.mapping in ("frequency", "iterative"), "leave it out"
        got = f"{config.mapping_sources} with --mapping {made.mapping}"
        require(counts, "--mapping-sources", got, "--mapping frequency or iterative", remedy)
    made = _with(config, made, CLUSTERS, clustered)
    path = config.meta_prompt
    if path is not None:
        _require_method(config, "meta_prompt", _has(made, CLUSTERS["clusters"]), clustered)
        require(path.is_file(), "--meta-prompt", path, "a file of meta-training", "check the path")
    return made


def _with_pruning(config: RunConfig, spec: RunSpec) -> RunSpec:
    shares = {"prune_tokens": config.prune_tokens, "prune_segments": config.prune_segments}
    for option in (option for option, share in shares.items() if share > 0):
        _require_method(config, option, _has(spec.prompts, ("segments",)), "with E2VPT")
    if not any(shares.values()):
        return spec
    return replace(spec, epochs=2 * spec.epochs, rounds=2, **shares)


def _with(
    config: RunConfig,
    choice: MethodConfig | None,
    options: dict[str, tuple[str, ...]],
    expected: str,
) -> Any:
    """Return a choice of the method with the options that were given in place of its settings."""
    given = {o: value for o in options if (value := getattr(config, o)) is not None}
    for option in given:
        _require_method(config, option, _has(choice, options[option]), expected)
    if choice is None or not given:
        return choice
    settings = {name: option for option in given for name in options[option]}
    try:
        return choice.replace(**{name: given[option] for name, option in settings.items()})
    except ValueError as error:
        # The setting that does not fit may be one that another option changed.
        name, _, told = str(error).partition(": ")
        option = settings.get(name)
        text = told if option else str(error)
        raise UsageError(f"{_flag(option or next(iter(given)))}: {text}") from None


def _has(choice: MethodConfig | None, settings: tuple[str, ...]) -> bool:
    return choice is not None and choice.has(*settings)


def _require_method(config: RunConfig, option: str, usable: bool, expected: str) -> None:
    got = f"{getattr(config, option)} with --method {config.method}"
    require(usable, _flag(option), got, f"a method {expected}", "leave it out")


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
