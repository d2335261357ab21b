"""Several processes as one: started by torchrun, one process per device, rank 0 alone writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...cli import UsageError, choose_device


@dataclass(frozen=True, slots=True)
class World:
    """This process among all processes of a run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, on all of them; `values` stays."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def agree(self, flag: bool) -> bool:
        """Return the flag of the first process."""
        if self.size == 1:
            return flag
        shared = torch.tensor(flag, dtype=torch.uint8, device=self.device)
        dist.broadcast(shared, 0)
        return bool(shared)

    def broadcast(self, values: Tensor) -> None:
        """Put the values of the first process in place of those of the others."""
        if self.size > 1:
            dist.broadcast(values, 0)

    def share(self, value: object) -> object:
        """Return the object of the first process."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, 0, device=self.device)
        return holder[0]


class Agreement:
    """The largest of a number over all processes, known one call later: nobody waits for it."""

    def __init__(self, world: World) -> None:
        """All processes create it together."""
        self._world = world
        # On the host, beside whatever the devices are doing.
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._asked: tuple[Tensor, Any] | None = None

    def ask(self, number: int) -> int:
        """Return the largest number of the call before; of one process this one.

        Args:
            number: of this process. All processes call equally often.
        """
        if self._world.size == 1:
            return number
        before = self.close()
        if before:
            return before
        shared = torch.tensor([number])
        work = dist.all_reduce(shared, dist.ReduceOp.MAX, self._group, async_op=True)
        self._asked = shared, work
        return before

    def close(self) -> int:
        """Wait for what was asked last and return the answer, 0 for none."""
        if self._asked is None:
            return 0
        shared, work = self._asked
        self._asked = None
        work.wait()
        return int(shared)


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the other processes, if torchrun started any, and leave them at the end.

    Args:
        device: the option `--device`.

    Raises:
        UsageError: there is no such device, or fewer GPUs than processes on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        chosen = choose_device(device)
        if chosen.index is not None and chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        yield World(chosen)
        return
    rank, chosen = int(os.environ["RANK"]), _local_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    bound = chosen if chosen.type == "cuda" else None
    dist.init_process_group(backend, rank=rank, world_size=size, device_id=bound)
    try:
        yield World(chosen, rank, size)
    finally:
        dist.destroy_process_group()


def _local_device(device: str) -> torch.device:
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return chosen
    if chosen.index is not None:
        raise UsageError(
            f"--device: got {device} under torchrun, expected auto, cpu or cuda; every process "
            "takes the GPU of its local rank"
        )
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise UsageError(
            f"--nproc-per-node: got more than {local} processes, expected at most {count}, the "
            "GPUs of this machine; start fewer"
        )
    return torch.device("cuda", local)
