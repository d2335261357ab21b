"""Training steps of a run: schedule, mixing, seeds, processes and sums around the optimizer step.

Random numbers are functions of (seed, epoch, step), so that a resumed run draws what it would have
drawn: nothing of a generator's state is saved, and the generators are seeded before every step.

The losses stay on the device; `take_losses` is the one place that waits for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tcpa

from ..recipes.recipe import Recipe
from ..recipes.runspec import RunSpec
from .distributed import World
from .optimizer import make_optimizer, rate_factor
from .precision import Numerics
from .step import Step

MIXING, MODEL, STAGE = 1, 2, 3
"""What numbers are drawn for; every purpose has a stream of its own."""


def derive(seed: int, purpose: int, *position: int) -> int:
    """Return a seed of 63 bits for a purpose and a position, e.g. (epoch, step, rank)."""
    sequence = np.random.SeedSequence([seed, purpose, *position])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def seed_model(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed dropout, random selection and noise of one step; each process draws its own."""
    torch.manual_seed(derive(seed, MODEL, epoch, step, rank))


@contextmanager
def numpy_seeded(seed: int, epoch: int, step: int) -> Iterator[None]:
    """Seed numpy's global generator, from which timm's Mixup draws, and restore it afterwards.

    The same on all processes: they hold parts of one batch, which is mixed by one weight.
    """
    before = np.random.get_state()
    np.random.seed(derive(seed, MIXING, epoch, step) % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


class Mixer:
    """Mixes the images of a batch in pairs and turns labels into soft targets."""

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self._recipe, self._num_classes = recipe, num_classes
        self._mixup = Mixup(
            mixup_alpha=recipe.mixup_alpha,
            cutmix_alpha=recipe.cutmix_alpha,
            prob=recipe.mix_prob,
            label_smoothing=recipe.label_smoothing,
            num_classes=num_classes,
        )

    def __call__(
        self, images: Tensor, labels: Tensor, *, epoch: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """Return mixed images and float32 targets `[n, classes]`.

        Row i is mixed with row n - 1 - i; all rows of the global batch by one weight, drawn from
        (seed, epoch, step). `images` may be changed in place.

        Args:
            images: float `[n, 3, H, W]`; n is even where images are mixed.
            labels: int64 `[n]`.
            epoch, step: position in the training.

        Source:
            Official trainer: timm's Mixup per batch, label smoothing on every batch.
        """
        if not self._recipe.mixes or len(images) == 0:
            smoothing = self._recipe.label_smoothing
            return images, mixup_target(labels, self._num_classes, 1.0, smoothing)
        with numpy_seeded(self._recipe.seed, epoch, step):
            return self._mixup(images, labels)


class Trainer:
    """Trains the trainable parameters of a model; the frozen weights are never touched.

    Attributes:
        model: the model, on the device of `world`.
        optimizer: of the recipe, on the trainable parameters.
        scaler: scales the loss under float16 autocast, and is inactive otherwise.
        loss_sums: of the images that this process saw since `take_losses`: loss, cross-entropy and
            distance, float32 `[3]`, on the device.
        images_seen: how many images these are.
    """

    def __init__(
        self,
        model: tcpa.PromptedViT,
        spec: RunSpec,
        world: World,
        numerics: Numerics,
        *,
        total_steps: int,
    ) -> None:
        self.model, self.world = model, world
        self._spec, self.numerics, self._total = spec, numerics, total_steps
        self._mixer = Mixer(spec, model.num_classes)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=numerics.scales_loss)
        self.restart()
        self.loss_sums = torch.zeros(3, device=world.device)
        self.images_seen = 0

    def restart(self) -> None:
        """Make the optimizer, without any memory, for the parameters that are trained now."""
        graph, device = self._spec.cuda_graph, self.world.device
        self.optimizer = make_optimizer(self.model, self._spec, device, graph=graph)
        self.optimizer_step = Step(
            self.model,
            self.optimizer,
            numerics=self.numerics,
            module=self._distribute(self.model),
            scaler=self.scaler,
            graph=graph,
        )

    def _distribute(self, model: nn.Module) -> nn.Module:
        if self.world.size == 1:
            return model
        prompts = self._spec.prompts
        index = self.world.device.index
        return DistributedDataParallel(
            model,
            device_ids=None if index is None else [index],
            gradient_as_bucket_view=True,
            find_unused_parameters=prompts is not None and prompts.finds_unused_parameters,
        )

    def begin(self, epoch: int) -> None:
        """Switch the model to training, with the selection of an epoch, from 0."""
        self.model.train()
        self.model.set_epoch(epoch)

    def step(self, batch: Any, epoch: int, index: int, step: int) -> None:
        """Train on a batch.

        Args:
            batch: see `tcpa.train.data.batches.Batch`; its images may be changed.
            epoch, index: epoch and number of the batch in it, from 0.
            step: number of the step in the training, from 0.
        """
        factor = rate_factor(self._spec, step, self._total)
        for group in self.optimizer.param_groups:
            rate = group["peak"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        images, targets = self._mixer(batch.images, batch.labels, epoch=epoch, step=index)
        count = len(images)
        if count == 0:
            # This process has no row of a tiny last batch and joins the others with weight 0.
            images, targets = _dummy(images), _dummy(targets)
        # The mean over processes that DistributedDataParallel takes becomes the global mean.
        scale = count * self.world.size / batch.size
        seed_model(self._spec.seed, epoch, index, self.world.rank)
        self.loss_sums += self.optimizer_step(images, targets, scale).losses * count
        self.images_seen += count

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, of parameters without one of their own."""
        return self._spec.peak_rate * rate_factor(self._spec, step, self._total)

    def share_counted(self) -> None:
        """Give all processes what the first one counted beside the parameters (running
        statistics of a head), so that they evaluate one model."""
        for value in self.model.trained_tensors().values():
            if not isinstance(value, nn.Parameter):
                self.world.broadcast(value)

    def take_losses(self) -> tuple[list[float], int]:
        """Return sums over images of loss, cross-entropy and distance, and their number, of all
        processes since the last call; waits for the device."""
        seen = torch.tensor([self.images_seen], device=self.world.device, dtype=torch.float64)
        sums = self.world.sum(torch.cat((self.loss_sums.double(), seen))).tolist()
        self.loss_sums.zero_()
        self.images_seen = 0
        return sums[:3], int(sums[3])

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of the training; see `Step.tensors`."""
        return self.optimizer_step.tensors()

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take what `tensors` returned.

        Raises:
            ValueError: it is of another model.
        """
        model = {n.removeprefix("model/"): v for n, v in tensors.items() if n.startswith("model/")}
        self.model.load_trained(model)
        self.restart()
        named = self.model.trainable_named_parameters()
        for saved, value in tensors.items():
            kind, _, rest = saved.partition("/")
            key, _, name = rest.partition("/")
            if kind == "optimizer" and name in named:
                parameter = named[name]
                self.optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def _dummy(values: Tensor) -> Tensor:
    return values.new_zeros(1, *values.shape[1:])
