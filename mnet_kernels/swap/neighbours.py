"""One traced forward: what every convolution in it can take over, and why no more.

Zero padding before a convolution, and the norm and the activation after it, become its own where
nobody else sees what passes between them. A convolution may be called several times (weights shared
between heads, say); then this must be so, with the same neighbours, at every one of its calls.

What a neighbour did must not be done again. A module that is called nowhere else is *absorbed*: its
forward hands its input on. A function, or a module that is also called elsewhere, is *removed*: the
call is taken out of the forward that makes it (tracing.py, Shortened).
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from mnet_kernels.nn import SamePad2d, is_depthwise
from mnet_kernels.reference import IDENTITY
from mnet_kernels.swap.layout import free_nodes
from mnet_kernels.swap.module_facts import ModuleFacts
from mnet_kernels.swap.plan import Left, Plan, Site, describe
from mnet_kernels.swap.probe import (
    activation_of,
    is_norm_like,
)
from mnet_kernels.swap.tracing import Call, callers, constants_only


@dataclass(frozen=True)
class _Step:
    """One neighbour of a convolution that it takes over."""

    kind: str  # "pad", "norm", "act", or "skip" for what does nothing anyway
    #: Of a module that is absorbed, its path; of a call that is removed, the path of the module
    #: whose forward makes it, and its position there.
    key: str | tuple[str, int]
    does: Any = None  # the padding, Norm or Activation
    act: str | Call | None = None  # of "act": the module's path or the function


class TracedForward:
    """One traced forward: for every convolution the steps it takes over, and why no more."""

    def __init__(self, root: nn.Module, graph: fx.Graph, facts: ModuleFacts) -> None:
        self.facts = facts
        self.modules = dict(root.named_modules())
        #: All calls of a module, by its path.
        self.calls: dict[str, list[fx.Node]] = collections.defaultdict(list)
        #: By the path of a module and what it calls: all such calls.
        self.alike: dict[tuple[str, Any], list[fx.Node]] = collections.defaultdict(list)
        #: How often a call is made that could be removed, by _Step.key.
        self.uses: dict[tuple[str, int], int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls[str(node.target)].append(node)
            self.alike[_owner(node), _kind(node, self.modules)].append(node)
        self.free = free_nodes(graph, self.modules, facts.keeps_format)

    def plan(self) -> Plan:
        """A site, or the reason why it is left, for every convolution."""
        plan = Plan()
        for path, conv in self.modules.items():
            if isinstance(conv, _ConvNd):
                found = self._site(path, conv)
                if isinstance(found, Site):
                    plan.sites.append(found)
                else:
                    plan.left.append(Left(path, describe(conv), found))
        return plan

    def _site(self, path: str, conv: nn.Module) -> Site | str:
        nodes = self.calls.get(path)
        if not nodes:
            return "not called in eval mode"
        why = self.facts.why_not_plain(conv)
        if why is not None:
            return why
        if any(len(node.args) != 1 or node.kwargs for node in nodes):
            return "called with more than one argument"
        before, _ = self._common([self._before(node, len(nodes)) for node in nodes])
        after, note = self._common([self._after(node, len(nodes)) for node in nodes])
        steps = {step.kind: step for step in (*before, *after) if step.kind != "skip"}
        pad, norm, act = (steps.get(kind) for kind in ("pad", "norm", "act"))
        own = "same" if self.facts.pads_same(cast(nn.Conv2d, conv)) else (0, 0, 0, 0)
        if norm is None and not is_depthwise(conv):
            return note or "no normalisation follows"
        if norm is not None and not norm.does.keeps_statistics and not is_depthwise(conv):
            return "the norm keeps no running statistics"
        activation = act.does if act else norm.does.activation if norm else IDENTITY
        parts = [describe(conv), "bn" if norm else "", activation.name]
        keys = [step.key for step in steps.values()]
        return Site(
            conv=path,
            pattern=" + ".join(part for part in parts if part not in ("", "identity")),
            pad=pad.does if pad else own,
            norm=str(norm.key) if norm else None,
            batch_statistics=norm is not None and norm.does.batch_statistics,
            native_training=norm.does.native_training if norm is not None else None,
            act=act.act if act else None,
            activation=activation,
            absorbed=tuple(key for key in keys if isinstance(key, str)),
            removed=tuple(key for key in keys if isinstance(key, tuple)),
            free_layout=self.free.issuperset(nodes),
            note="" if activation != IDENTITY else note,
        )

    def _common(self, chains: list[tuple[list[_Step], str]]) -> tuple[list[_Step], str]:
        """The steps beside every call of one convolution, and beside no other call; why no more.

        Args:
            chains: for each of its calls, the steps there and why there are no more.
        """
        steps, note = chains[0]
        for other, _ in chains[1:]:
            same = [a == b for a, b in zip(steps, other, strict=False)]
            if len(other) != len(steps) or not all(same):
                steps = steps[: (*same, False).index(False)]
                note = "its calls are followed by different things"
        for number, step in enumerate(steps):
            uses = len(self.calls[step.key]) if isinstance(step.key, str) else self.uses[step.key]
            if step.kind != "skip" and uses != len(chains):
                return steps[:number], f"{step.kind} {step.key} is also used elsewhere"
        return steps, note

    def _before(self, node: fx.Node, calls: int) -> tuple[list[_Step], str]:
        """The padding before one of a convolution's ``calls``, if there is one."""
        pad = node.args[0]
        if self.facts.pads_same(cast(nn.Conv2d, self.modules[str(node.target)])):
            return [], ""
        if not isinstance(pad, fx.Node) or len(pad.users) != 1 or self._hooks_between(pad, node):
            return [], ""
        edges = self._edges(pad, cast(nn.Conv2d, self.modules[str(node.target)]))
        key = None if edges is None else self._key(pad, calls)
        return ([] if key is None or isinstance(key, _Why) else [_Step("pad", key, edges)]), ""

    def _edges(self, node: fx.Node, conv: nn.Conv2d) -> tuple[int, int, int, int] | str | None:
        """The zeros (top, left, bottom, right) that a node adds before ``conv``, if it does
        nothing else; "same" if they are those of TensorFlow's "same" padding."""
        if node.op == "call_module":
            module: Any = self.modules[str(node.target)]
            if type(module) is SamePad2d and not self.facts.altered(module):
                kernel, stride = (module.kernel_size,) * 2, (module.stride,) * 2
                fits = (conv.kernel_size, conv.stride, conv.dilation) == (kernel, stride, (1, 1))
                return "same" if fits and conv.padding in ((0, 0), "valid") else None
            plain = getattr(type(module), "forward", None) is nn.ConstantPad2d.forward
            if not plain or len(node.args) != 1 or node.kwargs or self.facts.altered(module):
                return None
            edges, value = module.padding, module.value
        elif node.op == "call_function" and node.target is F.pad and constants_only(node):
            names = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False))
            names.update(node.kwargs)
            if names.get("mode", "constant") != "constant":
                return None
            edges, value = names["pad"], names.get("value")
        else:
            return None
        plain = len(edges) == 4 and all(isinstance(n, int) and n >= 0 for n in edges)
        if not plain or value not in (None, 0):
            return None
        left, right, top, bottom = edges
        return top, left, bottom, right

    def _after(self, node: fx.Node, calls: int) -> tuple[list[_Step], str]:
        """The steps after one of a convolution's ``calls``, and why there are no more."""
        steps: list[_Step] = []
        while True:
            if len(node.users) != 1:
                whose = f"the result of {steps[-1].key}" if steps else "its result"
                return steps, f"{whose} is used {len(node.users)} times"
            user = next(iter(node.users))
            if user.op == "output" or not constants_only(user):
                return steps, ""
            if self._hooks_between(node, user):
                return steps, "a hook would see what passes between"
            step = None
            if all(step.kind == "skip" for step in steps):
                step = self._norm(user)
            step = step or self._activation(user, calls)
            if not isinstance(step, _Step):
                return steps, step or ""
            steps.append(step)
            if step.kind == "act" or (step.kind == "norm" and step.does.activation != IDENTITY):
                return steps, ""
            node = user

    def _norm(self, node: fx.Node) -> _Step | str | None:
        if node.op != "call_module":
            return None
        path = str(node.target)
        if not is_norm_like(self.modules[path]):
            return None
        found = self.facts.norm(self.modules[path])
        return found if isinstance(found, str) else _Step("norm", path, found)

    def _activation(self, node: fx.Node, calls: int) -> _Step | str | None:
        act: str | Call
        if node.op == "call_module":
            act = str(node.target)
            found = self.facts.activation(self.modules[act])
            if found == IDENTITY:
                return _Step("skip", act)
        elif (call := Call.of(node)) is not None:
            act, found = call, activation_of(call)
        else:
            return None
        if found is None or found == IDENTITY:
            return None
        key = self._key(node, calls)
        if isinstance(key, _Why):
            return f"activation left native: {key.reason}"
        return _Step("act", key, found, act)

    def _key(self, node: fx.Node, calls: int) -> str | tuple[str, int] | _Why:
        """How a call that is made beside each of a convolution's ``calls`` can be taken out: the
        ``key`` of a :class:`_Step`, or why not."""
        if node.op == "call_module" and len(self.calls[str(node.target)]) == calls:
            return str(node.target)
        owner, kind = _owner(node), _kind(node, self.modules)
        module = self.modules[owner]
        own = self.facts.own_nodes(module)
        if isinstance(own, str):
            return _Why(own)
        inner = dict(module.named_modules())
        # Where the owner's own forward makes such calls. In this graph they are repeated as often
        # as that forward ran: the same position again after every len(positions) of them.
        positions = [i for i, n in enumerate(own) if _kind(n, inner) == kind]
        alike = self.alike[owner, kind]
        if not positions or len(alike) % len(positions):
            return _Why("its caller's forward varies from call to call")
        key = owner, positions[alike.index(node) % len(positions)]
        self.uses[key] = len(alike) // len(positions)
        return key

    def _hooks_between(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether a module that holds only one of two calls has hooks: they would see a change."""
        return any(self.modules[p] in self.facts.hooked for p in set(callers(a)) ^ set(callers(b)))


@dataclass(frozen=True)
class _Why:
    """Why a call cannot be taken out."""

    reason: str


def _owner(node: fx.Node) -> str:
    """The path of the module whose forward makes a call."""
    return callers(node)[-1] if callers(node) else ""


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, Any]:
    """What is called: the same for all calls of a function, or of a module."""
    if node.op == "call_module":
        return node.op, id(modules[str(node.target)])
    return node.op, node.target
