"""Which pictures come when, and to which process: decided by seed and epoch alone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mnet_kernels.inputs import InputError

#: What random numbers are for.
ORDER, AUGMENTATION, DROPOUT = 0, 1, 2


def random_generator(seed: int, epoch: int, purpose: int, rank: int = 0) -> torch.Generator:
    """Random numbers that depend on these arguments, below 2**32 each, and nothing else."""
    state = np.random.SeedSequence((seed, epoch, purpose, rank)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class Shuffled(Sampler[list[int]]):
    """Batches in an order that only seed and epoch decide; ``rank`` gets its part of each.

    Of ``world`` processes each takes every ``world``-th picture of a batch, so that together they
    see the batches that one process would. An incomplete last batch is left out: what is left over
    differs from epoch to epoch.
    """

    def __init__(self, count: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        self.count, self.batch, self.seed, self.rank, self.world = count, batch, seed, rank, world
        self.epoch = 0

    def __len__(self) -> int:
        return self.count // self.batch

    def indices(self) -> Tensor:
        """This epoch's, ``(len(self), batch / world)``."""
        order = torch.randperm(self.count, generator=random_generator(self.seed, self.epoch, ORDER))
        return order[: len(self) * self.batch].view(-1, self.batch)[:, self.rank :: self.world]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.indices().tolist())


def shard(count: int, batch: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Batches of every ``world``-th index from ``rank`` on: each index is somebody's, and once."""
    mine = range(rank, count, world)
    return [list(mine[i : i + batch]) for i in range(0, len(mine), batch)]


def loader(
    dataset: Dataset[Any], batches: Iterable[list[int]], workers: int = 0, pin: bool = False
) -> DataLoader[Any]:
    """A DataLoader over given batches; ``workers`` processes read them ahead."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else it draws from the one that dropout uses
    )


def read(batches: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches; an unreadable picture is one line also where a worker found it.

    Raises:
        InputError: a picture cannot be read.
        RuntimeError: a worker was killed; torch raises it wherever Python is when it hears of that.
    """
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:  # killed while it handed a batch over
        raise RuntimeError("a DataLoader worker was killed") from error
    except InputError as error:  # a worker sends its traceback along
        last = str(error).strip().splitlines()[-1]
        raise InputError(last.removeprefix(f"{InputError.__module__}.InputError: ")) from None


@contextmanager
def deaf_to_workers() -> Iterator[None]:
    """In here torch does not raise when it hears that a worker was killed."""
    if threading.current_thread() is not threading.main_thread():  # signals are for that one
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
