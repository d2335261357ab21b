"""What `tcpa-bench step` compares: methods, and ways to compute the same training step.

Every provider is data; `build_model` and `build_step` make its step. `ladder` goes from the
official algorithm to the fastest form that computes the same, one change a rung; `tcpa_steps` is
its end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcpa import HTA_DATASETS, PromptConfig, PromptedViT, Savings, TCPAConfig, VPTConfig, wrap
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

MATCH_WEIGHT = 0.01
NUM_CLASSES = 200


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
    The frozen backbone without prompts: "linear" or, with the gradients of all tokens as if there
    were prompts, "linear-backward"."""
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

    def expected_gain(self, case: StepCase) -> float:
        """Return the factor that this form was thought to bring to a step, savings included."""
        kind, gain = case.device.partition(":")[0], 1.0
        # An evaluation keeps what it projected.
        if not self.method.startswith("linear") and case.mode == "train":
            for saving, gains in _GAINS.items():
                gain *= gains.get(kind, 1.0) if getattr(self.savings, saving) else 1.0
        return gain * self.expected.get(kind, 1.0)


_PLAIN = Savings.none()
_TOKEN_GRADIENTS = replace(Savings(), skip_input_gradient=False)
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
        StepProvider(name="VFPT", method="vfpt", precision=precision),
        StepProvider(
            name="frozen backbone, with backward",
            method="linear-backward",
            precision=precision,
            savings=_TOKEN_GRADIENTS,
        ),
        StepProvider(name="frozen ViT", method="linear", precision=precision),
    ]
    return found


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


def config_of(case: StepCase, method: str) -> PromptConfig | None:
    """Return a method's configuration, without dropout and random selection.

    So all providers compute the same numbers in every step.
    """
    official = TCPAConfig.official(case.dataset)
    rows = official.num_prompts
    if "tcpa" in method:
        transform = "identity" if method == "vpt+tcpa" else "fourier"
        return replace(
            official,
            image_prompt=False,
            prompt_dropout=0.0,
            random_selection_epochs=0,
            prompt_transform=transform,
        )
    if method.startswith("linear"):
        return None
    if method == "vfpt":
        return replace(VPTConfig.vfpt(length=rows), dropout=0.0)
    return VPTConfig(length=rows, dropout=0.0)


def build_model(case: StepCase, provider: StepProvider) -> PromptedViT:
    """Build the model of a provider; the same initial values for all of one method."""
    torch.manual_seed(0)
    backbone = timm.create_model(case.model)
    if provider.folded:
        fold_norms(backbone)
    if provider.precision == "float64":
        backbone.double()
    model = wrap(
        backbone,
        config_of(case, provider.method),
        num_classes=NUM_CLASSES,
        savings=provider.savings,
        impl=provider.impl,
    )
    if provider.precision == "bfloat16":
        # Not before: prompts and head are to start from the same values in all precisions.
        trained = {id(p) for p in model.trainable_parameters()}
        for parameter in model.backbone.parameters():
            if id(parameter) not in trained:
                parameter.data = parameter.data.bfloat16()
    return model.to(case.device)


@torch.no_grad()
def fold_norms(backbone: Any) -> None:
    """Move scale and shift of the blocks' LayerNorms into the layers that read them.

    With W the weight of the layer behind, W (g x + b) = (W g) x + W b: the same function, up to
    rounding, and norms without parameters.
    """
    for block in backbone.blocks:
        for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            shift = layer.weight @ norm.bias
            layer.weight.mul_(norm.weight)
            if layer.bias is None:
                layer.bias = nn.Parameter(shift)
            else:
                layer.bias.add_(shift)
            norm.weight.fill_(1.0)
            norm.bias.fill_(0.0)


def make_batch(case: StepCase, model: PromptedViT) -> tuple[Tensor, Tensor]:
    """Return random images `[B, 3, height, width]` and labels `[B]`, the same for all providers."""
    generator = torch.Generator().manual_seed(1)
    size = model.backbone.pretrained_cfg["input_size"]
    images = torch.randn(case.batch, *size, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (case.batch,), generator=generator)
    return images.to(case.device), labels.to(case.device)


def run_model(model: nn.Module, images: Tensor, precision: str, **options: bool) -> Any:
    """Run a model in a precision."""
    enabled = precision == "autocast"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=enabled):
        return model(images.to(INPUT[precision]), **options)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Return the loss, float32 or better: cross-entropy and the weighted match distance."""
    logits, distance = run_model(model, images, precision, return_distance=True)
    logits = logits if precision == "float64" else logits.float()
    return F.cross_entropy(logits, labels) + MATCH_WEIGHT * distance


def build_step(case: StepCase, provider: StepProvider, model: PromptedViT) -> Callable[[], Tensor]:
    """Return a function that runs one step and returns the loss (train) or the logits (eval).

    The gradients of a training step are left in the parameters.
    """
    images, labels = make_batch(case, model)
    run: Any = torch.compile(model) if provider.compiled else model
    if case.mode == "eval":
        model.eval()

        @torch.inference_mode()
        def evaluate() -> Tensor:
            return run_model(run, images, provider.precision)

        return evaluate
    # A zero learning rate keeps every step at the same point; AdamW still does its work.
    options: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0, "capturable": provider.graph}
    optimizer = torch.optim.AdamW(model.trainable_parameters(), **options)

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(run, images, labels, provider.precision)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return capture(train) if provider.graph else train


def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a step as a CUDA graph and return a function that replays it.

    The step is run three times before, on a stream of its own, as capture demands; it must not wait
    for the device, and its inputs must stay where they are.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
