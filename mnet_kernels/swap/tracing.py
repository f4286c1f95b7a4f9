"""Graphs of a model's forward: how they are recorded, and how calls are taken out of one.

A graph shows every use of every value, which is what makes an exchange safe. Where a module
cannot be traced, its children still can, provided that its source shows it does nothing with them
but call them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, fx, nn

#: In a node's ``meta``: the paths of the modules inside whose forward it was made, outermost
#: first. A module's call ends with that module itself.
CALLERS = "callers"


class _Tracer(fx.Tracer):
    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._is_leaf = is_leaf
        self._callers: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self._callers.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._callers.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[CALLERS] = tuple(self._callers)
        return node


def trace(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> fx.Graph:
    """The graph of ``type(module).forward``, its optional arguments left at their defaults.

    Raises:
        Exception: whatever tracing raises.
    """
    if "forward" in module.__dict__:
        raise TypeError("its forward was replaced on the instance")
    return _Tracer(is_leaf).trace(module, concrete_args=_defaults(module) or None)


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@dataclass(frozen=True)
class Call:
    """A function or tensor method with its constant arguments, as a function of one tensor."""

    target: Any  # a function, or a method's name
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(hash=False)

    def __call__(self, x: Tensor) -> Tensor:
        function = getattr(type(x), self.target) if isinstance(self.target, str) else self.target
        return function(x, *self.args, **self.kwargs)

    @classmethod
    def of(cls, node: fx.Node) -> Call | None:
        """What a node calls, if it is a function or method of torch's, on one computed tensor."""
        of_torch = node.op == "call_function" and is_of_torch(node.target)
        if not (of_torch or node.op == "call_method") or not constants_only(node):
            return None
        return cls(node.target, tuple(node.args[1:]), dict(node.kwargs))


# --- taking calls out of a module's own forward ---------------------------------------------


def own_nodes(module: nn.Module) -> list[fx.Node] | str:
    """The nodes of a module's own forward, children as leaves; or why they are not to be had.

    The list must not depend on anything that may differ at a later call.
    """
    if _defaults(module):
        return "its caller's forward has optional arguments"
    was_training = module.training
    graphs = []
    try:
        for training in (True, False):
            module.training = training
            graphs.append(trace(module, is_leaf=lambda _: True))
    except Exception as error:
        return f"its caller's forward cannot be traced ({brief(error)})"
    finally:
        module.training = was_training
    if any(n.op == "get_attr" and "_tensor_constant" in str(n.target) for n in graphs[0].nodes):
        return "its caller's forward makes tensors"
    shown = [
        [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in graph.nodes] for graph in graphs
    ]
    if shown[0] != shown[1]:
        return "its caller's forward differs between training and eval"
    return list(graphs[0].nodes)


class Shortened:
    """The forward of ``owner`` without the calls at some positions of its :func:`own_nodes`.

    Each call taken out is replaced by its first argument. Children are looked up in ``owner`` as
    ever. The function is generated from the owner's graph, and again after unpickling.
    """

    def __init__(self, owner: nn.Module, positions: frozenset[int]) -> None:
        self.owner = owner
        self.positions = positions
        self._function = self._generate()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._function is None:
            self._function = self._generate()
        return self._function(self.owner, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}

    def _generate(self) -> Callable[..., Any]:
        replaced = self.owner.__dict__.pop("forward", None)  # this object, once it is in place
        try:
            nodes = own_nodes(self.owner)
        finally:
            if replaced is not None:
                self.owner.__dict__["forward"] = replaced
        if isinstance(nodes, str):
            raise RuntimeError(f"swap: {type(self.owner).__name__} changed since: {nodes}")
        graph = nodes[0].graph
        for position in self.positions:
            node = nodes[position]
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            graph.erase_node(node)
        code = graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, f"<shortened {type(self.owner).__name__}>", "exec"), namespace)
        return namespace["forward"]


def join(*path: str) -> str:
    """The path of a module from its parts, of which some may be empty."""
    return ".".join(part for part in path if part)


def brief(error: Exception) -> str:
    """An exception in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


def callers(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules whose forward made this node, without the module a node calls."""
    stack = node.meta[CALLERS]
    return stack[:-1] if node.op == "call_module" else stack


def constants_only(node: fx.Node) -> bool:
    """The first argument is the only one that is computed."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    return node.all_input_nodes == [node.args[0]] and node.args.count(node.args[0]) == 1


def is_of_torch(function: Any) -> bool:
    """A function of torch's own: it may be run to see what it does."""
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.split(".")[0] in ("torch", "_operator", "builtins")
