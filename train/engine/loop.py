"""The loop: epochs, logged losses, evaluations and checkpoints, with everything resumable."""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ...cli import UsageError
from ..recipes.runspec import RunSpec
from .checkpoint import Checkpoint, Journal, load_checkpoint, save_checkpoint
from .data import Splits
from .distributed import Agreement, World
from .interruption import Interrupted, Requests
from .model import BuiltModel, Evaluation, evaluate
from .progress import Display
from .rundir import METRICS
from .stages import Stages
from .trainer import Trainer

PENDING = "unlooked"
"""Name in checkpoints of the losses that are not logged yet."""

LOSSES: tuple[str, ...] = ("loss", "cross_entropy", "distance")

CHOOSES_ON = {"official": "test", "val": "val", "last": None, "tune": None}
"""Protocol -> split that is evaluated after every epoch and chooses the epoch."""

MEASURED_ON = {"official": "test", "val": "test", "last": "test", "tune": "val"}
"""Protocol -> split on which the chosen epoch is measured."""


@dataclass(kw_only=True, slots=True)
class State:
    """Where a run is; with the tensors it is all that a checkpoint holds."""

    epoch: int = 0
    """Epochs that are finished, their evaluation included."""
    batch: int = 0
    """Batches of the next epoch that are done."""
    step: int = 0
    """Steps done."""
    sums: list[float] = field(default_factory=lambda: [0.0] * len(LOSSES))
    """Over the logged images of the unfinished epoch: loss, cross-entropy, distance."""
    images: int = 0
    """Logged images of the unfinished epoch."""
    seconds: float = 0.0
    """Training time of the unfinished epoch."""
    unlooked_seconds: float = 0.0
    """Training time since losses were logged, where a run was interrupted in between."""
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
    """Trains a model to the end, from wherever the last checkpoint is.

    Attributes:
        journal: of the first process; None on the others.
        best: parameters of the best epoch, by name.
    """

    def __init__(self, spec: RunSpec, world: World, built: BuiltModel, splits: Splits) -> None:
        self.spec, self.world, self.built, self.splits = spec, world, built, splits
        self.batches = len(splits.train)
        if self.batches == 0:
            raise UsageError(
                f"DATASET {spec.dataset}: got {splits.train.num_images} training images, "
                "expected at least one batch; lower --batch-size"
            )
        steps = spec.epochs * self.batches
        self.trainer = Trainer(built.model, spec, world, built.numerics, total_steps=steps)
        self.stages = Stages(spec, world, self.trainer, splits.train)
        self.state = State()
        self.best: dict[str, Tensor] = {}
        self.journal: Journal | None = None
        self._saved, self._mark = time.monotonic(), time.perf_counter()
        self._requests, self._agreement = Requests(), Agreement(world)

    # Checkpoints.

    def resume(self) -> list[str]:
        """Take the newest whole checkpoint, if there is one; return warnings.

        Raises:
            UsageError: all checkpoints are damaged, or they are of another model.
        """
        folder = self.spec.folder
        found, warnings = load_checkpoint(folder) if self.world.is_main else (None, [])
        # The others may have no access to the folder.
        found = cast(Checkpoint | None, self.world.share(found))
        if found is None:
            metrics = folder / METRICS
            if self.world.is_main and metrics.exists() and metrics.stat().st_size:
                warnings.append(
                    f"no checkpoint in {folder}: training restarts and {METRICS} is "
                    "written from the start (a run writes its first checkpoint after "
                    "--checkpoint-seconds)"
                )
            return warnings
        try:
            self.state = State(**found.state)
            self.trainer.load_tensors(found.tensors)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{folder}: its checkpoint is of another model or version ({error}); choose "
                "another --output, or delete the folder to restart"
            ) from None
        if self.state.scaler:
            self.trainer.scaler.load_state_dict(self.state.scaler)
        if PENDING in found.tensors:
            self._put_pending(found.tensors[PENDING])
        self.best = {
            name.removeprefix("best/"): value.to(self.world.device)
            for name, value in found.tensors.items()
            if name.startswith("best/")
        }
        return warnings

    def save(self, pending: Tensor | None = None, metrics_bytes: int | None = None) -> None:
        """Write a checkpoint; only the first process does.

        Args:
            pending: what `_take_pending` returned; None where all losses are logged.
            metrics_bytes: how much of the metrics is valid; None for all.
        """
        if self.journal is not None:
            size = self.journal.sync()
            self.state.metrics_bytes = size if metrics_bytes is None else metrics_bytes
            self.state.scaler = self.trainer.scaler.state_dict()
            tensors = self.trainer.tensors()
            tensors |= {f"best/{name}": value for name, value in self.best.items()}
            if pending is not None:
                tensors[PENDING] = pending
            save_checkpoint(self.spec.folder, tensors, asdict(self.state))
        self._saved = time.monotonic()

    def _take_pending(self) -> Tensor:
        """Return the sums that are not logged yet of all processes, float64 `[world, 4]`: loss,
        cross-entropy, distance and images. Logging them here would add up in another order."""
        trainer = self.trainer
        seen = torch.zeros(self.world.size, 4, dtype=torch.float64, device=self.world.device)
        seen[self.world.rank, :3] = trainer.loss_sums
        seen[self.world.rank, 3] = trainer.images_seen
        seen = self.world.sum(seen)
        self._require_finite(seen[:, :3].flatten().tolist())
        return seen

    def _put_pending(self, seen: Tensor) -> None:
        """Go on with what `_take_pending` returned, perhaps of another number of processes."""
        if len(seen) != self.world.size:
            others = torch.zeros(self.world.size - 1, 4, dtype=seen.dtype)
            seen = torch.cat((seen.sum(0, keepdim=True), others))
        mine = seen[self.world.rank]
        self.trainer.loss_sums.copy_(mine[:3])
        self.trainer.images_seen = int(mine[3])

    def _save_if_due(self) -> None:
        late = time.monotonic() - self._saved >= self.spec.checkpoint_seconds
        if self.world.agree(late):
            self.save()

    # Epochs.

    def run(self, display: Display, requests: Requests) -> None:
        """Train the epochs that are left.

        Args:
            display: what is shown.
            requests: whether this process was asked to end.

        Raises:
            UsageError: the loss is not finite, or a file could not be written.
            Interrupted: a process was asked to end; a checkpoint is written.
        """
        self._requests = requests
        while self.state.epoch < self.spec.epochs:
            self._train_epoch(display)
            self._finish_epoch(display)
            if self.state.epoch == self.spec.epochs:
                self.save()
            else:
                self._save_if_due()

    def _train_epoch(self, display: Display) -> None:
        state, trainer, epoch = self.state, self.trainer, self.state.epoch
        if state.batch == 0:
            done = self.stages.before(epoch)
            if done is not None:
                display.say(done)
            if self.stages.restarts(epoch):
                state.best_epoch, state.best_accuracy, self.best = 0, -1.0, {}
        trainer.begin(epoch)
        self._mark = time.perf_counter() - state.unlooked_seconds
        state.unlooked_seconds = 0.0
        for batch in self.splits.train.epoch(epoch, state.batch):
            trainer.step(batch, epoch, state.batch, state.step)
            state.batch += 1
            state.step += 1
            display.advance(batch.size)
            last = state.batch == self.batches
            if last or state.batch % self.spec.log_steps == 0:
                self._log(display)
                if not last:
                    self._save_if_due()
                self._mark = time.perf_counter()
            self._end_if_asked()

    def _end_if_asked(self, metrics_bytes: int | None = None) -> None:
        """Save and end, all processes after the same step, if any of them was asked to.

        Raises:
            Interrupted: that is so.
        """
        number = self._agreement.ask(self._requests.received)
        if not number:
            return
        state, total = self.state, self.spec.epochs * self.batches
        # After the last epoch the model may hold the chosen values; all else is saved.
        if state.epoch < self.spec.epochs:
            # Between the last step of an epoch and its end nothing is pending.
            waiting = self.trainer.images_seen > 0
            state.unlooked_seconds = time.perf_counter() - self._mark if waiting else 0.0
            self.save(self._take_pending(), metrics_bytes)
        text = (
            f"stopped after step {state.step} of {total}, which is saved; the same command resumes "
            "from there"
        )
        raise Interrupted(number, text if self.world.is_main else "")

    def _log(self, display: Display) -> None:
        """Wait for the device, add up the pending losses and write them down."""
        state = self.state
        sums, images = self.trainer.take_losses()
        seconds = time.perf_counter() - self._mark
        self._require_finite(sums)
        state.sums = [total + new for total, new in zip(state.sums, sums, strict=True)]
        state.images += images
        state.seconds += seconds
        scalars = dict(zip(LOSSES, (value / images for value in sums), strict=True))
        rate = images / seconds
        display.note(f"loss {scalars['loss']:.3f}  {rate:,.0f} images/s")
        if self.journal is not None:
            scalars["learning_rate"] = self.trainer.learning_rate(state.step - 1)
            scalars["images_per_second"] = rate
            self.journal.add("steps", state.step, scalars, epoch=state.epoch + 1)

    def _require_finite(self, sums: list[float]) -> None:
        if not all(map(math.isfinite, sums)):
            raise UsageError(
                f"epoch {self.state.epoch + 1}, step {self.state.step}: the loss is not finite; "
                "the last checkpoint is of an earlier step. Lower --learning-rate, or use "
                "--precision bf16-autocast or fp32"
            )

    def _finish_epoch(self, display: Display) -> None:
        """Write the epoch down, evaluate where the protocol does so, and move on."""
        state, number = self.state, self.state.epoch + 1
        scalars = dict(zip(LOSSES, (value / state.images for value in state.sums), strict=True))
        scalars["seconds"] = state.seconds
        scalars["images_per_second"] = state.images / state.seconds
        text = (
            f"epoch {number:>3}/{self.spec.epochs}  loss {scalars['loss']:.4f}  "
            f"{state.seconds:.2f} s  {scalars['images_per_second']:,.0f} images/s"
        )
        # An epoch whose evaluation is interrupted is written down again.
        size = None if self.journal is None else self.journal.size
        if self.journal is not None:
            self.journal.add("epoch", state.step, scalars, epoch=number)
        split = CHOOSES_ON[self.spec.protocol]
        if split is not None:
            found = self.evaluate(split, epoch=number, metrics_bytes=size)
            state.last_accuracy = found.accuracy
            if found.accuracy > state.best_accuracy:
                state.best_epoch, state.best_accuracy = number, found.accuracy
                named = self.built.model.trained_tensors()
                self.best = {name: value.detach().clone() for name, value in named.items()}
            text += f"  {split} {found.accuracy:.2f} % (best {state.best_accuracy:.2f} %)"
        display.say(text)
        state.epoch, state.batch, state.images, state.seconds = number, 0, 0, 0.0
        state.sums = [0.0] * len(LOSSES)

    def evaluate(self, split: str, *, epoch: int, metrics_bytes: int | None = None) -> Evaluation:
        """Evaluate the model as it is, after an epoch (from 1), on a split; write that down.

        Raises:
            Interrupted: a process was asked to end; `metrics_bytes` of the metrics are valid.
        """
        self.trainer.share_counted()
        found = evaluate(
            self.built.for_evaluation(),
            self.splits.evaluation[split],
            self.world,
            self.built.eval_numerics,
            lambda: self._end_if_asked(metrics_bytes),
        )
        if self.journal is not None:
            scalars = {key: getattr(found, key) for key in ("accuracy", "loss", "seconds")}
            record: dict[str, Any] = {"split": split, "images": found.images, "epoch": epoch}
            self.journal.add("evaluation", self.state.step, scalars, **record)
        return found

    def close(self) -> None:
        """Wait for what the processes still tell each other."""
        self._agreement.close()
