"""Training steps: forward, backward, optimiser, without waiting for the device.

The loss of a step stays on the device; `take_losses` is the one place that waits for it.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tcpa

from ..recipes import Recipe
from .distributed import World
from .objective import Mixer, losses, match_weight
from .optimizer import make_optimizer, rate_factor
from .precision import Numerics
from .randomness import seed_model
from .robust import keep_critical


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
        settings: Recipe,
        world: World,
        numerics: Numerics,
        *,
        total_steps: int,
        graph: bool = False,
    ) -> None:
        self.model, self.world = model, world
        self._settings, self.numerics, self._total = settings, numerics, total_steps
        lion = settings.input_prompt
        self._critical = lion.critical_share if isinstance(lion, tcpa.LIONConfig) else 1.0
        self._mixer = Mixer(settings, model.num_classes)
        self._weight = match_weight(settings.prompts)
        self._graph = _StepGraph(self) if graph else None
        self.begin_anew()
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=numerics.scales_loss)
        self.loss_sums = torch.zeros(3, device=world.device)
        self.images_seen = 0

    def begin_anew(self) -> None:
        """Make the optimiser, without any memory, for the values that the model trains now."""
        graph, device = self._graph is not None, self.world.device
        if graph:
            self._graph = _StepGraph(self)
        self.optimizer = make_optimizer(self.model, self._settings, device, graph=graph)
        self._module = self._distribute(self.model)

    def _distribute(self, model: nn.Module) -> nn.Module:
        if self.world.size == 1:
            return model
        # Keys get no gradient where nothing is matched.
        role = getattr(self._settings.prompts, "coordination", "token") == "role"
        index = self.world.device.index
        return DistributedDataParallel(
            model,
            device_ids=None if index is None else [index],
            gradient_as_bucket_view=True,
            find_unused_parameters=role,
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
        factor = rate_factor(self._settings, step, self._total)
        for group in self.optimizer.param_groups:
            rate = group["peak"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        images, targets = self._mixer(batch.images, batch.labels, epoch=epoch, step=index)
        images = images.to(self.numerics.weights)
        count = len(images)
        if count == 0:
            # This process has no row of a tiny last batch and joins the others with weight 0.
            images, targets = _dummy(images), _dummy(targets)
        # The mean over processes that DistributedDataParallel takes becomes the global mean.
        scale = count * self.world.size / batch.size
        seed_model(self._settings.seed, epoch, index, self.world.rank)
        if self._graph is None:
            found = self.update(images, targets, scale)
        else:
            found = self._graph.update(images, targets, scale)
        self.loss_sums += found * count
        self.images_seen += count

    def update(self, images: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Do what a step does on the device; return loss, cross-entropy, distance `[3]`."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.numerics.context(self.world.device):
            logits, distance = self._module(images, return_distance=True)
        found = losses(logits, distance, targets, self._weight)
        self.scaler.scale(found[0] * scale).backward()
        if self._critical < 1:
            keep_critical(self._prompt_parameters(), self._critical)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return found.detach()

    def _prompt_parameters(self) -> list[nn.Parameter]:
        parts = (self.model.input_prompt, self.model.feature_prompt)
        return [p for part in parts if part is not None for p in part.parameters()]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, of the values without one of their own."""
        return self._settings.peak_rate * rate_factor(self._settings, step, self._total)

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

    # What a checkpoint holds of the training.

    def tensors(self) -> dict[str, Tensor]:
        """Return all that training decides of the model and the optimiser's state, by name."""
        found: dict[str, Tensor] = {}
        for name, value in self.model.trained_tensors().items():
            found[f"model/{name}"] = value.detach()
            if isinstance(value, nn.Parameter):
                for key, state in self.optimizer.state[value].items():
                    if isinstance(state, Tensor):
                        found[f"optimizer/{key}/{name}"] = state
        return found

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


def _wait_for(stream: Any) -> None:
    """Order a side stream and the current one: what either was given comes before what follows."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    current.wait_stream(stream)


class _StepGraph:
    """The device's part of a step as one CUDA graph; captured anew when the selection changes.

    Batches of another size than the first run without it.
    """

    WARM_UPS = 3

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._graph: Any = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._found: Tensor | None = None
        self._selects_randomly: bool | None = None

    def update(self, images: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Replay a step; the numbers it draws come from the generator as it is seeded now."""
        random = self._random()
        if self._inputs is None or self._selects_randomly != random:
            self._capture(images, targets, scale)
            self._selects_randomly = random
        inputs = cast(tuple[Tensor, Tensor], self._inputs)
        if images.shape != inputs[0].shape:
            return self._trainer.update(images, targets, scale)
        for static, value in zip(inputs, (images, targets), strict=True):
            static.copy_(value)
        self._graph.replay()
        return cast(Tensor, self._found)

    def _random(self) -> bool:
        model = self._trainer.model
        return model.epoch < getattr(model.config, "random_selection_epochs", 0)

    def _capture(self, images: Tensor, targets: Tensor, scale: float) -> None:
        """Capture; the steps that warm up leave no trace in parameters, optimiser or generator."""
        self._graph = self._found = None
        inputs = self._inputs = (images.clone(), targets.clone())
        state = torch.cuda.get_rng_state(self._trainer.world.device)
        before = self._values()
        stream = torch.cuda.Stream()
        _wait_for(stream)
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                self._trainer.update(*inputs, scale)
        _wait_for(stream)
        self._restore(before)
        torch.cuda.set_rng_state(state, self._trainer.world.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._found = self._trainer.update(*inputs, scale)

    def _values(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._trainer.tensors().items()}

    @torch.no_grad()
    def _restore(self, before: dict[str, Tensor]) -> None:
        """Put values back in place; an optimiser that had no state yet starts from zeros."""
        for name, value in self._trainer.tensors().items():
            if name in before:
                value.copy_(before[name])
            else:
                value.zero_()
