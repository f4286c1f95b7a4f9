"""What single modules of a model are: norm, activation, plain convolution, leaf of a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from mnet_kernels.nn import FusedConv2d, SamePad2d
from mnet_kernels.reference import Activation
from mnet_kernels.swap import tracing
from mnet_kernels.swap.probe import (
    Norm,
    is_norm_like,
    module_activation,
    module_is_sigmoid,
    norm_of,
    pads_same,
    rests_in_eval,
)

#: What a subclass of Conv2d must not have of its own to do what Conv2d does.
_BEHAVIOUR = {"forward", "_conv_forward", "__call__", "__getattr__", "weight", "bias"}


_Asked = TypeVar("_Asked", bound=nn.Module)
_Answer = TypeVar("_Answer")


def _once(
    find_out: Callable[[ModuleFacts, _Asked], _Answer],
) -> Callable[[ModuleFacts, _Asked], _Answer]:
    """A method that is run once a module; its answer is kept."""

    @functools.wraps(find_out)
    def answer(self: ModuleFacts, module: _Asked) -> _Answer:
        key = find_out.__name__, module
        if key not in self._answers:
            self._answers[key] = find_out(self, module)
        return self._answers[key]

    return answer


class ModuleFacts:
    """Answers about single modules, each found out once; probe.py runs a module where it must.

    Args:
        hooked: the modules that had hooks, which were removed for the traces.
    """

    def __init__(self, hooked: set[nn.Module]) -> None:
        self.hooked = hooked
        self._answers: dict[tuple[str, nn.Module], Any] = {}

    def altered(self, module: nn.Module) -> str | None:
        """Why a module does not do what its class says, or None."""
        if not self.hooked.isdisjoint(module.modules()):
            return f"{type(module).__name__} has hooks"
        if "forward" in module.__dict__:
            return f"the forward of {type(module).__name__} was replaced on the instance"
        return None

    def why_not_plain(self, conv: nn.Module) -> str | None:
        """Why a convolution cannot be exchanged at all, or None."""
        if not isinstance(conv, nn.Conv2d):
            return f"a {type(conv).__name__}: only Conv2d is fused"
        if isinstance(conv, FusedConv2d):
            return "fused already"
        for cls in self._classes(conv):
            if _BEHAVIOUR & set(vars(cls)) and not self.pads_same(conv):
                return f"its class {cls.__name__} changes what Conv2d does"
        if conv.padding_mode != "zeros":
            return f"padding_mode is {conv.padding_mode!r}"
        return self.altered(conv)

    @_once
    def pads_same(self, conv: nn.Conv2d) -> bool:
        """Whether a class of its own adds TensorFlow's "same" padding, and changes nothing else."""
        changed = {name for cls in self._classes(conv) for name in _BEHAVIOUR & set(vars(cls))}
        return changed == {"forward"} and pads_same(conv)

    @staticmethod
    def _classes(conv: nn.Conv2d) -> tuple[type, ...]:
        """Those between a convolution and Conv2d."""
        return type(conv).__mro__[: type(conv).__mro__.index(nn.Conv2d)]

    @_once
    def norm(self, module: nn.Module) -> Norm | str:
        """What a norm-like module computes, or why it cannot be fused."""
        return self.altered(module) or norm_of(module)

    @_once
    def activation(self, module: nn.Module) -> Activation | None:
        """Which of our activations it is, if it is one."""
        return None if self.altered(module) is not None else module_activation(module)

    def sigmoid(self, module: nn.Module) -> bool:
        """Whether it is the sigmoid, which gates end in."""
        return self.altered(module) is None and module_is_sigmoid(module)

    @_once
    def rests(self, module: nn.Module) -> bool:
        """Whether it hands its input on in eval mode (dropout, stochastic depth)."""
        return self.altered(module) is None and rests_in_eval(module)

    def keeps_format(self, module: nn.Module) -> bool:
        """Whether it takes any memory format and keeps it, as norms, activations and the like do,
        and convolutions that pad."""
        if isinstance(module, nn.Conv2d):
            return self.pads_same(module)
        if is_norm_like(module):
            return isinstance(self.norm(module), Norm)
        return self.activation(module) is not None or self.rests(module)

    @_once
    def own_nodes(self, module: nn.Module) -> list[fx.Node] | str:
        """See tracing.py."""
        return tracing.own_nodes(module)

    @_once
    def is_leaf(self, module: nn.Module) -> bool:
        """Whether a trace goes no further than the call of this module: it is one of torch's own,
        one that may be taken over, or one without anything to fuse that cannot be traced."""
        inner = list(module.modules())
        if type(module).__module__.startswith("torch.nn") and len(inner) == 1:
            return True
        if isinstance(module, _ConvNd | SamePad2d) or is_norm_like(module):
            return True
        if self.activation(module) or self.rests(module):
            return True
        if any(isinstance(m, _ConvNd) or is_norm_like(m) for m in inner):
            return False
        return not _is_traceable(module, self.is_leaf)

    @_once
    def is_leaf_or_opaque(self, module: nn.Module) -> bool:
        """Whether it is a leaf, or cannot be traced though there is something to fuse inside."""
        return self.is_leaf(module) or not _is_traceable(module, self.is_leaf_or_opaque)


def _is_traceable(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> bool:
    try:
        tracing.trace(module, is_leaf)
    except Exception:  # tracing runs the model's own code
        return False
    return True


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def take_hooks(module: nn.Module) -> bool:
    """Remove a module's hooks, which must not see a trace; whether there were any."""
    held = [hooks for name in _HOOKS if (hooks := getattr(module, name))]
    for hooks in held:
        hooks.clear()
    return bool(held)
