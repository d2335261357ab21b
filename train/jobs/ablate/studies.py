"""What an ablation varies: every study as a list of settings, each with its token prompts.

Sources: Table 3 of the paper (components), Figure 4 (pools), and what sections 1.5 to 1.9 of its
method leave open or the official code decides otherwise (the others).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import tcpa

from ....cli import UsageError, require
from ...options.ablate import DEMO, AblateConfig
from ...options.checks import require_known

VPT = "vpt"

TOP_KS = (1, 2, 5, 10, 20)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySetting:
    """One cell of a study."""

    row: str
    """What is varied, as the table shows it."""
    column: str = ""
    """What is varied besides; "" where nothing is."""
    name: str
    """What differs from the start of the studies, as a name: "" for nothing. Settings of several
    studies with one name are one run."""
    prompts: tcpa.PromptConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """One question."""

    name: str
    title: str
    rows: str
    """What the rows are, with its unit."""
    columns: str = ""
    """What the columns are, with its unit; "" where only one thing is varied."""
    settings: tuple[StudySetting, ...]

    @property
    def is_grid(self) -> bool:
        """Whether two things are varied."""
        return bool(self.columns)


def make_studies(config: AblateConfig, base: tcpa.PromptConfig | None) -> list[Study]:
    """Return the studies that were asked for.

    Args:
        config: which ones, with their values.
        base: prompts from which they start.

    Raises:
        UsageError: these prompts are not TCPA's, or a value does not fit them.
    """
    got, expected = f"{config.base_method!r}", "a row with TCPA, whose parts can be varied"
    usable = base is not None and base.has("coordination")
    require(usable, "--method", got, expected, "vpt+tcpa for instance")
    start = cast(tcpa.TCPAConfig, base)
    found = []
    for name in config.study:
        title, rows, columns, make = _STUDIES[name]
        try:
            settings = tuple(make(config, start))
        except ValueError as error:
            raise UsageError(f"--study {name}: {error}") from None
        found.append(
            Study(
                name=name,
                title=title.format(start),
                rows=rows,
                columns=columns,
                settings=settings,
            )
        )
    return found


def only(studies: Sequence[Study], names: Iterable[str] | None) -> dict[str, StudySetting]:
    """Return the settings of all studies by name, each once.

    Args:
        studies: what was asked for.
        names: settings to keep; None for all.

    Raises:
        UsageError: there is no such setting.
    """
    found = {setting.name: setting for study in studies for setting in study.settings}
    if names is None:
        return found
    known = {shown_name(name): name for name in found}
    for name in names:
        require_known("--cells", name, known, "--print-jobs prints them")
    return {known[name]: found[known[name]] for name in names}


def shown_name(name: str) -> str:
    """Return the name of a setting for a user."""
    return name or "base"


def label(name: str, method: str) -> str:
    """Return the name under which a setting of a method is run: `vpt+tcpa.cls-pool-size-5`."""
    return f"{method}.{name}" if name else method


def _setting(
    base: tcpa.TCPAConfig, row: object, column: object = "", **changes: Any
) -> StudySetting:
    """Return a setting that changes fields of the start, named after what differs."""
    prompts = replace(base, **changes)
    different = [f.name for f in fields(base) if getattr(prompts, f.name) != getattr(base, f.name)]
    parts = [f"{field}-{_shown(getattr(prompts, field))}" for field in different]
    # An underscore would separate the choices of a method.
    name = ".".join(parts).replace("_", "-")
    return StudySetting(row=str(row), column=str(column), name=name, prompts=prompts)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _each(base: tcpa.TCPAConfig, values: Iterable[Any], *names: str) -> list[StudySetting]:
    """Return a setting for each value, which some fields have in common."""
    return [_setting(base, _shown(value), **dict.fromkeys(names, value)) for value in values]


def _components(config: AblateConfig, base: tcpa.TCPAConfig) -> list[StudySetting]:
    fourier = base.prompt_transform == "fourier"
    vpt = tcpa.VPTConfig(
        length=base.num_prompts,
        fourier_fraction=1.0 if fourier else 0.0,
        dropout=base.prompt_dropout,
        # xavier is that of the demo.
        init="xavier" if config.recipe == DEMO else "uniform",
    )
    # What TCPA's official scripts add besides is no part of it, and VPT has none of it.
    bare = {"image_prompt": False, "value_affine": False, "simam": False, "token_noise": 0.0}
    plain = "VFPT" if fourier else "VPT"
    return [
        StudySetting(row=plain, name=VPT, prompts=vpt),
        _setting(base, f"{plain} + R-TCPA", coordination="role", **bare),
        _setting(base, f"{plain} + R-TCPA + T-TCPA", coordination="token", **bare),
    ]


def _pools(config: AblateConfig, base: tcpa.TCPAConfig) -> list[StudySetting]:
    sizes = config.pool_sizes or ((2, 5, 10, 20) if config.recipe == DEMO else (5, 10, 20, 30))
    return [
        _setting(
            base,
            cls,
            image,
            cls_pool_size=cls,
            image_pool_size=image,
            cls_top_k=min(base.cls_top_k, cls),
            image_top_k=min(base.image_top_k, image),
        )
        for cls in sizes
        for image in sizes
    ]


def _top_k(config: AblateConfig, base: tcpa.TCPAConfig) -> list[StudySetting]:
    smallest = min(base.cls_pool_size, base.image_pool_size)
    usual = (*(k for k in TOP_KS if k < smallest), smallest)
    return _each(base, config.top_ks or usual, "cls_top_k", "image_top_k")


def _fourier(config: AblateConfig, base: tcpa.TCPAConfig) -> list[StudySetting]:
    joint: dict[str, Any] = {"prompt_transform": "fourier", "fourier_scope": "joint"}
    return [
        _setting(base, "no transform", prompt_transform="identity"),
        _setting(base, "both pools (joint)", **joint),
        _setting(base, "each pool", **joint | {"fourier_scope": "pool"}),
    ]


Maker = Callable[[AblateConfig, tcpa.TCPAConfig], list[StudySetting]]

_STUDIES: dict[str, tuple[str, str, str, Maker]] = {
    "components": ("Components", "components", "", _components),
    "pools": (
        "Pool sizes (top-{0.cls_top_k} and top-{0.image_top_k}, or the whole pool)",
        "entries of the CLS pool",
        "entries of the image pool",
        _pools,
    ),
    "top-k": (
        "Top-k (pools of {0.cls_pool_size} and {0.image_pool_size})",
        "entries that a token sees",
        "",
        _top_k,
    ),
    "length": (
        "Prompt length",
        "prompt rows of an entry",
        "",
        lambda config, base: _each(
            base, config.lengths, "cls_prompt_length", "image_prompt_length"
        ),
    ),
    "match-weight": (
        "Weight of the match distance in the loss",
        "match weight",
        "",
        lambda config, base: _each(base, config.match_weights, "match_weight"),
    ),
    "selection": (
        "Which entries a token sees",
        "entries by cosine similarity",
        "",
        lambda config, base: _each(base, ("nearest", "farthest"), "selection"),
    ),
    "normalization": (
        "What the softmax is normalised over",
        "prompts in the denominator",
        "",
        lambda config, base: _each(base, ("all", "visible"), "normalize_over"),
    ),
    "fourier": ("Fourier transform of the prompts", "rows of one transform", "", _fourier),
}
"""Study -> its title, what its rows and its columns are, and its settings."""
