"""The loop: epochs, looks at the loss, evaluations and checkpoints, with everything resumable."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...cli import UsageError
from ..config import RunConfig
from ..recipes import Recipe
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .distributed import World
from .evaluate import Evaluation, evaluate
from .inputs import Splits
from .journal import METRICS, Journal
from .model import BuiltModel
from .progress import Display
from .steps import Trainer

LOSSES: tuple[str, ...] = ("loss", "cross_entropy", "distance")

CHOOSES_ON = {"official": "test", "val": "val", "last": None, "tune": None}
"""Protocol -> split that is evaluated after every epoch and chooses the epoch."""


@dataclass(kw_only=True, slots=True)
class State:
    """Where a run is; with the tensors it is all that a checkpoint holds."""

MEASURED_ON = {"official": "test", "val": "test", "last": "test", "tune": "val"}
"""Protocol -> split on which the chosen epoch is measured."""

    epoch: int = 0
    """Epochs that are finished, their evaluation included."""
    batch: int = 0
    """Batches of the next epoch that are done."""
    step: int = 0
    """Steps done."""
    sums: list[float] = field(default_factory=lambda: [0.0] * len(LOSSES))
    """Over the images of the unfinished epoch: loss, cross-entropy, distance."""
    images: int = 0
    """Images of the unfinished epoch."""
    seconds: float = 0.0
    """Training time of the unfinished epoch."""
    best_epoch: int = 0
    """From 1; 0 before the first evaluation."""
    best_accuracy: float = -1.0
    """Percent."""
    last_accuracy: float | None = None
    """Percent, on the split that chooses."""
    metrics_bytes: int = 0
    """Size of metrics.jsonl."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the loss scaling."""


class Loop:
    """Trains a model to the end, from wherever the last checkpoint is."""

    def __init__(
        self,
        config: RunConfig,
        settings: Recipe,
        world: World,
        built: BuiltModel,
        splits: Splits,
        folder: Path,
    ) -> None:
        self.config, self.settings, self.world = config, settings, world
        self.built, self.splits, self.folder = built, splits, folder
        self.batches = len(splits.train)
        if self.batches == 0:
            raise UsageError(
                f"DATASET {config.dataset}: got {splits.train.num_images} training images, "
                "expected at least one batch; lower --batch-size"
            )
        self.trainer = Trainer(
            built.model,
            settings,
            world,
            built.numerics,
            total_steps=settings.epochs * self.batches,
            graph=config.cuda_graph,
        )
        self.state = State()
        self.best: dict[str, Tensor] = {}
        self._saved = time.monotonic()

    # Checkpoints.

    def resume(self) -> list[str]:
        """Take the newest whole checkpoint, if there is one; return warnings.

        Raises:
            UsageError: all checkpoints are damaged, or they are of another model.
        """
        found, warnings = load_checkpoint(self.folder) if self.world.is_main else (None, [])
        # The others may have no access to the folder.
        found = cast(Checkpoint | None, self.world.share(found))
        if found is None:
            metrics = self.folder / METRICS
            if self.world.is_main and metrics.exists() and metrics.stat().st_size:
                warnings.append(
                    f"no checkpoint in {self.folder}: training begins anew and {METRICS} is "
                    "written from the start (a run writes its first checkpoint after "
                    "--checkpoint-seconds)"
                )
            return warnings
        self.state = State(**found.state)
        try:
            self.trainer.load_tensors(found.tensors)
        except ValueError as error:
            raise UsageError(
                f"{self.folder}: its checkpoint is of another model ({error}); choose another "
                "--output, or delete the folder to begin anew"
            ) from None
        if self.state.scaler:
            self.trainer.scaler.load_state_dict(self.state.scaler)
        device = self.world.device
        self.best = {
            name.removeprefix("best/"): value.to(device)
            for name, value in found.tensors.items()
            if name.startswith("best/")
        }
        return warnings

    def save(self, journal: Journal | None) -> None:
        """Write a checkpoint; only the first process does."""
        if journal is not None:
            self.state.metrics_bytes = journal.sync()
            self.state.scaler = self.trainer.scaler.state_dict()
            best = {f"best/{name}": value for name, value in self.best.items()}
            save_checkpoint(self.folder, self.trainer.tensors() | best, asdict(self.state))
        self._saved = time.monotonic()

    def _save_if_due(self, journal: Journal | None) -> None:
        late = time.monotonic() - self._saved >= self.config.checkpoint_seconds
        if self.world.agree(late):
            self.save(journal)

    # Epochs.

    def run(self, journal: Journal | None, display: Display) -> None:
        """Train the epochs that are left.

        Args:
            journal: of the first process; None on the others.
            display: what is shown.

        Raises:
            UsageError: the loss is not finite, or a file could not be written.
        """
        while self.state.epoch < self.settings.epochs:
            self._train_epoch(journal, display)
            self._finish_epoch(journal, display)
            if self.state.epoch == self.settings.epochs:
                self.save(journal)
            else:
                self._save_if_due(journal)

    def _train_epoch(self, journal: Journal | None, display: Display) -> None:
        state, trainer, epoch = self.state, self.trainer, self.state.epoch
        trainer.begin(epoch)
        mark = time.perf_counter()
        for batch in self.splits.train.epoch(epoch, state.batch):
            trainer.step(batch, epoch, state.batch, state.step)
            state.batch += 1
            state.step += 1
            display.advance(batch.size)
            last = state.batch == self.batches
            if last or state.batch % self.config.log_steps == 0:
                self._look(journal, display, mark)
                if not last:
                    self._save_if_due(journal)
                mark = time.perf_counter()

    def _look(self, journal: Journal | None, display: Display, mark: float) -> None:
        """Wait for the device, add up the losses since the last look and write them down."""
        state = self.state
        sums, images = self.trainer.take_losses()
        seconds = time.perf_counter() - mark
        if not all(map(math.isfinite, sums)):
            raise UsageError(
                f"epoch {state.epoch + 1}, step {state.step}: the loss is not finite; the last "
                "checkpoint is of an earlier step. Lower --learning-rate, or use --precision "
                "bf16-autocast or fp32"
            )
        state.sums = [total + new for total, new in zip(state.sums, sums, strict=True)]
        state.images += images
        state.seconds += seconds
        means = dict(zip(LOSSES, (value / images for value in sums), strict=True))
        rate = images / seconds
        display.note(f"loss {means['loss']:.3f}  {rate:,.0f} images/s")
        if journal is not None:
            scalars = means | {
                "learning_rate": self.trainer.learning_rate(state.step - 1),
                "images_per_second": rate,
            }
            journal.add("steps", state.step, scalars, epoch=state.epoch + 1)

    def _finish_epoch(self, journal: Journal | None, display: Display) -> None:
        """Write the epoch down, evaluate where the protocol does so, and move on."""
        state, number = self.state, self.state.epoch + 1
        scalars = dict(zip(LOSSES, (value / state.images for value in state.sums), strict=True))
        scalars["seconds"] = state.seconds
        scalars["images_per_second"] = state.images / state.seconds
        text = (
            f"epoch {number:>3}/{self.settings.epochs}  loss {scalars['loss']:.4f}  "
            f"{state.seconds:.2f} s  {scalars['images_per_second']:,.0f} images/s"
        )
        if journal is not None:
            journal.add("epoch", state.step, scalars, epoch=number)
        split = CHOOSES_ON[self.config.protocol]
        if split is not None:
            found = self.evaluate(split, journal, epoch=number)
            state.last_accuracy = found.accuracy
            if found.accuracy > state.best_accuracy:
                state.best_epoch, state.best_accuracy = number, found.accuracy
                self.best = self.trained_values()
            text += f"  {split} {found.accuracy:.2f} % (best {state.best_accuracy:.2f} %)"
        display.say(text)
        state.epoch, state.batch, state.images, state.seconds = number, 0, 0, 0.0
        state.sums = [0.0] * len(LOSSES)

    def evaluate(self, split: str, journal: Journal | None, *, epoch: int) -> Evaluation:
        """Evaluate the model as it is, after an epoch (from 1), on a split; write that down."""
        model, source = self.built.for_evaluation(), self.splits.evaluation[split]
        found = evaluate(model, source, self.world, self.built.eval_numerics)
        if journal is not None:
            scalars = {key: getattr(found, key) for key in ("accuracy", "loss", "seconds")}
            record: dict[str, Any] = {"split": split, "images": found.images, "epoch": epoch}
            journal.add("evaluation", self.state.step, scalars, **record)
        return found

    # The chosen epoch.

    def trained_values(self) -> dict[str, Tensor]:
        """Return copies of the trained values by name."""
        named = self.trainer.model.trainable_named_parameters()
        return {name: value.detach().clone() for name, value in named.items()}

    @torch.no_grad()
    def use_best(self) -> None:
        """Put the values of the chosen epoch into the model."""
        for name, value in self.trainer.model.trainable_named_parameters().items():
            value.copy_(self.best[name])
