"""Where a tensor's memory format may be changed without anybody noticing.

Dense convolutions are fastest on the CPU in channels_last, and what follows them keeps the format.
Values are the same either way, but ``.view`` of a channels_last map raises, and so does much that
users do with a returned one. A format is free only where every use, and every use of what is
computed from it, takes any format, up to a point where format no longer exists.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from mnet_kernels.nn import SamePad2d
from mnet_kernels.swap.probe import activation_of
from mnet_kernels.swap.tracing import Call

#: The result has its input's format; nothing else depends on the format. (So it is with our own
#: activations, which are recognised by running them.)
_KEEPS_FORWARDS = {
    cls.forward
    for cls in (
        nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
        nn.Dropout, nn.Dropout2d, nn.ConstantPad2d, nn.Identity, nn.Sigmoid, nn.Hardsigmoid,
        nn.GELU, nn.ELU, nn.Tanh, SamePad2d,
    )
}  # fmt: skip
_KEEPS_FUNCTIONS = {
    operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.truediv,
    torch.add, torch.mul, torch.cat, torch.sigmoid, torch.clamp,
    operator.getitem, torch.chunk, torch.split,
    F.hardtanh, F.sigmoid, F.gelu, F.dropout, F.dropout2d, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.pad,
}  # fmt: skip
_KEEPS_METHODS = {
    "add", "add_", "mul", "mul_", "sigmoid", "sigmoid_", "clamp", "clamp_", "chunk", "split",
}  # fmt: skip


def free_nodes(
    graph: fx.Graph, modules: dict[str, nn.Module], keeps_format: Callable[[nn.Module], bool]
) -> set[fx.Node]:
    """Nodes whose results may come in any memory format.

    Args:
        graph: a whole forward; what it returns is used in ways unknown.
        modules: by path.
        keeps_format: of the leaf modules, the norms, activations and convolutions of other classes.
    """
    free: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if all(
            _ends(user, modules) or (user in free and _keeps(user, modules, keeps_format))
            for user in node.users
        ):
            free.add(node)
    return free


def _keeps(
    node: fx.Node, modules: dict[str, nn.Module], keeps_format: Callable[[nn.Module], bool]
) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return _forward(module) in _KEEPS_FORWARDS or keeps_format(module)
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        known = node.target in _KEEPS_FUNCTIONS or name == "stochastic_depth"
    else:
        known = node.op == "call_method" and node.target in _KEEPS_METHODS
    call = Call.of(node)
    return known or (call is not None and activation_of(call) is not None)


def _ends(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the result has no map any more: 1x1 or flat (or is no tensor at all)."""
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        if _forward(module) is nn.Flatten.forward:
            return (module.start_dim, module.end_dim) == (1, -1)
        pools = (nn.AdaptiveAvgPool2d.forward, nn.AdaptiveMaxPool2d.forward)
        return _forward(module) in pools and module.output_size in (1, (1, 1))
    if node.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
        return _arguments(node, "output_size")["output_size"] in (1, (1, 1), [1, 1])
    if node.target in (torch.flatten, "flatten"):
        defaults = {"start_dim": 0, "end_dim": -1}
        given = {**defaults, **_arguments(node, "start_dim", "end_dim")}
        return given == {"start_dim": 1, "end_dim": -1}
    if node.target in ("mean", torch.mean):
        axes = _arguments(node, "dim", "keepdim").get("dim")
        return isinstance(axes, list | tuple) and set(axes) in ({2, 3}, {-1, -2})
    if node.target == "size":
        return True
    return node.target is getattr and node.args[1] in ("shape", "dtype", "device")


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments after the first, by name."""
    return {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}


def _forward(module: nn.Module) -> Any:
    """What a module runs: its class's forward, unless it was replaced."""
    return module.__dict__.get("forward", type(module).forward)
