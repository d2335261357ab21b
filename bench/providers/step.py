"""What `tcpa-bench step` compares: methods, and ways to compute the same training step.

Every provider is data; `step_model` makes its model and its step. `ladder` goes from the official
algorithm to the fastest form that computes the same, one change a rung; `tcpa_steps` is its end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tcpa import HTA_DATASETS, AutoVPConfig, DAMVPConfig, InputConfig, Savings, VPConfig
from tcpa.dispatch import Impl

INPUT = {
    "float32": torch.float32,
    "autocast": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
"""Precision -> dtype of the images. float32 and float64: everything. autocast: bfloat16 over
float32 weights. bfloat16: frozen weights and residual stream are stored in it, prompts and head in
float32.
"""

CLUSTERS = 16
"""Clusters of DAM-VP."""

INPUT_PROMPTS: dict[str, InputConfig] = {
    "vp": VPConfig(),
    "dam-vp": DAMVPConfig(num_clusters=CLUSTERS),
    "autovp": AutoVPConfig(),
}
"""Method -> what it does to the image; with "+tcpa" behind its name, TCPA's prompts come on top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCase:
    """What one step computes."""

    model: str = "vit_base_patch16_224"
    """timm name of the backbone; weights are random."""

    dataset: str = "cub"
    """Whose official settings to use, without the image prompt."""

    batch: int = 8
    """Images a step."""

    mode: str = "train"
    """"train": forward, backward, optimiser. "eval": forward without gradients."""

    device: str = "cpu"

    precision: str = "float32"
    """Precision of the run, for the record; every provider has its own."""

    threads: int = 0
    """CPU threads; 0 leaves torch's default."""

    table: str = "step"
    """"step": methods and forms side by side. "ladder": one change after the other."""

    def __post_init__(self) -> None:
        if self.dataset not in HTA_DATASETS:
            raise ValueError(f"dataset: got {self.dataset!r}, expected one of {HTA_DATASETS}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProvider:
    """One way to compute the step of one method."""

    name: str
    method: str = "tcpa"
    """"tcpa" (on Fourier prompts), "vpt+tcpa", "vpt-deep", "vfpt": all with as many prompt rows.
    Those of `INPUT_PROMPTS`, with "+tcpa" or without. The frozen backbone without prompts: "linear"
    or, with the gradients of all tokens as if there were prompts, "linear-backward"."""
    precision: str = "float32"
    savings: Savings = field(default_factory=Savings)
    impl: Impl = "auto"
    compiled: bool = False
    """Under torch.compile."""
    folded: bool = False
    """Scale and shift of every frozen LayerNorm moved into the frozen layer behind it."""
    graph: bool = False
    """The whole step, optimiser included, replayed as one CUDA graph."""
    expected: dict[str, float] = field(default_factory=dict)
    """By device type: what this form was thought to bring beyond what the cost model counts, as a
    factor, written down before measuring."""

    @property
    def input_prompt(self) -> InputConfig | None:
        """What is done to the image."""
        return INPUT_PROMPTS.get(self.method.removesuffix("+tcpa"))

    @property
    def base_method(self) -> str | None:
        """The same method without TCPA; None where there is none of it."""
        own = {"tcpa": "vfpt", "vpt+tcpa": "vpt-deep"}
        base = own.get(self.method, self.method.removesuffix("+tcpa"))
        return None if base == self.method else base

    def expected_gain(self, case: StepCase) -> float:
        """Return the factor that this form was thought to bring to a step, savings included."""
        kind, gain = case.device.partition(":")[0], 1.0
        has_tokens = not self.method.startswith("linear") and self.method not in INPUT_PROMPTS
        # An evaluation keeps what it projected.
        if has_tokens and case.mode == "train":
            for saving, gains in _GAINS.items():
                gain *= gains.get(kind, 1.0) if getattr(self.savings, saving) else 1.0
        return gain * self.expected.get(kind, 1.0)


_PLAIN = Savings.none()
_TOKEN_GRADIENTS = replace(Savings(), skip_input_gradient=False)
_TOKENS = replace(Savings(), prompt_keys_only=False)
_FROZEN = replace(_PLAIN, frozen_backbone=True)
_SAVINGS = {
    "frozen_backbone": "frozen",
    "gate_bits": "selection as bits",
    "prompt_keys_only": "prompts as keys only",
    "prompt_kv_once": "prompts projected once",
    "prompt_kv_stacked": "one product for the prompts of all blocks",
    "last_block_head_rows": "head's rows in the last block",
    "skip_input_gradient": "no gradient of the input",
}
"""Field of `Savings` -> what it is called, in the order in which the ladder takes them."""


_GAINS = {"prompt_kv_stacked": {"cpu": 1.05, "cuda": 1.005}}
"""Field of `Savings` -> by device type, what it was thought to bring beyond what the cost model
counts, as a factor, written down before measuring."""


def providers(precision: str, device: str) -> list[StepProvider]:
    """Return what is measured at a precision on a kind of device; the first is the yardstick.

    At float32 and float64 every form computes in that precision. At bfloat16 the official algorithm
    runs as its users run it, under autocast, and as it stands in float32.
    """
    exact = "float32" if precision == "bfloat16" else precision
    autocast = "autocast" if precision == "bfloat16" else precision
    official = StepProvider(name="official", savings=_PLAIN, precision=exact, impl="reference")
    found = [official]
    if autocast != exact:
        official = replace(official, name="official, autocast", precision=autocast)
        found.append(official)
    frozen = replace(official, name="official, frozen", savings=_FROZEN)
    found += [
        frozen,
        replace(frozen, name="official, frozen, compiled", compiled=True),
        *tcpa_steps(precision, device),
        StepProvider(name="VPT + TCPA", method="vpt+tcpa", precision=precision),
        StepProvider(name="VPT-deep", method="vpt-deep", precision=precision),
        StepProvider(
            name="VPT-deep, prompts as tokens",
            method="vpt-deep",
            precision=precision,
            savings=_TOKENS,
        ),
        StepProvider(name="VFPT", method="vfpt", precision=precision),
        StepProvider(
            name="frozen backbone, with backward",
            method="linear-backward",
            precision=precision,
            savings=_TOKEN_GRADIENTS,
        ),
        StepProvider(name="frozen ViT", method="linear", precision=precision),
        *_prompts_on_images(precision),
    ]
    return found


def _prompts_on_images(precision: str) -> Iterator[StepProvider]:
    for method, name in (("vp", "VP"), ("dam-vp", "DAM-VP"), ("autovp", "AutoVP")):
        yield StepProvider(name=name, method=method, precision=precision)
        yield StepProvider(name=f"{name} + TCPA", method=f"{method}+tcpa", precision=precision)


def tcpa_steps(precision: str, device: str) -> Iterator[StepProvider]:
    """Yield the forms of our own step, each with one change more than the one before."""
    start = "autocast" if precision == "bfloat16" else precision
    rung = StepProvider(name="tcpa", precision=start)
    yield rung
    if precision == "bfloat16":
        gain = {"cpu": 1.1, "cuda": 1.08}
        rung = replace(rung, name="tcpa, bf16 weights", precision="bfloat16", expected=gain)
        yield rung
    stored = rung.name
    rung = _faster(rung, {"cpu": 1.0, "cuda": 1.01}, name=f"{stored}, folded norms", folded=True)
    yield rung
    rung = _faster(rung, {"cpu": 1.1, "cuda": 1.1}, name=f"{stored}, compiled", compiled=True)
    yield rung
    if device == "cuda":
        yield _faster(rung, {"cuda": 1.05}, name=f"{stored}, compiled, graph", graph=True)


def _faster(before: StepProvider, gain: dict[str, float], **changes: Any) -> StepProvider:
    """Return a provider with one change more, expected to bring `gain` by device type."""
    expected = {device: before.expected.get(device, 1.0) * g for device, g in gain.items()}
    return replace(before, expected=expected, **changes)


def ladder(precision: str, device: str) -> Iterator[StepProvider]:
    """Yield the official algorithm as it stands and then one change after the other.

    First the savings of `Savings`, computed by the reference, then `tcpa_steps`. What a saving
    should bring is the cost model's business.
    """
    official, *rest = providers(precision, device)
    yield official
    rung = official
    if precision == "bfloat16":
        rung = rest[0]
        yield rung
    for saving, name in _SAVINGS.items():
        savings = replace(rung.savings, **{saving: True})
        rung = replace(rung, name=f"+ {name}", savings=savings)
        yield rung
    yield from tcpa_steps(precision, device)
