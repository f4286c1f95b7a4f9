"""What follows one another in a model so that one operator call can do it all.

A run is a module, or a stretch of an ``nn.Sequential``, whose graph is nothing but fused
convolutions, sums with what an earlier one of them gave (the residual connections of MobileNetV2),
squeeze-and-excitation, global means, and the 1x1 convolutions or Linears of a head.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from mnet_kernels.nn import is_depthwise
from mnet_kernels.reference import IDENTITY, Activation
from mnet_kernels.runs.stages import Run, Stage
from mnet_kernels.swap import tracing
from mnet_kernels.swap.module_facts import ModuleFacts
from mnet_kernels.swap.plan import Site
from mnet_kernels.swap.probe import activation_of, is_sigmoid
from mnet_kernels.swap.run_draft import Draft
from mnet_kernels.swap.tracing import Call, join


def find_runs(model: nn.Module, sites: list[Site], facts: ModuleFacts) -> dict[str, list[Run]]:
    """The runs of at least two convolutions (of one Linear), by the path of their module.

    Args:
        model: a copy of what ``sites`` was found in, in eval mode.
        sites: what is fused; those that are not called through modules alone are left out.
        facts: what single modules are.
    """
    chained = {site.conv: site for site in sites if not site.removed}
    quiet = {path for site in chained.values() for path in site.absorbed}
    finder = _Finder(chained, quiet, facts)
    runs: dict[str, list[Run]] = {}
    taken: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in taken) or "forward" in module.__dict__:
            continue
        sequential = type(module).forward is nn.Sequential.forward
        found = list(finder.runs(module, path) if sequential else finder.whole(module, path))
        if not found:
            continue
        runs[path] = found
        names = list(module._modules)
        taken += [
            join(path, name) + end
            for run in found for name in names[run.start : run.stop] for end in (".", "")
        ]  # fmt: skip
    # Heads of networks without a run of convolutions are none of our business.
    every = [run for found in runs.values() for run in found]
    return runs if any(stage.module in chained for run in every for stage in run.stages) else {}


class _Finder:
    """What every module adds to a run.

    Args:
        sites: the fused convolutions, by path.
        quiet: paths of the modules that they took over.
        facts: what single modules are.
    """

    def __init__(self, sites: dict[str, Site], quiet: set[str], facts: ModuleFacts) -> None:
        self.sites = sites
        self.quiet = quiet
        self.facts = facts

    def runs(self, owner: nn.Module, path: str) -> Iterator[Run]:
        """The runs in ``owner``, a Sequential: each as many of its children as will go in one."""
        start, draft = 0, Draft()
        for i, (name, child) in enumerate(owner._modules.items()):
            longer = self._extended(draft, child, join(path, name))
            if longer is None and draft.stages:  # a run ends here, and perhaps the next begins
                yield from self._finished(draft, start, i, owner, path)
                start, longer = i, self._extended(Draft(), child, join(path, name))
            if longer is None:
                start, longer = i + 1, Draft()
            draft = longer
        yield from self._finished(draft, start, len(owner._modules), owner, path)

    def whole(self, owner: nn.Module, path: str) -> Iterator[Run]:
        """The run that is all that ``owner``, which is no Sequential, does."""
        inner = [name for name in self.sites if name.startswith(path + "." if path else "")]
        if len(inner) < 2 or path in self.sites:
            return
        draft = self._extended(Draft(), owner, path)
        if draft is not None:
            yield from self._finished(draft, 0, len(owner._modules), owner, path)

    def _finished(
        self, draft: Draft, start: int, stop: int, owner: nn.Module, path: str
    ) -> Iterator[Run]:
        """The draft of children ``[start, stop)`` as a run, if it is worth one."""
        prefix = len(path) + 1 if path else 0
        names = [stage.module for stage in draft.stages if stage.module is not None]
        if draft.flat_input:
            serves = bool(names)
        else:
            # At least one site is dense; and all dense ones may give channels_last, as a run does.
            dense = [
                name for name in names
                if name in self.sites
                and cast(nn.Conv2d, owner.get_submodule(name[prefix:])).groups == 1
            ]  # fmt: skip
            serves = (
                len(names) >= 2
                and bool(dense)
                and all(self.sites[name].free_layout for name in dense)
            )
        if serves:
            yield Run(
                start, stop, tuple(draft.stages), tuple(draft.inert), draft.flat_input, draft.flat
            )

    def _extended(self, draft: Draft, module: nn.Module | None, path: str) -> Draft | None:
        """The draft with what a module does; None if that is more than a run can hold."""
        if module is None:
            return None
        longer = draft.copy()
        if self.add_module(longer, module, path):
            return longer
        inner = [m for m in module.modules() if m is not module]
        if self.facts.is_leaf(module) or not inner:
            return None
        found = []
        try:
            for training in (True, False):  # evaluation comes last: that mode stays
                module.train(training)
                graph = tracing.trace(module, self.facts.is_leaf)
                longer = draft.copy()
                read = _Reader(self, longer, dict(module.named_modules()), path).read(graph)
                found.append(longer if read else None)
        except Exception:  # tracing runs the model's own code
            return None
        finally:
            module.eval()
        return found[0] if found[0] == found[1] else None

    def add_module(self, draft: Draft, module: nn.Module, path: str) -> bool:
        """Extends a draft by what a module does to its latest value, if it knows it."""
        one_pixel = draft.latest in draft.pooled
        forward = type(module).forward
        if path in self.sites:
            conv = cast(nn.Conv2d, module)
            if draft.flat or not (conv.groups == 1 or is_depthwise(conv)):
                return False
            unpadded = self.sites[path].pad == (0, 0, 0, 0)
            pooled = one_pixel and unpadded and _is_pointwise(conv)
            keeps = _keeps_size(conv, self.sites[path].pad)
            draft.convolve(path, conv.in_channels, conv.out_channels, pooled, keeps)
            return True
        if path in self.quiet or type(module) is nn.Identity:
            return True
        if self.facts.altered(module) is not None:
            return False
        if self.facts.activation(module) is None and self.facts.rests(module):
            draft.inert.append(path)
            return True
        if isinstance(module, nn.Conv2d):
            plain = self.facts.why_not_plain(module) is None and not self.facts.pads_same(module)
            if draft.flat or not plain or module.groups > 1 or not _is_pointwise(module):
                return False
            draft.convolve(path, module.in_channels, module.out_channels, one_pixel)
            return True
        if forward is nn.Linear.forward:
            return self.add_linear(draft, cast(nn.Linear, module), path)
        if forward is nn.AdaptiveAvgPool2d.forward and not draft.flat:
            if module.output_size not in (1, (1, 1)):
                return False
            draft.pool()
            return True
        if forward is nn.Flatten.forward:
            return self.add_flatten(draft, (module.start_dim, module.end_dim))
        return self.add_activation(draft, self.facts.activation(module)) or (
            self.facts.sigmoid(module) and draft.sigmoid()
        )

    def add_linear(self, draft: Draft, module: nn.Linear, path: str) -> bool:
        """A Linear is a 1x1 convolution of one pixel; a run may begin with one."""
        if draft.latest == 0:
            draft.flat = draft.flat_input = True
            draft.pooled.add(0)
        if not draft.flat or self.facts.altered(module) is not None:
            return False
        draft.convolve(path, module.in_features, module.out_features, True)
        return True

    @staticmethod
    def add_flatten(draft: Draft, dims: tuple[object, object]) -> bool:
        """(N, C, 1, 1) to (N, C) changes no value. ``dims``: the first and the last one."""
        if draft.latest not in draft.pooled or dims not in ((1, -1), (1, 3)):
            return False
        draft.flat = True
        return True

    def add_activation(self, draft: Draft, activation: Activation | None) -> bool:
        """An activation goes to the plain convolution before it; fused ones have theirs already."""
        if activation == IDENTITY:
            return True
        last = draft.last_conv()
        if (
            activation is None or last is None or last.module in self.sites
            or last.activation != IDENTITY or last.other is not None
        ):  # fmt: skip
            return False
        draft.stages[-1] = replace(last, activation=activation)
        return True


class _Reader:
    """Extends a draft by a traced forward, node by node."""

    def __init__(
        self, finder: _Finder, draft: Draft, modules: dict[str, nn.Module], path: str
    ) -> None:
        self.finder = finder
        self.draft = draft
        self.modules = modules
        self.path = path
        #: Which value of the run a node gives: see Stage.
        self.values: dict[fx.Node, int] = {}

    def read(self, graph: fx.Graph) -> bool:
        for node in graph.nodes:
            if node.op == "get_attr":
                continue
            given = [n for n in node.all_input_nodes if n.op != "get_attr"]
            inputs = [self.values.get(n) for n in given]
            if None in inputs or (node.op != "placeholder" and not inputs):
                return False
            if node.op == "placeholder":
                if self.values:
                    return False
                self.values[node] = self.draft.latest
            elif node.op == "output":
                return node.args == (node.all_input_nodes[0],) and inputs == [self.draft.latest]
            elif self._node(node, cast(list[int], inputs)):
                self.values[node] = self.draft.latest
            else:
                return False
        return False

    def _node(self, node: fx.Node, inputs: list[int]) -> bool:
        draft, finder = self.draft, self.finder
        if node.target in (operator.add, operator.iadd, torch.add):
            return self._sum(node, inputs)
        if node.target in (operator.mul, torch.mul):
            return self._scaled(node, inputs)
        if inputs != [draft.latest]:
            return False
        if node.target is F.linear:
            return self._linear(node)
        if not tracing.constants_only(node):
            return False
        before = [*draft.stages]
        if node.op == "call_module":
            name = str(node.target)
            known = (
                len(node.args) == 1 and not node.kwargs
                and finder.add_module(draft, self.modules[name], join(self.path, name))
            )  # fmt: skip
        elif (axes := _mean(node)) is not None and not draft.flat:
            draft.pool()
            draft.flat = axes == "gone"
            known = True
        elif node.target in (torch.flatten, "flatten"):
            given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
            known = finder.add_flatten(draft, (given.get("start_dim", 0), given.get("end_dim", -1)))
        elif (call := Call.of(node)) is not None:
            known = finder.add_activation(draft, activation_of(call)) or (
                is_sigmoid(call) and draft.sigmoid()
            )
        else:
            known = False
        # A convolution that took its activation over no longer gives what was before that; nor may
        # one after a sigmoid, which may work in place.
        took_over = len(draft.stages) == len(before) and draft.stages != before
        in_place = len(draft.stages) > len(before) and draft.stages[-1].kind == "sigmoid"
        return known and not ((took_over or in_place) and self._seen_elsewhere(inputs[0]))

    def _linear(self, node: fx.Node) -> bool:
        """The function on a Linear's own weight and bias: timm's class writes it out."""
        names = [n.target if isinstance(n, fx.Node) else n for n in node.args[1:]]
        path = str(names[0]).removesuffix(".weight") if names else ""
        module = self.modules.get(path)
        bias = None if module is None or module._parameters.get("bias") is None else f"{path}.bias"
        return (
            isinstance(module, nn.Linear) and names == [f"{path}.weight", bias]
            and not node.kwargs
            and self.finder.add_linear(self.draft, module, join(self.path, path))
        )  # fmt: skip

    def _seen_elsewhere(self, value: int) -> bool:
        """Whether one of the nodes that are one value of the run is read more than once."""
        return any(v == value and len(n.users) > 1 for n, v in self.values.items())

    def _sum(self, node: fx.Node, inputs: list[int]) -> bool:
        draft = self.draft
        last = draft.last_conv()
        if (
            len(node.args) != 2 or len(inputs) != 2 or draft.latest not in inputs or node.kwargs
            or last is None or last.other is not None or last.activation != IDENTITY or draft.flat
            or not self._is_dense(last)
            or self._seen_elsewhere(draft.latest)
        ):  # fmt: skip
            return False
        other = min(inputs)
        if draft.sizes[other] != draft.sizes[-1] or draft.channels[other] != draft.channels[-1]:
            return False
        draft.stages[-1] = replace(last, other=other)
        return True

    def _is_dense(self, stage: Stage) -> bool:
        """Whether a stage is a dense convolution of this graph, and not of an earlier child's."""
        prefix = len(self.path) + 1 if self.path else 0
        module = self.modules.get(cast(str, stage.module)[prefix:])
        return isinstance(module, nn.Conv2d) and module.groups == 1

    def _scaled(self, node: fx.Node, inputs: list[int]) -> bool:
        draft = self.draft
        if len(node.args) != 2 or len(inputs) != 2 or draft.latest not in inputs or node.kwargs:
            return False
        other = min(inputs)
        if draft.latest not in draft.pooled or other in draft.pooled or draft.flat:
            return False
        return draft.scale(other)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    edges = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
    return conv.kernel_size == conv.stride == (1, 1) and edges == (0, 0)


def _keeps_size(conv: nn.Conv2d, pad: tuple[int, int, int, int] | str) -> bool:
    """Whether the result is as high and wide as the input, whatever that is."""
    if conv.stride != (1, 1):
        return False
    if "same" in (pad, conv.padding):
        return pad == "same" or pad == (0, 0, 0, 0)
    top, left, bottom, right = cast(tuple[int, int, int, int], pad)
    own = (0, 0) if isinstance(conv.padding, str) else conv.padding
    needed = tuple(d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return (top + bottom + 2 * own[0], left + right + 2 * own[1]) == needed


def _mean(node: fx.Node) -> str | None:
    """Whether a call takes the mean over H and W: both dimensions are "kept", or "gone"."""
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    if node.target in ("mean", torch.mean):
        axes, keeps = given.pop("dim", None), given.pop("keepdim", False)
        over = isinstance(axes, list | tuple) and set(axes) in ({2, 3}, {-1, -2})
        return None if not over or given else "kept" if keeps is True else "gone"
    sizes = (1, (1, 1), [1, 1])
    is_pool = node.target is F.adaptive_avg_pool2d and (
        node.args[1:] in [(size,) for size in sizes] or node.kwargs.get("output_size") in sizes
    )
    return "kept" if is_pool else None
