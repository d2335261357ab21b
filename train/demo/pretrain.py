"""Pretrain the demo's ViT on generated images only: classify which formula drew the image.

    python -m tcpa.train pretrain-demo --output demo_vit.safetensors

No digit, letter or font is involved, so that what the demo then learns is transfer. The weights
that ship with the package were made with the defaults below.
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcpa.provenance import version

from ...cli import require_writable
from ..engine.precision import fast_dtype
from ..options.demo import PretrainConfig
from .backbone import build_backbone, normalise, numerics, save_backbone
from .generate import FAMILIES, NUM_CLASSES, generate

CPU = torch.device("cpu")


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shift, coarsen and dim uint8 images `[B, S, S]` at random.

    Returns float32 `[B, 1, S, S]`, normalised. Half of the images lose their detail (to cells of
    4 x 4 pixels, then smoothed), as small pictures do when they are enlarged.
    """
    batch = images.shape[0]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.2, 0.2), uniform(-0.2, 0.25).exp()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    affine = torch.stack([cos, -sin, uniform(-0.2, 0.2), sin, cos, uniform(-0.2, 0.2)], 1)
    x = images[:, None].float() / 255
    grid = F.affine_grid(affine.view(batch, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    coarse = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4.0, mode="bilinear")
    x = torch.where((uniform(0, 1) < 0.5).view(-1, 1, 1, 1), coarse, x)
    return normalise(x * uniform(0.6, 1.0).view(-1, 1, 1, 1))


def make_optimizer(vit: nn.Module, config: PretrainConfig, steps: int):
    """Build AdamW (no decay on vectors) and its schedule: 5 % warm-up, then a cosine to zero."""
    matrices = [p for p in vit.parameters() if p.ndim > 1]
    vectors = [p for p in vit.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.learning_rate,
        total_steps=steps,
        pct_start=0.05,
        cycle_momentum=False,
        final_div_factor=1e4,
    )
    return optimizer, schedule


def accuracy(vit: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of uint8 images `[N, S, S]` whose class the model names, in percent."""
    vit.eval()
    hits = 0
    with torch.inference_mode(), numerics(CPU).context(CPU):
        for x, y in zip(images.split(256), labels.split(256), strict=True):
            logits = vit(normalise(x[:, None].float() / 255))
            hits += int((logits.argmax(1) == y).sum())
    return 100 * hits / len(labels)


def pretrain(config: PretrainConfig) -> Path:
    """Draw the images, train the ViT on the CPU, write the weights, return their path."""
    start = time.perf_counter()
    require_writable(config.output)
    images, labels = map(torch.from_numpy, generate(config.images_per_class, seed=config.seed))
    held_out = tuple(map(torch.from_numpy, generate(16, seed=config.seed, split=1)))
    families = ", ".join(f"{len(draws)} {name}" for name, draws in FAMILIES.items())
    print(f"{len(images):,} generated images, {NUM_CLASSES} classes: {families}")

    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    vit = build_backbone(NUM_CLASSES)
    steps_per_epoch = -(-len(images) // config.batch_size)
    optimizer, schedule = make_optimizer(vit, config, config.epochs * steps_per_epoch)
    held = math.nan
    for epoch in range(1, config.epochs + 1):
        vit.train()
        total = torch.zeros(())
        order = torch.randperm(len(images), generator=generator)
        for index in order.split(config.batch_size):
            with numerics(CPU).context(CPU):
                logits = vit(augment(images[index], generator))
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        held = accuracy(vit, *held_out)
        print(
            f"epoch {epoch:3d}/{config.epochs}  loss {total / steps_per_epoch:.3f}  "
            f"held-out {held:5.1f} %  {time.perf_counter() - start:6.0f} s",
            flush=True,
        )
    save_backbone(vit, config.output, _metadata(config, held, time.perf_counter() - start))
    print(f"wrote {config.output} ({config.output.stat().st_size / 1e6:.1f} MB)")
    return config.output


def _metadata(config: PretrainConfig, held_out: float, seconds: float) -> dict[str, str]:
    recipe = {name: value for name, value in asdict(config).items() if name != "output"}
    return {
        "task": f"classify {NUM_CLASSES} formulas on generated images; no digits, letters or fonts",
        "recipe": json.dumps(recipe),
        "precision": str(fast_dtype(CPU)),
        "held_out_accuracy": f"{held_out:.2f} %",
        "seconds": f"{seconds:.0f}",
        "versions": json.dumps({name: version(name) for name in ("torch", "timm", "safetensors")}),
    }
