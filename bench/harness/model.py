"""The model and the step of a provider of `tcpa-bench step`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcpa import DAMVPConfig, PromptConfig, PromptedViT, TCPAConfig, VPTConfig, vit, wrap

from ..providers.step import CLUSTERS, INPUT, INPUT_PROMPTS, StepCase, StepProvider

MATCH_WEIGHT = 0.01
NUM_CLASSES = 200


def config_of(case: StepCase, method: str) -> PromptConfig | None:
    """Return a method's configuration, without dropout and random selection.

    So all providers compute the same numbers in every step.
    """
    official = TCPAConfig.official(case.dataset)
    rows = official.num_prompts
    if "tcpa" in method:
        transform = "fourier" if method == "tcpa" else "identity"
        return replace(
            official,
            image_prompt=False,
            prompt_dropout=0.0,
            random_selection_epochs=0,
            prompt_transform=transform,
        )
    if method.startswith("linear") or method in INPUT_PROMPTS:
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
        input_prompt=provider.input_prompt,
        num_classes=NUM_CLASSES,
        savings=provider.savings,
        impl=provider.impl,
    )
    if isinstance(provider.input_prompt, DAMVPConfig):
        # Before anything is rounded: all forms are to have the same clusters.
        images = make_batch(replace(case, batch=CLUSTERS, device="cpu"), model)[0]
        model.fit_clusters(images.to(vit.input_weight(model.backbone).dtype))
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
    """Return random images `[B, 3, height, width]` and labels `[B]`, the same for all providers.

    Noise; for DAM-VP around one of `CLUSTERS` colours, far enough from each other for a precision
    not to decide into which cluster an image falls.
    """
    generator = torch.Generator().manual_seed(1)
    size = model.backbone.pretrained_cfg["input_size"]
    images = torch.randn(case.batch, *size, generator=generator)
    if isinstance(model.input_config, DAMVPConfig):
        kind = torch.arange(case.batch) % CLUSTERS
        signs = [1.0 - 2.0 * ((kind >> channel) & 1) for channel in range(size[0])]
        colours = torch.stack(signs, dim=1) * (1.0 + (kind >> 3))[:, None]
        images += colours[:, :, None, None]
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
