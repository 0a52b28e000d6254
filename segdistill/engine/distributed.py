"""Processes of one run: decided by the environment that torchrun sets, and one process without it."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from segdistill.engine.device import require_gpus, usable_gpus


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 speaks and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """The element-wise maximum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.maximum(torch.tensor(float(here), device=self.device)).item())

    def gather(self, value: Tensor) -> list[Tensor]:
        """Everybody's value, in the order of ranks, on the CPU."""
        if self.world_size == 1:
            return [value.cpu()]
        mine = value.to(self.device)
        values = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(values, mine)
        return [one.cpu() for one in values]

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Joins the process group of torchrun's environment (NCCL on GPUs, gloo on CPUs), or stands alone.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".

    Raises:
        UserError: there are fewer GPUs than processes of this machine that are to use one.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    use_cuda = device == "cuda" or (device == "auto" and usable_gpus() > 0)
    if use_cuda:
        needed = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        who = "needs 1 GPU" if needed == 1 else f"the processes of this machine need {needed} GPUs"
        require_gpus(needed, f"--device {device}: {who}")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Processes(0, 1, chosen)
        return
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=datetime.timedelta(minutes=30))
    try:
        yield Processes(rank, world_size, chosen)
    finally:
        dist.destroy_process_group()
