"""What `tcpa-bench step` compares: methods, and ways to compute the same training step.

`ladder` goes from the official algorithm to the fastest form that computes the same, one change a
rung; `tcpa_steps` is its end.
"""

from collections.abc import Iterator
from dataclasses import replace

from tcpa import Savings

from ..harness.provider import StepProvider

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
    rung = StepProvider(name="tcpa", precision="autocast" if precision == "bfloat16" else precision)
    yield rung
    if precision == "bfloat16":
        rung = replace(rung, name="tcpa, bf16 weights", precision="bfloat16")
        yield rung
    stored = rung.name
    rung = replace(rung, name=f"{stored}, folded norms", folded=True)
    yield rung
    rung = replace(rung, name=f"{stored}, compiled", compiled=True)
    yield rung
    if device == "cuda":
        yield replace(rung, name=f"{stored}, compiled, graph", graph=True)


def ladder(precision: str, device: str) -> Iterator[StepProvider]:
    """Yield the official algorithm as it stands and then one change after the other.

    First the savings of `Savings`, computed by the reference, then `tcpa_steps`.
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
