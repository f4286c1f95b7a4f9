"""What a run consists of: plain descriptions, modules named by their paths."""

from __future__ import annotations

from dataclasses import dataclass

from mnet_kernels.reference import IDENTITY, Activation


@dataclass(frozen=True)
class Stage:
    """One step of a run. Value 0 is the run's input, value i + 1 the result of step i; every step
    reads the value before it, and some another one."""

    #: "conv": a convolution (or Linear); "pool": the mean over H and W; "sigmoid": that of every
    #: value; "scale": ``other`` times the value before, one factor a channel.
    kind: str
    #: The convolution: a site, or a plain 1x1 or Linear with ``activation`` after it.
    module: str | None = None
    #: The other value: of "conv" what is added to its result, of "scale" what is scaled.
    other: int | None = None
    activation: Activation = IDENTITY


@dataclass(frozen=True)
class Run:
    """Children ``[start, stop)`` of an ``nn.Sequential`` that do nothing but ``stages``; any other
    module's are all, and its forward does nothing else."""

    start: int
    stop: int
    stages: tuple[Stage, ...]
    #: Modules that do nothing in eval mode, but something in training mode.
    inert: tuple[str, ...] = ()
    #: Whether the input, and whether the result, is (N, C) instead of (N, C, H, W).
    flat_input: bool = False
    flat_output: bool = False
