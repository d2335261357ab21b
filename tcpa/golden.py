"""Golden files: outputs of the official code in float64, and their comparison with this library.

A golden file (`.npz`) holds a case (`case/*`: seed, sizes, flags) and what the official code
computed for it: logits, losses, selections, gradients and the logits after a few optimiser steps.
Weights and images are not stored; they are drawn again from the seed with numpy's legacy generator,
whose stream never changes. `python -m tcpa.verify` is the command.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from .build import wrap
from .config import Savings
from .dispatch import Impl
from .methods.base import PromptConfig
from .methods.tcpa import TCPAConfig
from .methods.vpt import VPTConfig
from .model import PromptedViT
from .official import load_official_state_dict, official_learning_rate, official_state_dict
from .reference import split_gate

GOLDEN_BACKBONE = "vit_base_patch16_224.augreg_in21k"
GRADIENT_LAYERS = [0, 5, 11]
IMAGE_SEED_OFFSET = 1000

Arrays = Mapping[str, np.ndarray]


def case_of(golden: Arrays) -> dict[str, Any]:
    """Return the settings `case/*` of a golden file as plain Python values."""
    return {k.removeprefix("case/"): v.item() for k, v in golden.items() if k.startswith("case/")}


def config_of(case: Mapping[str, Any]) -> PromptConfig:
    """Return the configuration that a case names, without dropout and random selection."""
    fourier = case["prompt_transform"] == "fourier"
    if "p_len" in case:
        fraction = 1.0 if fourier else 0.0
        return VPTConfig(length=case["p_len"], fourier_fraction=fraction, init="uniform")
    return TCPAConfig(
        cls_pool_size=case["pool_cls"],
        image_pool_size=case["pool_img"],
        cls_prompt_length=case["len_cls"],
        image_prompt_length=case["len_img"],
        cls_top_k=case["k_cls"],
        image_top_k=case["k_img"],
        coordination="token" if case["tdvp"] else "role",
        prompt_transform="fourier" if fourier else "identity",
        prompt_dropout=0.0,
        random_selection_epochs=0,
        match_weight=case["w"],
        image_prompt=case["iprompt"],
        value_affine=case["advp"],
        simam=case["simam"],
    )


def golden_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, Any]]:
    """Draw the weights of a case.

    Args:
        shapes: official parameter names and their shapes.
        seed: the case's seed.

    Yields:
        Official name and float64 array, in sorted order of the names.
    """
    generator = np.random.RandomState(seed)
    for name in sorted(shapes):
        z = generator.standard_normal(shapes[name])
        if (
            name.endswith(("norm1.weight", "norm2.weight", "ADVP_w"))
            or name == "backbone.norm.weight"
        ):
            yield name, 1 + 0.1 * z
        elif name.endswith(("keys", "prompts")):
            yield name, 0.5 * z
        elif "Prompter.1" in name:
            yield name, 0.25 + 0.01 * z
        else:
            yield name, (0.04 if name.endswith("weight") else 0.02) * z


def golden_batches(case: Mapping[str, Any], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Draw the images and labels of every step of a case."""
    generator = np.random.RandomState(case["seed"] + IMAGE_SEED_OFFSET)
    steps, batch = case["steps"], case["batch"]
    images = torch.from_numpy(generator.standard_normal((steps, batch, 3, 224, 224))).to(dtype)
    labels = torch.from_numpy(generator.randint(0, case["n_classes"], (steps, batch))).long()
    return list(zip(images, labels, strict=True))


def golden_model(
    case: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float64,
    savings: Savings | None = None,
    impl: Impl = "auto",
    device: torch.device | str = "cpu",
) -> PromptedViT:
    """Build the model of a case with its weights."""
    backbone = timm.create_model(GOLDEN_BACKBONE, num_classes=case["n_classes"]).to(device, dtype)
    model = wrap(backbone, config_of(case), savings=savings, impl=impl)
    shapes = {name: tuple(p.shape) for name, p in official_state_dict(model).items()}
    load_official_state_dict(model, dict(golden_weights(shapes, case["seed"])))
    return model


def run_case(
    case: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float64,
    savings: Savings | None = None,
    impl: Impl = "auto",
    device: torch.device | str = "cpu",
) -> dict[str, np.ndarray]:
    """Compute every field of a golden file with this library.

    Args:
        case: settings, from `case_of`.
        dtype: precision of weights, images and computation.
        savings: forms of the computation to use; all savings by default.
        impl: what computes the operations.
        device: where.

    Returns:
        The fields of the golden file, computed here.
    """
    model = golden_model(case, dtype=dtype, savings=savings, impl=impl, device=device)
    parameters = model.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=case["lr"], weight_decay=case["wd"])
    batches = [(x.to(device), y.to(device)) for x, y in golden_batches(case, dtype)]
    fields: dict[str, Any] = {"losses": [], "match_losses": []}
    if case.get("tdvp"):
        fields |= _selections(model, batches[0][0])
    for step, (images, labels) in enumerate(batches):
        logits, distance = model(images, return_distance=True)
        cross_entropy = F.cross_entropy(logits, labels)
        loss = cross_entropy + case.get("w", 0.0) * distance
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            fields |= {"logits": logits, "cross_entropy": cross_entropy, "match_loss": distance}
            fields |= _gradients(model)
        optimizer.step()
        fields["losses"].append(loss.item())
        fields["match_losses"].append(distance.item())
    with torch.no_grad():
        fields["logits_after"] = model.eval()(batches[0][0])
    return {name: np.asarray(_detached(value)) for name, value in fields.items()}


def _detached(value: Any) -> Any:
    return value.detach().double().cpu().numpy() if isinstance(value, Tensor) else value


def _selections(model: PromptedViT, images: Tensor) -> dict[str, np.ndarray]:
    """Return the selected entries of every token and layer in ascending order."""
    config = cast(TCPAConfig, model.config)
    num_pool = (config.cls_pool_size, config.image_pool_size)
    lengths = (config.cls_prompt_length, config.image_prompt_length)
    found: dict[str, list[np.ndarray]] = {"cls_index": [], "image_index": []}
    for gate in model.selection(images):
        cls_selected, image_selected = split_gate(gate, num_pool, lengths, 1)
        found["cls_index"].append(_indices(cls_selected[:, 0], config.cls_top_k))
        found["image_index"].append(_indices(image_selected, config.image_top_k))
    return {name: np.stack(layers) for name, layers in found.items()}


def _indices(selected: Tensor, top_k: int) -> np.ndarray:
    return selected.nonzero()[:, -1].reshape(*selected.shape[:-1], top_k).cpu().numpy()


def _gradients(model: PromptedViT) -> dict[str, Any]:
    """Return gradients by official name: some layers of per-layer tensors, the norm of all of
    it."""
    fields: dict[str, Any] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    from .official import official_name

    for parameter in model.trainable_parameters():
        name = official_name(names[id(parameter)])
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        per_layer = name.endswith(("keys", "prompts"))
        fields[f"grad/{name}"] = grad[GRADIENT_LAYERS] if per_layer else grad
        fields[f"grad_norm/{name}"] = grad.double().norm()
    return fields


def compare(golden: Arrays, computed: Arrays) -> dict[str, float]:
    """Return the relative error of every field: largest difference over largest golden value.

    A field of zeros counts by its absolute error; selections count differing tokens; a field that
    is missing on either side counts as infinite, a golden NaN (no distance exists) as agreement.
    """
    errors: dict[str, float] = {}
    for name, expected in golden.items():
        if name.startswith("case/") or name == "min_margin":
            continue
        if name not in computed:
            errors[name] = float("inf")
        elif name.endswith("_index") and expected.shape == computed[name].shape:
            same = (np.sort(expected, axis=-1) == np.sort(computed[name], axis=-1)).all(-1)
            errors[name] = float((~same).sum())
        else:
            errors[name] = _relative_error(expected, computed[name])
    return errors


def _relative_error(expected: np.ndarray, got: np.ndarray) -> float:
    if expected.shape != got.shape:
        return float("inf")
    if np.isnan(expected).all():
        return 0.0
    difference, size = np.abs(expected - got).max(), np.abs(expected).max()
    error = float(difference / size) if size > 0 else float(difference)
    return float("inf") if np.isnan(error) else error


def check_schedule(golden: Arrays) -> dict[str, float]:
    """Compare the official learning-rate schedule of a golden file with ours."""
    expected = np.asarray(golden["lr"])
    base_lr = float(golden["base_lr"])
    total = int(golden["epochs"]) * int(golden["steps_per_epoch"])
    ours = [official_learning_rate(s, base_lr=base_lr, total_steps=total) for s in range(total)]
    return {"lr": _relative_error(expected, np.asarray(ours))}


def check(golden: Arrays, **options: Any) -> dict[str, float]:
    """Run the case of a golden file, with the options of `run_case`; return every field's error."""
    if "lr" in golden:
        return check_schedule(golden)
    return compare(golden, run_case(case_of(golden), **options))
