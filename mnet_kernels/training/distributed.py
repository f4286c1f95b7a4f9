"""The processes that torchrun started, if it did: who am I, and what do all have together."""

from __future__ import annotations

import gc
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mnet_kernels.inputs import InputError
from mnet_kernels.training.batches import deaf_to_workers


@dataclass(frozen=True)
class Group:
    """This process among ``world`` ones; alone by default."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints and saves."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The largest of all processes, in each."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the main one's statistics: each has seen other pictures."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def _reduced(self, values: Tensor, by: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values, by)
        return values


@contextmanager
def group(device: str | None = None) -> Iterator[Group]:
    """Join the processes that torchrun started; without it there is one.

    Args:
        device: "cpu" (they talk through gloo) or "cuda" (through nccl, one GPU a process); None:
            cuda where it is.

    Raises:
        InputError: there is no GPU for this process.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(
                f"device: expected a GPU a process, got {torch.cuda.device_count()} "
                f"and process {local + 1} of this machine"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    else:
        place = torch.device("cpu")
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield Group(device=place)
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
        # A DistributedDataParallel that waits to be collected keeps gloo's threads running; where
        # one of them frees a tensor while the interpreter shuts down, it aborts the process.
        gc.collect()


def lost_process(error: RuntimeError) -> str | None:
    """In words, if ``error`` says that a process this one depends on has gone.

    The frames that the error came through then hold on to no other process any more.
    """
    with deaf_to_workers():
        reason = _lost_process(error)
        through: BaseException | None = error
        while reason is not None and through is not None:
            traceback.clear_frames(through.__traceback__)
            through = through.__cause__ or through.__context__
    return reason


def _lost_process(error: RuntimeError) -> str | None:
    text = str(error)
    # "... in DataLoader worker process 0" is an error that the worker lived to tell of.
    worker = re.search(r"DataLoader worker( \(pid\(?s?\)? [\d, ]+\))?(?! process)", text)
    if worker:
        return f"a {worker[0]} was killed"
    if isinstance(error, dist.DistError) or re.search(r"gloo|nccl|closed by peer", text, re.I):
        return "another process of the run was killed or cannot be reached"
    return None
