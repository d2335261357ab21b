"""Importance of E2VPT's masks: how the loss changes with them, over the training images."""

import torch
import torch.nn.functional as F
from torch import Tensor

import tcpa
from tcpa.methods.e2vpt import E2VPTPrompts

from .distributed import World
from .inputs import Source
from .precision import Numerics


def mask_importance(
    model: tcpa.PromptedViT,
    tokens: E2VPTPrompts,
    source: Source,
    world: World,
    numerics: Numerics,
) -> tuple[Tensor, Tensor]:
    """Return the mean signed gradient of the cross-entropy for the masks.

    Args:
        model: the model; it is left in training mode, its parameters without gradients.
        tokens: its prompts.
        source: training images, all of them once, over all processes.
        world: the processes.
        numerics: precision of the model.

    Returns:
        Of the tokens `[P]`, of the segments `[P, segments]`; float32, the same on all processes.

    Source:
        E2VPT (ICCV 2023): the lowest are pruned first.
    """
    masks = (tokens.token_mask, tokens.segment_mask)
    sums = [torch.zeros_like(mask) for mask in masks]
    seen = torch.zeros((), dtype=torch.float64, device=world.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    for mask in masks:
        mask.requires_grad_(True)
    try:
        for batch in source.epoch(0):
            if len(batch.images) == 0:
                continue
            with torch.enable_grad(), numerics.context(world.device):
                logits = model(batch.images.to(numerics.weights)).float()
                loss = F.cross_entropy(logits, batch.labels, reduction="sum")
            for total, grad in zip(sums, torch.autograd.grad(loss, masks), strict=True):
                total += grad
            seen += len(batch.labels)
    finally:
        for mask in masks:
            mask.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train()
    count = world.sum(seen)
    of_tokens, of_segments = (world.sum(total) / count for total in sums)
    return of_tokens, of_segments
