"""What was found in a model, and is to be done to it: plain descriptions.

Modules are named by paths: a plan is made of one copy of a model and carried out on another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from mnet_kernels.nn import is_depthwise
from mnet_kernels.reference import IDENTITY, Activation
from mnet_kernels.runs.stages import Run
from mnet_kernels.swap.tracing import Call


@dataclass(frozen=True)
class Site:
    """One convolution and what it takes over. Modules are named by their paths."""

    conv: str
    pattern: str
    #: Zeros added before the convolution's own padding: (top, left, bottom, right), or "same" in
    #: TensorFlow's sense.
    pad: tuple[int, int, int, int] | str = (0, 0, 0, 0)
    norm: str | None = None
    batch_statistics: bool = False
    #: Why the batch's statistics are left to the norm itself, if they are.
    native_training: str | None = None
    #: The activation's module or function; None also where it is inside the norm.
    act: str | Call | None = None
    activation: Activation = IDENTITY
    #: Modules that have nothing left to do: their forwards will hand their input on.
    absorbed: tuple[str, ...] = ()
    #: Calls that have nothing left to do, and will be taken out: the module whose forward makes it,
    #: and its position among that forward's nodes (tracing.py, own_nodes).
    removed: tuple[tuple[str, int], ...] = ()
    #: Whether the result may come in any memory format: nobody can tell (layout.py).
    free_layout: bool = False
    #: What was left out, and why.
    note: str = ""


@dataclass(frozen=True)
class Left:
    """A module left as it is."""

    module: str
    pattern: str
    reason: str


@dataclass
class Plan:
    """All that was found in a model."""

    sites: list[Site] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    #: By the path of their module.
    runs: dict[str, list[Run]] = field(default_factory=dict)


def describe(conv: nn.Module) -> str:
    """What kind of convolution it is, for instance "conv_dw 3x3 s2" (stride 2)."""
    if not isinstance(conv, nn.Conv2d):
        return type(conv).__name__
    kind = "conv"
    if is_depthwise(conv):
        kind = "conv_dw"
    elif conv.groups > 1:
        kind = f"conv_g{conv.groups}"
    elif conv.kernel_size == (1, 1):
        kind = "conv_pw"
    stride = "" if max(conv.stride) == 1 else f" s{_numbers(conv.stride)}"
    dilation = "" if max(conv.dilation) == 1 else f" d{_numbers(conv.dilation)}"
    return f"{kind} {conv.kernel_size[0]}x{conv.kernel_size[1]}{stride}{dilation}"


def _numbers(pair: tuple[int, ...]) -> str:
    return str(pair[0]) if len(set(pair)) == 1 else "x".join(map(str, pair))
