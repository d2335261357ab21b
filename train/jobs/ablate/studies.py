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
    found = []
    for name in config.study:
        try:
            found.append(_MAKERS[name](config, cast(tcpa.TCPAConfig, base)))
        except ValueError as error:
            raise UsageError(f"--study {name}: {error}") from None
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


def _components(config: AblateConfig, base: tcpa.TCPAConfig) -> Study:
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
    settings = (
        StudySetting(row=plain, name=VPT, prompts=vpt),
        _setting(base, f"{plain} + R-TCPA", coordination="role", **bare),
        _setting(base, f"{plain} + R-TCPA + T-TCPA", coordination="token", **bare),
    )
    return Study(name="components", title="Components", rows="components", settings=settings)


def _pools(config: AblateConfig, base: tcpa.TCPAConfig) -> Study:
    sizes = config.pool_sizes or ((2, 5, 10, 20) if config.recipe == DEMO else (5, 10, 20, 30))
    return Study(
        name="pools",
        title=f"Pool sizes (top-{base.cls_top_k} and top-{base.image_top_k}, or the whole pool)",
        rows="entries of the CLS pool",
        columns="entries of the image pool",
        settings=tuple(
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
        ),
    )


def _top_k(config: AblateConfig, base: tcpa.TCPAConfig) -> Study:
    smallest = min(base.cls_pool_size, base.image_pool_size)
    usual = (*(k for k in TOP_KS if k < smallest), smallest)
    return Study(
        name="top-k",
        title=f"Top-k (pools of {base.cls_pool_size} and {base.image_pool_size})",
        rows="entries that a token sees",
        settings=tuple(
            _setting(base, k, cls_top_k=k, image_top_k=k) for k in config.top_ks or usual
        ),
    )


def _length(config: AblateConfig, base: tcpa.TCPAConfig) -> Study:
    return Study(
        name="length",
        title="Prompt length",
        rows="prompt rows of an entry",
        settings=tuple(
            _setting(base, length, cls_prompt_length=length, image_prompt_length=length)
            for length in config.lengths
        ),
    )


def _match_weight(config: AblateConfig, base: tcpa.TCPAConfig) -> Study:
    return Study(
        name="match-weight",
        title="Weight of the match distance in the loss",
        rows="match weight",
        settings=tuple(
            _setting(base, f"{weight:g}", match_weight=weight) for weight in config.match_weights
        ),
    )


def _choice(name: str, title: str, rows: str, field: str, values: Sequence[str]) -> Callable:
    def make(config: AblateConfig, base: tcpa.TCPAConfig) -> Study:
        settings = tuple(_setting(base, value, **{field: value}) for value in values)
        return Study(name=name, title=title, rows=rows, settings=settings)

    return make


def _fourier(config: AblateConfig, base: tcpa.TCPAConfig) -> Study:
    joint: dict[str, Any] = {"prompt_transform": "fourier", "fourier_scope": "joint"}
    return Study(
        name="fourier",
        title="Fourier transform of the prompts",
        rows="rows of one transform",
        settings=(
            _setting(base, "no transform", prompt_transform="identity"),
            _setting(base, "both pools (joint)", **joint),
            _setting(base, "each pool", **joint | {"fourier_scope": "pool"}),
        ),
    )


_MAKERS: dict[str, Callable[[AblateConfig, tcpa.TCPAConfig], Study]] = {
    "components": _components,
    "pools": _pools,
    "top-k": _top_k,
    "length": _length,
    "match-weight": _match_weight,
    "selection": _choice(
        "selection",
        "Which entries a token sees",
        "entries by cosine similarity",
        "selection",
        ("nearest", "farthest"),
    ),
    "normalization": _choice(
        "normalization",
        "What the softmax is normalised over",
        "prompts in the denominator",
        "normalize_over",
        ("all", "visible"),
    ),
    "fourier": _fourier,
}
