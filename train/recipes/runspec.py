"""From what a user asked for to what a run does: the recipe with the options put over it."""

import dataclasses
import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

import tcpa

from ...cli import UsageError, require
from ..backbones import model_name, sha256
from ..data.splits import NAMES
from ..data.vtab_tasks import VTAB
from ..options.run import RunConfig
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
"""Option -> fields of `TCPAConfig` that it replaces."""

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


def resolve(config: RunConfig) -> Recipe:
    """Return the recipe of a run with the options that were given in place of its values.

    Raises:
        UsageError: there is no such dataset, an option does not fit the method, or values do not
            fit each other.
    """
    near = difflib.get_close_matches(config.dataset, NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else "choose one of these"
    known = config.dataset in NAMES
    require(known, "DATASET", repr(config.dataset), ", ".join(NAMES), hint)
    # Now, and not when it is loaded: an earlier run in the folder would be spoken of first.
    model_name(config.backbone)
    chosen = {"input_prompt": config.input_prompt, "tuning": config.tuning}
    found = recipe(config.dataset, compose(config.method, parity=config.parity, **chosen))
    given = {field: getattr(config, option) for option, field in DIRECT.items()}
    given = {field: value for field, value in given.items() if value is not None}
    if "learning_rate" in given:
        # The peak itself, whatever the batch.
        given["rate_batch"] = 0
    choice = None
    if config.choices is not None:
        choice = read_choice(config.choices, config.dataset, found.method)
        given |= _chosen(config, found, choice)
    found = replace(found, prompts=_resolve_prompts(config, found.prompts), **given)
    found = _with_stages(config, _with_mapping(config, found))
    if config.dataset in VTAB:
        option, usual = config.resize, "images of VTAB-1k are resized to --image-size, both sides"
        require(option in (None, found.crop), "--resize", option, str(found.crop), usual)
        found = replace(found, resize=found.crop)
    small, remedy = found.crop <= found.resize, "change --resize or --image-size"
    require(small, "--image-size", found.crop, f"at most --resize ({found.resize})", remedy)
    if choice is not None and config.choices is not None:
        require_conditions(choice, describe(config, found), config.choices)
    return found


def _with_mapping(config: RunConfig, found: Recipe) -> Recipe:
    """Put in how AutoVP's classes come from the model."""
    given = {"mapping": config.mapping, "sources": config.mapping_sources}
    given = {field: value for field, value in given.items() if value is not None}
    if not given:
        return found
    prompt = found.input_prompt
    for option in ("mapping", "mapping_sources"):
        if getattr(config, option) is not None:
            _require_method(config, option, isinstance(prompt, tcpa.AutoVPConfig), "with AutoVP")
    assert isinstance(prompt, tcpa.AutoVPConfig)
    mapping = config.mapping or prompt.mapping
    counts = config.mapping_sources is None or mapping in ("frequency", "iterative")
    got = f"{config.mapping_sources} with --mapping {mapping}"
    require(counts, "--mapping-sources", got, "--mapping frequency or iterative", "leave it out")
    try:
        return replace(found, input_prompt=replace(prompt, **given))
    except ValueError as error:
        raise UsageError(f"--mapping-sources: {error}") from None


def _with_stages(config: RunConfig, found: Recipe) -> Recipe:
    """Put in what happens before and between the epochs."""
    clustered = isinstance(found.input_prompt, tcpa.DAMVPConfig)
    fits = config.meta_prompt is None or clustered
    got = f"{config.meta_prompt} with --method {found.method}"
    require(fits, "--meta-prompt", got, "a method with DAM-VP's clusters", "leave it out")
    there = config.meta_prompt is None or config.meta_prompt.is_file()
    require(there, "--meta-prompt", config.meta_prompt, "a file of meta-training", "check the path")
    if config.clusters is not None:
        _require_method(config, "clusters", clustered, "with DAM-VP's clusters")
        assert isinstance(found.input_prompt, tcpa.DAMVPConfig)
        try:
            prompt = replace(found.input_prompt, num_clusters=config.clusters)
        except ValueError as error:
            text = str(error).removeprefix("num_clusters")
            raise UsageError(f"--clusters{text}") from None
        found = replace(found, input_prompt=prompt)
    shares = {"prune_tokens": config.prune_tokens, "prune_segments": config.prune_segments}
    for option in (option for option, share in shares.items() if share > 0):
        _require_method(config, option, isinstance(found.prompts, tcpa.E2VPTConfig), "with E2VPT")
    if not any(shares.values()):
        return found
    return replace(found, epochs=2 * found.epochs, rounds=2, **shares)


def _chosen(config: RunConfig, usual: Recipe, choice: Choice) -> dict[str, Any]:
    """Return what a search chose, as fields of the recipe."""
    for option in ("learning_rate", "weight_decay"):
        name, value = f"--{option.replace('_', '-')}", getattr(config, option)
        require(value is None, name, value, "none with --choices", "leave one of them out")
    # The peak itself, whatever the batch.
    rates = {"learning_rate": choice.learning_rate, "rate_batch": 0}
    note = usual.note.replace(GRID, "rate and decay were chosen on validation images")
    return rates | {"weight_decay": choice.weight_decay, "chosen": choice.grid, "note": note}


def _resolve_prompts(
    config: RunConfig, prompts: tcpa.PromptConfig | None
) -> tcpa.PromptConfig | None:
    changes: dict[str, Any] = {}
    for option, fields in POOLS.items():
        value = getattr(config, option)
        if value is None:
            continue
        _require_method(config, option, isinstance(prompts, tcpa.TCPAConfig), "with TCPA")
        changes |= dict.fromkeys(fields, value)
    if config.prompt_dropout is not None:
        _require_method(config, "prompt_dropout", prompts is not None, "with prompts")
        name = "prompt_dropout" if isinstance(prompts, tcpa.TCPAConfig) else "dropout"
        changes[name] = config.prompt_dropout
    if prompts is None or not changes:
        return prompts
    if isinstance(prompts, tcpa.TCPAConfig):
        _require_entries(config, prompts, changes)
    try:
        return replace(prompts, **changes)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _require_entries(config: RunConfig, prompts: tcpa.TCPAConfig, changes: dict[str, Any]) -> None:
    """Check --top-k against --pool-size; either may be the recipe's."""
    for pool in ("cls", "image"):
        names = (f"{pool}_pool_size", f"{pool}_top_k")
        entries, top_k = (changes.get(name, getattr(prompts, name)) for name in names)
        enough = top_k <= entries or prompts.coordination == "role"
        pair = f"the {pool} pool's {entries} entries"
        if config.top_k is not None:
            require(enough, "--top-k", top_k, f"at most {pair}", "lower it or raise --pool-size")
        told = f"{top_k} or more, which a token sees of the {pool} pool"
        require(enough, "--pool-size", entries, told, "raise it or lower --top-k")


def _require_method(config: RunConfig, option: str, usable: bool, expected: str) -> None:
    name, value = "--" + option.replace("_", "-"), getattr(config, option)
    got = f"{value} with --method {config.method}"
    require(usable, name, got, f"a method {expected}", "leave it out")


def run_folder(config: RunConfig, settings: Recipe) -> Path:
    """Return the folder of a run."""
    name = f"{config.protocol}-seed{settings.seed}"
    if config.protocol == "tune":
        # One folder for each pair of a search.
        name = f"tune-lr{settings.learning_rate}-wd{settings.weight_decay}-seed{settings.seed}"
    return config.output / config.dataset / settings.method / name


def describe(config: RunConfig, settings: Recipe) -> dict[str, Any]:
    """Return everything that decides a result, as JSON: what `config.json` of a run holds.

    Two runs with equal descriptions compute the same; a run folder goes on only with the same one.
    """
    mean, std = config.normalization
    options = {name: getattr(config, name) for name in DECISIVE}
    # A file may move; its content is compared where it is loaded.
    options["weights"] = Path(config.weights).name
    if config.meta_prompt is not None:
        options["meta_prompt"] = sha256(config.meta_prompt)
    found = {
        "recipe": dataclasses.asdict(settings),
        "options": options,
        "normalization": {"mean": list(mean), "std": list(std)},
    }
    if config.dataset == "folder":
        # Any folder has this dataset's name: a finished run must not answer for another one.
        found["folder"] = config.data.resolve().name
    if config.dataset in VTAB:
        found["options"]["vtab_source"] = config.vtab_source
    return found
