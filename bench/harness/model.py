"""The model of a provider, its step, which is the training program's own, and what it computes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from tcpa import PromptConfig, PromptedViT, TCPAConfig, VPTConfig, vit, wrap

from ...cli import UsageError
from ...train.engine.precision import NUMERICS, Numerics
from ...train.engine.step import Step, losses
from .case import StepCase
from .check import Answer, ReferenceCache, Skipped, WrongResultError
from .provider import CLUSTERS, INPUT_PROMPTS, StepProvider

PRECISIONS = {
    "float32": NUMERICS["fp32"],
    "autocast": NUMERICS["bf16-autocast"],
    "bfloat16": NUMERICS["bf16"],
    "float64": Numerics("fp64", weights=torch.float64),
}
NUM_CLASSES = 200
CHUNK = 8
"""Images of which a plain form computes the step at once: its memory is not to grow with the batch.
"""


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
    if model.input_prompt is not None and model.input_prompt.clustered:
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
    if model.input_prompt is not None and model.input_prompt.clustered:
        kind = torch.arange(case.batch) % CLUSTERS
        signs = [1.0 - 2.0 * ((kind >> channel) & 1) for channel in range(size[0])]
        colours = torch.stack(signs, dim=1) * (1.0 + (kind >> 3))[:, None]
        images += colours[:, :, None, None]
    labels = torch.randint(0, NUM_CLASSES, (case.batch,), generator=generator)
    return images.to(case.device), labels.to(case.device)


class Runner:
    """A provider's model with its step, for training and evaluation."""

    def __init__(
        self, case: StepCase, provider: StepProvider, *, learning_rate: float = 0.0
    ) -> None:
        """Build the model; a rate of zero keeps every step at the same point."""
        self.model = build_model(case, provider)
        self.numerics = PRECISIONS[provider.precision]
        self._module: Any = torch.compile(self.model) if provider.compiled else self.model
        optimizer = torch.optim.AdamW(
            self.model.trainable_parameters(),
            lr=learning_rate,
            fused=True,
            capturable=provider.graph,
        )
        self.step = Step(
            self.model,
            optimizer,
            numerics=self.numerics,
            module=self._module,
            graph=provider.graph,
        )

    def use(self, mode: str) -> None:
        """Switch to "train" or "eval"."""
        self.model.train(mode == "train")
        self.model.set_epoch(0)

    def run(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train or test on a batch; return the loss or the logits."""
        if self.model.training:
            return self.step(images, labels).losses[0]
        with torch.inference_mode():
            return evaluate(self._module, images, self.numerics)

    def answer(self, images: Tensor, labels: Tensor) -> Answer:
        """Compute loss and gradients, or logits, and change nothing."""
        if not self.model.training:
            return answer_of(self.model, self.run(images, labels))
        found = answer_of(self.model, self.step.backward(images, labels).losses[0])
        self.model.zero_grad(set_to_none=True)
        return found


def evaluate(module: nn.Module, images: Tensor, numerics: Numerics, **options: bool) -> Any:
    """Run a model in a precision."""
    with numerics.context(images.device):
        return module(images.to(numerics.weights), **options)


def answer_of(model: PromptedViT, result: Tensor) -> Answer:
    """Collect the loss and the gradients in a model's parameters, or the logits."""
    if not model.training:
        return Answer({"logits": _array(result)})
    gradients = {
        name: _array(parameter.grad)
        for name, parameter in model.trainable_named_parameters().items()
        if parameter.grad is not None
    }
    return Answer({"loss": _array(result), **gradients})


def plain_answer(case: StepCase, provider: StepProvider) -> Answer:
    """Compute a step without an optimizer, a few images at a time.

    Loss and match distance are means over the images, so means over equal parts are the same.
    """
    model, numerics = build_model(case, provider), PRECISIONS[provider.precision]
    images, labels = make_batch(case, model)
    chunks = list(zip(images.split(CHUNK), labels.split(CHUNK), strict=True))
    if case.mode == "eval":
        model.eval()
        with torch.no_grad():
            logits = [evaluate(model, part, numerics) for part, _ in chunks]
        return answer_of(model, torch.cat(logits))
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    weight = 0.0 if model.config is None else model.config.match_weight
    for part, targets in chunks:
        logits, distance = evaluate(model, part, numerics, return_distance=True)
        share = losses(logits, distance, targets, weight)[0] * (len(part) / len(images))
        share.backward()
        loss += share.detach()
    return answer_of(model, loss)


def _array(tensor: Tensor) -> np.ndarray:
    exact = tensor.detach().cpu()
    return (exact if exact.dtype == torch.float64 else exact.float()).numpy().copy()


def checked_runners(
    case: StepCase, chosen: Sequence[StepProvider], skipped: Skipped, learning_rate: float = 1e-4
) -> dict[str, Runner]:
    """Build all methods, compare what they compute with their plain forms and warm them up.

    Two images say what a batch would, but what is compiled or recorded is so for one size.

    Args:
        case: model, batch and device; the mode is not looked at.
        chosen: the methods.
        skipped: takes those that fail, except for the first.
        learning_rate: of training.

    Raises:
        WrongResultError: the first one computes something else.
        UsageError: it cannot be computed here.
    """
    fixed = any(provider.compiled for provider in chosen)
    size = case.batch if fixed else min(case.batch, 2)
    cases = [replace(case, mode=mode, batch=size) for mode in ("train", "eval")]
    references = [ReferenceCache(one, plain_answer) for one in cases]
    runners: dict[str, Runner] = {}
    for provider in chosen:
        try:
            runner = Runner(case, provider, learning_rate=learning_rate)
            for one, reference in zip(cases, references, strict=True):
                reference.prepare(provider)
                runner.use(one.mode)
                reference.check(provider, runner.answer(*make_batch(one, runner.model)))
            for one in cases:
                runner.use(one.mode)
                runner.run(*make_batch(case, runner.model))
        except Exception as error:
            # Whatever keeps it from being computed is what the user has to know.
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            if not isinstance(error, WrongResultError):
                where = f"{provider.name}, --model {case.model} --batch {case.batch}"
                error = UsageError(f"{where}: {reason}")
            if provider is chosen[0]:
                raise error from None
            skipped.add(error)
        else:
            runners[provider.name] = runner
    return runners
