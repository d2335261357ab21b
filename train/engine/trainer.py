"""Training steps of a run: schedule, mixing, seeds, processes and sums around the optimizer step.

The losses stay on the device; `take_losses` is the one place that waits for it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tcpa

from ..recipes.runspec import RunSpec
from .distributed import World
from .objective import Mixer
from .optimizer import make_optimizer, rate_factor
from .precision import Numerics
from .randomness import seed_model
from .step import Step


class Trainer:
    """Trains the trained values of a model; the frozen weights are never touched.

    Attributes:
        model: the model, on the device of `world`.
        optimizer: of the recipe, on the trained values.
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
        self.begin_anew()
        self.loss_sums = torch.zeros(3, device=world.device)
        self.images_seen = 0

    def begin_anew(self) -> None:
        """Make the optimiser, without any memory, for the values that the model trains now."""
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
            batch: see `tcpa.train.data`; its images may be changed.
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
        """Return the learning rate of a step, of the values without one of their own."""
        return self._spec.peak_rate * rate_factor(self._spec, step, self._total)

    def share_counted(self) -> None:
        """Give all processes what the first one counted beside the trained values (running
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
        self.begin_anew()
        named = self.model.trainable_named_parameters()
        for saved, value in tensors.items():
            kind, _, rest = saved.partition("/")
            key, _, name = rest.partition("/")
            if kind == "optimizer" and name in named:
                parameter = named[name]
                self.optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def _dummy(values: Tensor) -> Tensor:
    return values.new_zeros(1, *values.shape[1:])
