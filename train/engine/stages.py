"""What happens to a model before an epoch, outside of gradient steps: clusters of DAM-VP, output
mappings of AutoVP, pruning and rewinding of E2VPT.

Every stage is a function of the model's values, the training images and the seed. A run that goes
on from the end of an epoch repeats it to the same end; later checkpoints hold what it found.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

import tcpa
from tcpa.methods.vp import STRIPS

from ...cli import UsageError
from ..data.batches import local_rows
from ..recipes.runspec import RunSpec
from .data import Source
from .distributed import World
from .precision import Numerics
from .trainer import STAGE, Trainer, derive

META_PROMPT = "tcpa-meta-prompt"
"""Format of a file with a meta-prompt."""


class Stages:
    """The stages of a run; knows nothing that a checkpoint would have to hold."""

    def __init__(self, spec: RunSpec, world: World, trainer: Trainer, source: Source) -> None:
        self._spec, self._world = spec, world
        self._trainer, self._source = trainer, source
        values = trainer.model.trained_tensors().items() if spec.rounds > 1 else ()
        self._initial = {name: value.detach().clone() for name, value in values}

    def before(self, epoch: int) -> str | None:
        """Do what comes before the first step of an epoch, from 0; say what was done.

        Raises:
            UsageError: the images do not allow it.
        """
        spec = self._spec
        torch.manual_seed(derive(spec.seed, STAGE, epoch))
        needed = None if spec.input_prompt is None else spec.input_prompt.fits_before(epoch)
        if needed is not None:
            fit = {"clusters": self._fit_clusters, "mapping": self._fit_mapping}[needed]
            try:
                return fit(epoch)
            except ValueError as error:
                raise UsageError(f"--method {spec.method}: {error}") from None
        return self._prune() if self.restarts(epoch) else None

    def restarts(self, epoch: int) -> bool:
        """Whether another model is trained from an epoch on: earlier ones cannot be chosen."""
        spec = self._spec
        return epoch > 0 and epoch * spec.rounds % spec.epochs == 0

    def _fit_clusters(self, epoch: int) -> str:
        """Cluster the first training images as they come, of all processes alike."""
        model = self._trainer.model
        prompt: Any = model.input_prompt
        limit, found, count = prompt.config.num_images, [], 0
        for batch in self._source.epoch(epoch):
            with self._trainer.numerics.context(self._world.device):
                images = batch.images.to(self._trainer.numerics.weights)
                features = model.plain_features(images) if len(images) else None
            found.append(self._gather(features, model.backbone.embed_dim, batch.size))
            count += batch.size
            if count >= limit:
                break
        prompt.fit(torch.cat(found)[:limit].to(prompt.prototypes.device))
        # Equal on all processes to the last bit.
        shared = self._world.share(prompt.prototypes.cpu())
        assert isinstance(shared, Tensor)
        with torch.no_grad():
            prompt.prototypes.copy_(shared)
        if self._spec.meta_prompt is not None:
            prompt.use_meta_prompt(load_meta_prompt(self._spec.meta_prompt))
        self._trainer.restart()
        return f"{prompt.num_frames} clusters of {min(count, limit):,} training images"

    def _gather(self, rows: Tensor | None, width: int, size: int) -> Tensor:
        """Return the rows of a global batch, `[size, width]` float32, in its order."""
        world = self._world
        found = torch.zeros(size, width, device=world.device)
        if rows is not None:
            mine = torch.from_numpy(local_rows(size, world.rank, world.size)).to(world.device)
            found[mine] = rows.float()
        return world.sum(found)

    def _fit_mapping(self, epoch: int) -> str:
        """Choose the source classes of every class from all training images as they are now."""
        trainer, model = self._trainer, self._trainer.model
        assert model.mapping is not None
        shape = (model.mapping.num_sources, model.mapping.num_classes)
        counts = torch.zeros(shape, dtype=torch.int64, device=self._world.device)
        model.eval()
        for batch in self._source.epoch(epoch):
            if len(batch.images) == 0:
                continue
            with trainer.numerics.context(self._world.device):
                images = batch.images.to(trainer.numerics.weights)
                counts += model.count_sources(images, batch.labels)
        model.mapping.fit(self._world.sum(counts))
        model.train()
        return f"source classes chosen for {shape[1]} classes among {shape[0]:,}"

    def _prune(self) -> str:
        """Prune the least important masks and restart from the first values."""
        trainer, spec = self._trainer, self._spec
        tokens: Any = trainer.model.tokens
        importance = mask_importance(trainer.model, self._source, self._world, trainer.numerics)
        trainer.model.load_trained(self._initial)
        tokens.prune(*importance, spec.prune_tokens, spec.prune_segments)
        trainer.restart()
        left = int(tokens.token_mask.sum())
        parts = int((tokens.segment_mask * tokens.token_mask[:, None]).sum())
        return (
            f"pruned to {left} of {len(tokens.token_mask)} tokens with {parts} segments in all; "
            "training restarts"
        )


def mask_importance(
    model: tcpa.PromptedViT,
    source: Source,
    world: World,
    numerics: Numerics,
) -> tuple[Tensor, Tensor]:
    """Return the mean signed gradient of the cross-entropy for the masks of E2VPT's prompts.

    Args:
        model: the model; it is left in training mode, its parameters without gradients.
        source: training images, all of them once, over all processes.
        world: the processes.
        numerics: precision of the model.

    Returns:
        Of the tokens `[P]`, of the segments `[P, segments]`; float32, the same on all processes.

    Source:
        E2VPT (ICCV 2023): the lowest are pruned first.
    """
    tokens: Any = model.tokens
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


def load_meta_prompt(path: Path) -> list[Tensor]:
    """Read the strips of a meta-prompt.

    Raises:
        UsageError: there is no such file, or it is no meta-prompt.
    """
    try:
        with safe_open(path, framework="pt") as file:
            ours = (file.metadata() or {}).get("format") == META_PROMPT
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"--meta-prompt: {path} cannot be read ({error}); name a file of meta-training"
        ) from None
    strips = [named.get(name) for name in STRIPS]
    found = [strip for strip in strips if strip is not None and strip.is_floating_point()]
    if not ours or len(found) < len(STRIPS):
        raise UsageError(
            f"--meta-prompt: {path} is no meta-prompt, expected the strips {', '.join(STRIPS)}; "
            "name a file of meta-training"
        )
    return found
