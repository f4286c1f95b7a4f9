"""What a forward that cannot be traced does with its children, as its source shows."""

from __future__ import annotations

import ast
import inspect
import textwrap

from torch import nn


def is_container(module: nn.Module) -> bool:
    """It has no forward of its own (ModuleList, ModuleDict): others call what it holds."""
    return type(module).forward is nn.Module.forward


def called_only(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``module`` uses in no other way than by calling it: paths and modules.

    Read from the source of its class. ``self.child(...)`` calls a child; a loop over it, or
    indexing, calls what it holds. Anything else (a tap on an inner layer, getattr, iteration
    over all children) shows nothing.
    """
    children = dict(module.named_children())
    if is_container(module) or type(module).forward is nn.Sequential.forward:
        return list(children.items())
    if "forward" in module.__dict__:
        return []
    try:
        functions = _methods(type(module))
    except (OSError, TypeError, SyntaxError):  # no source
        return []
    itemwise: set[str] = set()
    for function in functions:
        parents = {c: node for node in ast.walk(function) for c in ast.iter_child_nodes(node)}
        for node in ast.walk(function):
            if not (isinstance(node, ast.Name) and node.id == "self"):
                continue
            use = parents[node]
            if not isinstance(use, ast.Attribute) or use.attr in _REACHING:
                return []
            call = parents[use]
            if use.attr not in children or (isinstance(call, ast.Call) and call.func is use):
                continue
            if _items_called(use, parents, function):
                itemwise.add(use.attr)
            else:
                del children[use.attr]
    return [
        (f"{name}.{inner}" if inner else name, m)
        for name, child in children.items()
        for inner, m in (child.named_children() if name in itemwise else [("", child)])
    ]


#: Uses of ``self`` that lead to any child.
_REACHING = {
    "children", "named_children", "modules", "named_modules", "get_submodule", "_modules",
    "__dict__",
}  # fmt: skip


def _methods(cls: type) -> list[ast.FunctionDef]:
    """The source of ``forward`` and of all methods that it may come to call."""
    defined: dict[str, list[ast.FunctionDef]] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.FunctionDef):
                defined.setdefault(node.name, []).append(node)
    names, found = ["forward"], []
    for name in names:
        for function in defined.pop(name, []):
            found.append(function)
            names += [n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)]
    return found


def _items_called(
    node: ast.AST, parents: dict[ast.AST, ast.AST], function: ast.FunctionDef
) -> bool:
    """Whether all that is done with an expression is to call its items, indexed or in a loop."""
    use = parents[node]
    if isinstance(use, ast.Subscript) and use.value is node:
        node, use = use, parents[use]
        if isinstance(use, ast.Call) and use.func is node:
            return True
    if isinstance(use, ast.Call) and isinstance(use.func, ast.Name) and use.func.id == "enumerate":
        node, use = use, parents[use]
    if not isinstance(use, ast.For | ast.comprehension) or use.iter is not node:
        return False
    target = use.target.elts[-1] if isinstance(use.target, ast.Tuple) else use.target
    if not isinstance(target, ast.Name):
        return False
    uses = [
        n
        for n in ast.walk(function)
        if isinstance(n, ast.Name) and n.id == target.id and isinstance(n.ctx, ast.Load)
    ]
    return all(isinstance(call := parents[n], ast.Call) and call.func is n for n in uses)
