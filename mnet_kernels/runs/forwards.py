"""Forwards that are put in the place of a module's own: runs in one call, the rest as ever."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from mnet_kernels.runs.runner import Runner
from mnet_kernels.runs.stages import Run


class Sequenced:
    """The forward of a Sequential with runs in it."""

    def __init__(self, owner: nn.Sequential, runs: list[Run], fast: nn.Module) -> None:
        self.owner = owner
        self.runs = [(run.start, run.stop, Runner(owner, run, fast)) for run in runs]

    def __call__(self, x: Any) -> Any:
        children = list(self.owner._modules.values())
        done = 0
        for start, stop, runner in self.runs:
            for child in children[done:start]:
                x = cast(nn.Module, child)(x)
            done = start
            y = runner(x)
            if y is not None:
                x, done = y, stop
        for child in children[done:]:
            x = cast(nn.Module, child)(x)
        return x

    __code__ = __call__.__code__  # torch.export asks a forward where it was written


class Whole:
    """The forward of a module, no Sequential, that is one run."""

    def __init__(self, owner: nn.Module, runs: list[Run], fast: nn.Module) -> None:
        self.owner = owner
        (run,) = runs
        self.runs = [(run.start, run.stop, Runner(owner, run, fast))]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            y = self.runs[0][2](args[0])
            if y is not None:
                return y
        return type(self.owner).forward(self.owner, *args, **kwargs)

    __code__ = __call__.__code__


def sequenced(owner: nn.Module, runs: list[Run], fast: nn.Module) -> Sequenced | Whole:
    """The forward of a module with runs."""
    if type(owner).forward is nn.Sequential.forward:
        return Sequenced(cast(nn.Sequential, owner), runs, fast)
    return Whole(owner, runs, fast)
