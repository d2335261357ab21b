"""What happens to a model before an epoch, outside of gradient steps: clusters of DAM-VP, output
mappings of AutoVP, pruning and rewinding of E2VPT.

Every stage is a function of the model's values, the training images and the seed. A run that goes
on from the end of an epoch repeats it to the same end; later checkpoints hold what it found.
"""

import torch
from torch import Tensor

import tcpa
from tcpa.methods.e2vpt import E2VPTPrompts

from ...cli import UsageError
from ..data.batches import local_rows
from ..recipes.runspec import RunSpec
from .distributed import World
from .inputs import Source
from .meta_prompt import load_meta_prompt
from .pruning import mask_importance
from .randomness import STAGE, derive
from .trainer import Trainer


class Stages:
    """The stages of a run; knows nothing that a checkpoint would have to hold."""

    def __init__(self, spec: RunSpec, world: World, trainer: Trainer, source: Source) -> None:
        self._spec, self._world = spec, world
        self._trainer, self._source = trainer, source
        model = trainer.model
        rewinds = spec.rounds > 1
        values = model.trained_tensors().items() if rewinds else ()
        self._initial = {name: value.detach().clone() for name, value in values}

    def before(self, epoch: int) -> str | None:
        """Do what comes before the first step of an epoch, from 0; say what was done.

        Raises:
            UsageError: the images do not allow it.
        """
        model, spec = self._trainer.model, self._spec
        torch.manual_seed(derive(spec.seed, STAGE, epoch))
        mapping = "head"
        if isinstance(spec.input_prompt, tcpa.AutoVPConfig):
            mapping = spec.input_prompt.mapping
        try:
            if epoch == 0 and isinstance(spec.input_prompt, tcpa.DAMVPConfig):
                return self._fit_clusters()
            if mapping == "iterative" or (mapping == "frequency" and epoch == 0):
                return self._fit_mapping(epoch)
        except ValueError as error:
            raise UsageError(f"--method {spec.method}: {error}") from None
        if self.begins_anew(epoch) and isinstance(model.tokens, E2VPTPrompts):
            return self._prune(model.tokens)
        return None

    def begins_anew(self, epoch: int) -> bool:
        """Whether another model is trained from an epoch on: earlier ones cannot be chosen."""
        spec = self._spec
        return epoch > 0 and epoch * spec.rounds % spec.epochs == 0

    def _fit_clusters(self) -> str:
        """Cluster the first training images as they come, of all processes alike."""
        model, prompt = self._trainer.model, self._trainer.model.input_prompt
        limit, found, count = prompt.config.num_images, [], 0
        for batch in self._source.epoch(0):
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
        self._trainer.begin_anew()
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

    def _prune(self, tokens: E2VPTPrompts) -> str:
        """Prune the least important masks and begin anew from the first values."""
        trainer, spec = self._trainer, self._spec
        importance = mask_importance(
            trainer.model, tokens, self._source, self._world, trainer.numerics
        )
        trainer.model.load_trained(self._initial)
        tokens.prune(*importance, spec.prune_tokens, spec.prune_segments)
        trainer.begin_anew()
        left = int(tokens.token_mask.sum())
        parts = int((tokens.segment_mask * tokens.token_mask[:, None]).sum())
        return (
            f"pruned to {left} of {len(tokens.token_mask)} tokens with {parts} segments in all; "
            "training begins anew"
        )
