"""Finds the convolutions of any model that can take their neighbours' work over.

A model that cannot be traced whole is looked at in parts. Modules whose forward cannot be traced
stay closed, and what they call is looked at by itself.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from mnet_kernels.nn import is_depthwise
from mnet_kernels.swap import tracing
from mnet_kernels.swap.find_runs import find_runs
from mnet_kernels.swap.module_facts import ModuleFacts, take_hooks
from mnet_kernels.swap.neighbours import TracedForward
from mnet_kernels.swap.plan import Left, Plan, Site, describe
from mnet_kernels.swap.source import called_only, is_container
from mnet_kernels.swap.tracing import join


def find(model: nn.Module) -> Plan:
    """All sites of a model, and all other convolutions.

    Args:
        model: a copy that may be traced: its modes are changed, its hooks and what is scripted
            removed.
    """
    for module in list(model.modules()):
        scripted = [n for n, m in module.named_children() if isinstance(m, torch.jit.ScriptModule)]
        for name in () if isinstance(module, torch.jit.ScriptModule) else scripted:
            module._modules[name] = _Scripted()
    # Tracing may run calls that draw numbers; what is tried out is tried out on the CPU.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return _Finder(model).run()


class _Scripted(nn.Module):
    """In the place of a module without Python code."""

    def forward(self, *args: Any) -> Any:
        raise NotImplementedError


@dataclass
class _Part:
    """A module that was looked at by itself: ``members`` are it and what it calls."""

    path: str
    root: nn.Module
    members: set[nn.Module]
    plan: Plan


class _Finder:
    """Goes down the tree to what can be traced, and gathers what is found there."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.facts = ModuleFacts({module for module in model.modules() if take_hooks(module)})

    def run(self) -> Plan:
        plan = Plan()
        parts = list(self._parts(self.model, "", plan))
        seen = collections.Counter(id(m) for part in parts for m in part.members)
        for part in parts:
            paths = {name: join(part.path, name) for name, _ in part.root.named_modules()}
            for site in part.plan.sites:
                used = (site.conv, site.norm, *site.absorbed, *(owner for owner, _ in site.removed))
                if any(seen[id(part.root.get_submodule(p))] > 1 for p in used if p is not None):
                    reason = "shared between parts of the model that were traced apart"
                    plan.left.append(Left(paths[site.conv], site.pattern, reason))
                else:
                    plan.sites.append(_renamed(site, paths))
            plan.left += [replace(row, module=paths[row.module]) for row in part.plan.left]
        order = {path: n for n, (path, _) in enumerate(self.model.named_modules())}
        plan.sites.sort(key=lambda site: order.get(site.conv, 0))
        plan.left.sort(key=lambda row: order.get(row.module, 0))
        plan.runs = find_runs(self.model.eval(), plan.sites, self.facts)
        return plan

    def _parts(self, root: nn.Module, path: str, plan: Plan) -> Iterator[_Part]:
        """The largest traceable modules at and below ``root``."""
        if isinstance(root, _ConvNd):  # called by a forward that was not traced
            yield _Part(path, root, {root}, self._lone(root))
            return
        if not any(isinstance(m, _ConvNd) for m in root.modules()):
            return
        error: Exception | None = None
        for opaque in () if is_container(root) else (False, True):
            try:
                part, closed = self._traced(root, path, opaque)
            except Exception as caught:  # tracing runs the model's own code
                error = error or caught
                continue
            yield part
            for name in closed:
                yield from self._parts(root.get_submodule(name), join(path, name), plan)
            return
        if error is not None:
            reason = f"cannot be traced ({tracing.brief(error)})"
            plan.left.append(Left(path, type(root).__name__, reason))
        below: set[nn.Module] = set()
        for name, module in called_only(root):
            below.update(module.modules())
            yield from self._parts(module, join(path, name), plan)
        reason = "a forward that cannot be traced does more with it than call it"
        for name, module in root.named_modules(prefix=path):
            if isinstance(module, _ConvNd) and module not in below:
                plan.left.append(Left(name, describe(module), reason))

    def _lone(self, conv: nn.Module) -> Plan:
        """A convolution of which only the call is known."""
        reason = self.facts.why_not_plain(conv)
        if reason is None and isinstance(conv, nn.Conv2d) and is_depthwise(conv):
            pad: Any = "same" if self.facts.pads_same(conv) else (0, 0, 0, 0)
            note = "called by a forward not traced"
            return Plan(sites=[Site("", describe(conv), pad=pad, note=note)])
        reason = reason or "called by a forward that cannot be traced"
        return Plan(left=[Left("", describe(conv), reason)])

    def _traced(self, root: nn.Module, path: str, opaque: bool) -> tuple[_Part, list[str]]:
        """What is the same in the graphs of training and of eval mode.

        With ``opaque``, modules inside that cannot be traced by themselves stay closed; their
        paths come second.
        """
        graphs, closed, called = {}, set(), set()
        is_leaf = self.facts.is_leaf_or_opaque if opaque else self.facts.is_leaf
        for module in _innermost_first(root):
            is_leaf(module)  # found out now: while a trace goes on, modules cannot be run
        for training in (True, False):
            root.train(training)
            graphs[training] = tracing.trace(root, is_leaf)
            for node in graphs[training].nodes:
                if node.op == "call_module":
                    module = root.get_submodule(str(node.target))
                    called.add(module)
                    if not self.facts.is_leaf(module):
                        closed.add(str(node.target))
        members = called | _reached(root, {root.get_submodule(name) for name in closed})
        found = {
            mode: TracedForward(root, graph, self.facts).plan() for mode, graph in graphs.items()
        }
        plan = Plan(left=[x for x in found[False].left if root.get_submodule(x.module) in members])
        in_training = {site.conv: site for site in found[True].sites}
        for site in found[False].sites:
            other = in_training.get(site.conv)
            # Only of the whole model is it known that nobody else uses what comes out.
            whole = root is self.model and not self.facts.hooked
            free = whole and other is not None and other.free_layout and site.free_layout
            site = replace(site, free_layout=free)
            if other is not None and replace(other, free_layout=free) == site:
                plan.sites.append(site)
            else:
                reason = "used differently in training and in eval mode"
                plan.left.append(Left(site.conv, site.pattern, reason))
        return _Part(path, root, members, plan), sorted(closed)


def _innermost_first(root: nn.Module) -> Iterator[nn.Module]:
    for child in root.children():
        yield from _innermost_first(child)
    yield root


def _reached(root: nn.Module, closed: set[nn.Module]) -> set[nn.Module]:
    """All modules in the tree but those inside of closed ones."""
    if root in closed:
        return set()
    return {root}.union(*(_reached(child, closed) for child in root.children()))


def _renamed(site: Site, paths: dict[str, str]) -> Site:
    return replace(
        site,
        conv=paths[site.conv],
        norm=None if site.norm is None else paths[site.norm],
        act=paths[site.act] if isinstance(site.act, str) else site.act,
        absorbed=tuple(paths[path] for path in site.absorbed),
        removed=tuple((paths[owner], position) for owner, position in site.removed),
    )
