"""Which fused convolutions follow one another, so that one operator call can do them all.

A run is a stretch of an ``nn.Sequential`` whose graph is nothing but such convolutions, and sums
with what an earlier one of them gave (the residual connections of MobileNetV2).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import fx, nn

from mnet_kernels import tracing
from mnet_kernels.nn import is_depthwise
from mnet_kernels.plan import Run, Site, Stage


def find_runs(
    model: nn.Module, sites: list[Site], is_leaf: Callable[[nn.Module], bool]
) -> dict[str, list[Run]]:
    """The runs of at least two convolutions, by the path of their Sequential.

    Args:
        model: a copy of what ``sites`` was found in, in eval mode.
        sites: what is fused; those that are not called through modules alone are left out.
        is_leaf: which modules a trace does not enter.
    """
    chained = {site.conv: site for site in sites if not site.removed}
    quiet = {path for site in chained.values() for path in site.absorbed}
    finder = _Finder(chained, quiet, is_leaf)
    runs: dict[str, list[Run]] = {}
    taken: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in taken):
            continue
        if type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__:
            found = list(finder.runs(module, path))
            if found:
                runs[path] = found
                names = list(module._modules)
                taken += [
                    _join(path, name) + end
                    for run in found for name in names[run.start : run.stop] for end in (".", "")
                ]  # fmt: skip
    return runs


class _Finder:
    def __init__(
        self, sites: dict[str, Site], quiet: set[str], is_leaf: Callable[[nn.Module], bool]
    ) -> None:
        self.sites = sites
        self.quiet = quiet
        self.is_leaf = is_leaf

    def runs(self, owner: nn.Module, path: str) -> Iterator[Run]:
        start = 0
        stages: list[Stage] = []
        for i, (name, child) in enumerate([*owner._modules.items(), ("", None)]):
            added = None if child is None else self._stages(child, _join(path, name))
            if added is None:
                if len(stages) >= 2 and self._serves(stages, owner, path):
                    yield Run(start, i, tuple(stages))
                start, stages = i + 1, []
            else:
                at = len(stages)
                stages += [
                    Stage(s.conv, None if s.residual is None else s.residual + at) for s in added
                ]

    def _serves(self, stages: list[Stage], owner: nn.Module, path: str) -> bool:
        """Some convolution is dense, and each of those may choose channels_last."""
        prefix = len(path) + 1 if path else 0
        convs = [(s.conv, cast(nn.Conv2d, owner.get_submodule(s.conv[prefix:]))) for s in stages]
        dense = [name for name, conv in convs if conv.groups == 1]
        return bool(dense) and all(self.sites[name].free_layout for name in dense)

    def _stages(self, module: nn.Module, path: str) -> list[Stage] | None:
        """What a module does, if that is nothing but a run of sites; None if it is more."""
        if path in self.sites:
            return [Stage(path)] if _plain(module) else None
        if path in self.quiet or type(module) is nn.Identity:
            return []
        if self.is_leaf(module) or not any(name.startswith(path + ".") for name in self.sites):
            return None
        found = []
        try:
            for training in (True, False):  # evaluation comes last: that mode stays
                module.train(training)
                graph = tracing.trace(module, self.is_leaf)
                found.append(self._read(graph, dict(module.named_modules()), path))
        except Exception:  # tracing runs the model's own code
            return None
        finally:
            module.eval()
        return found[0] if found[0] == found[1] else None

    def _read(
        self, graph: fx.Graph, modules: dict[str, nn.Module], path: str
    ) -> list[Stage] | None:
        values: dict[fx.Node, int] = {}
        stages: list[Stage] = []
        for node in graph.nodes:
            inputs = [values.get(n) for n in node.all_input_nodes]
            if None in inputs or (node.op != "placeholder" and not inputs):
                return None
            latest = len(stages)
            if node.op == "placeholder":
                if values:
                    return None
                values[node] = 0
            elif node.op == "output":
                return (
                    stages
                    if node.args == (node.all_input_nodes[0],) and inputs == [latest]
                    else None
                )
            elif node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
                name = _join(path, str(node.target))
                if inputs != [latest]:
                    return None
                if name in self.sites and _plain(modules[str(node.target)]):
                    stages.append(Stage(name))
                    values[node] = latest + 1
                elif name in self.quiet or type(modules[str(node.target)]) is nn.Identity:
                    values[node] = latest
                else:
                    return None
            elif node.target in (operator.add, operator.iadd, torch.add) and len(node.args) == 2:
                conv = modules.get(stages[-1].conv.removeprefix(path + ".")) if stages else None
                if (
                    len(inputs) != 2 or latest not in inputs or node.kwargs
                    or not isinstance(conv, nn.Conv2d) or conv.groups != 1
                    or stages[-1].residual is not None
                    # Nobody else may have seen the sum's first part.
                    or any(v == latest and len(n.users) > 1 for n, v in values.items())
                ):  # fmt: skip
                    return None
                stages[-1] = Stage(stages[-1].conv, min(cast(list[int], inputs)))
                values[node] = latest
            else:
                return None
        return None


def _plain(conv: nn.Module) -> bool:
    return cast(nn.Conv2d, conv).groups == 1 or is_depthwise(conv)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
