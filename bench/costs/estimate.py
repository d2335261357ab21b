"""Predict the time of steps and epochs from FLOPs, bytes and the ceilings of a device.

Every operation takes at least max(FLOPs / rate, bytes / bandwidth); a step takes the sum.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ...cli import require
from ..hardware import Ceilings
from .model import step
from .workload import CHANNELS, Operation, Workload, total

TRAIN_IMAGES, TEST_IMAGES = 5394, 5794
"""CUB-200-2011 as the official code splits it: 90 % of the training part, and the test part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a step costs on a number of GPUs; seconds, bytes, FLOPs; all of it predicted."""

    train_step: float
    """Forward, backward, all-reduce and update."""
    eval_step: float
    all_reduce: float
    train_flops: float
    """Of one GPU, what the backward pass repeats included."""
    repeated_flops: float
    train_bytes: float
    gradient_bytes: float
    train_epoch: float
    eval_epoch: float
    images_per_second: float
    """Trained, all GPUs together; so many have to be read."""
    input_bytes_per_second: float
    """As 8-bit pixels of the model's image size."""


def estimate(work: Workload, ceilings: Ceilings, *, gpus: int = 1, link: float = 50e9) -> Estimate:
    """Predict a step.

    Args:
        work: what each GPU computes.
        ceilings: what each GPU can attain.
        gpus: how many.
        link: bytes per second from one GPU to the next.
    """
    operations = step(work, train=True)
    cost, gradient_bytes = total(operations), 4.0 * work.trained
    all_reduce = 2 * (gpus - 1) / gpus * gradient_bytes / link
    train_step = seconds(operations, ceilings) + all_reduce
    eval_step = seconds(step(work, train=False), ceilings)
    images = work.batch * gpus
    rate = images / train_step
    return Estimate(
        train_step=train_step,
        eval_step=eval_step,
        all_reduce=all_reduce,
        train_flops=cost.flops,
        repeated_flops=sum(operation.repeated for operation in operations),
        train_bytes=cost.bytes,
        gradient_bytes=gradient_bytes,
        train_epoch=math.ceil(TRAIN_IMAGES / images) * train_step,
        eval_epoch=math.ceil(TEST_IMAGES / images) * eval_step,
        images_per_second=rate,
        input_bytes_per_second=rate * CHANNELS * work.pixels,
    )


def seconds(operations: list[Operation], ceilings: Ceilings) -> float:
    """Return the sum of the operations' lower bounds."""
    return sum(o.cost.seconds(ceilings.flops, ceilings.bandwidth) for o in operations)


def operation_rows(work: Workload, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Return the operations of a training step, those of all blocks together, longest first."""
    groups: dict[tuple[str, str], list[Operation]] = {}
    for operation in step(work, train=True):
        groups.setdefault((operation.name, operation.direction), []).append(operation)
    rows = []
    for (name, direction), group in groups.items():
        cost = total(group)
        by_flops = cost.flops / ceilings.flops > cost.bytes / ceilings.bandwidth
        rows.append(
            {
                "operation": name,
                "direction": direction,
                "calls": len(group),
                "flops": cost.flops,
                "bytes": cost.bytes,
                "seconds": seconds(group, ceilings),
                "limit": "arithmetic" if by_flops else "memory",
            }
        )
    return sorted(rows, key=lambda row: -row["seconds"])


def change(work: Workload, name: str, value: int) -> Workload:
    """Return a workload with another size; `gpus` and `top-k` are no part of it."""
    if name == "tokens":
        require(value > work.vit.prefix, "--values", value, "more than the prefix", "raise it")
        return dataclasses.replace(work, patches=value - work.vit.prefix)
    if name == "depth":
        return dataclasses.replace(work, vit=dataclasses.replace(work.vit, depth=value))
    return dataclasses.replace(work, **{name: value}) if name in ("prompts", "batch") else work
