"""Calls a run: on the CPU all of it as one operator (``conv_sequence``).

What passes between the layers of a run then stays in memory that the operator keeps, and Python is
entered once instead of once a layer. A run is taken only at calls where nobody could tell the
difference (no hooks, no gradients, nothing exchanged since); at all others its modules are called
one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from mnet_kernels import ops
from mnet_kernels.nn import FusedConv2d, Fusion
from mnet_kernels.nn.fold import fold, statistics_of
from mnet_kernels.nn.fused import declared_shape, in_functorch, recorded
from mnet_kernels.nn.snapshot import Watch
from mnet_kernels.reference import ACTIVATIONS, Activation
from mnet_kernels.runs.stage_by_stage import StageByStage
from mnet_kernels.runs.stages import Run

_Conv = FusedConv2d | nn.Conv2d | nn.Linear

_conv_sequence = torch.ops.mnet_kernels.conv_sequence.default
#: Columns of the operator's `stages`; csrc/cpu/sequence.h has them all.
KIND, OTHER = 0, 14


class Kind(IntEnum):
    """What stands in the column KIND: csrc/cpu/sequence.cpp reads the same numbers."""

    DEPTHWISE = 0  # the cost model decides whether it goes in one pass with the stage after it
    DENSE = 1
    DEPTHWISE_PAIRED = 2  # always, where it can be
    DEPTHWISE_APART = 3  # never
    POOL = 4
    SCALE = 5
    SIGMOID = 6


@dataclass(frozen=True)
class _Packed:
    """What the operator is given besides x, what it was made from, and how to tell that this
    changed."""

    dtype: torch.dtype
    sources: list[Tensor]
    watch: Watch
    stages: Tensor
    constants: Tensor


def _needs_gradient(sources: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in sources)


class Runner:
    """Calls one run's operator, or returns None where its modules have to be called one by one.

    What has to be looked at for that is looked at in one go (:class:`Watch`): it lies scattered in
    memory that the kernels have just driven out of the caches.
    """

    def __init__(self, owner: nn.Module, run: Run, fast: nn.Module) -> None:
        self.run = run
        #: By stage; None where it is no convolution.
        self.modules = [
            None if s.module is None else cast(_Conv, fast.get_submodule(s.module))
            for s in run.stages
        ]
        self.convs = [module for module in self.modules if module is not None]
        self.channels = _inputs(self.convs[0])
        self.inert = [fast.get_submodule(path) for path in run.inert]
        self.members = cast(list[nn.Module], list(owner._modules.values()))[run.start : run.stop]
        modules = list(dict.fromkeys(m for member in self.members for m in member.modules()))
        #: The tree as it was found: what was exchanged since is not run over.
        self.parents = [m for m in modules if m._modules]
        self.tree = [(m._modules, tuple(m._modules.values())) for m in (owner, *self.parents)]
        self.forwards = [m.__dict__.get("forward") for m in self.parents]
        self.hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.stage_by_stage = StageByStage(run.stages, self.modules)
        self._packed: _Packed | None = None
        self._seen: tuple[torch.Size, torch.dtype] | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        y = self.on_cpu(x)
        if y is None and self.stage_by_stage.serves(x) and self._can_go_stage_by_stage(x):
            self._seen = None  # what is told of pairs is told of this call
            y = self.stage_by_stage(x)
            return y.flatten(1) if self.run.flat_output else y
        return y

    def on_cpu(self, x: Tensor) -> Tensor | None:
        """The operator's result, or None."""
        if recorded() or not self._serves(x):
            return None
        packed = self._packed
        if packed is None or packed.dtype != x.dtype or not packed.watch.unchanged():
            packed = self._renewed(x.dtype)
            if packed is None:
                return None
            self._packed = packed
        elif _needs_gradient(packed.sources):
            return None
        if self.run.flat_input:
            x = x[:, :, None, None]
        self._seen = x.shape, x.dtype
        return _conv_sequence(x, packed.stages, packed.constants, self.run.flat_output)

    def _renewed(self, dtype: torch.dtype) -> _Packed | None:
        """What the modules are now, packed; None where they have to be called one by one."""
        if not self.unobserved() or any(module.training for module in self.inert):
            return None
        sources: list[Tensor] = []
        #: Whatever was looked at here, by the dictionary it was found in.
        entries: list[tuple[dict[str, Any], str, Any]] = []

        def look(held: dict[str, Any], *names: str) -> None:
            entries.extend((held, name, held.get(name, ...)) for name in names)

        for module in self.inert:
            look(module.__dict__, "training")
        for conv in self.convs:
            held, parameters = conv.__dict__, conv._parameters
            look(held, "fusion", "stride", "padding", "dilation")
            look(parameters, "weight", "bias")
            weight, bias = parameters.get("weight"), parameters["bias"]
            if weight is None or weight.dtype != dtype:  # None: parametrised
                return None
            if weight.shape != declared_shape(conv):
                return None
            sources += [weight] if bias is None else [weight, bias]
            fusion: Fusion | None = held.get("fusion")
            if fusion is None:
                continue
            look(vars(fusion), "norm", "declined", "backend", "batch_statistics", "pair")
            if fusion.declined is not None or fusion.backend not in (None, "cpu"):
                return None
            norm = fusion.norm
            if norm is None:
                continue
            look(norm.__dict__, "training", "eps")
            look(norm._buffers, "running_mean", "running_var")
            look(norm._parameters, "weight", "bias")
            statistics = statistics_of(norm)
            if statistics[0] is None or (norm.training and fusion.batch_statistics):
                return None
            sources += [t for t in statistics if t is not None]
        if any(t.dtype not in (torch.float32, dtype) or not t.is_cpu for t in sources):
            return None
        if _needs_gradient(sources):
            return None
        for parent in self.parents:
            look(parent.__dict__, "forward")
        for children, _ in self.tree:
            look(children, *children)
        sizes: list[tuple[dict[Any, Any], int]] = [
            (children, len(found)) for children, found in self.tree
        ]
        sizes += [(hooks, 0) for hooks in self.hooks]
        return _Packed(dtype, sources, Watch(sources, entries, sizes), *self._pack())

    @property
    def latest(self) -> tuple[torch.Size, torch.dtype, Tensor, Tensor] | None:
        """Shape and dtype of the input of the latest call, and what else the operator was given."""
        if self._packed is None or self._seen is None:
            return None
        return *self._seen, self._packed.stages, self._packed.constants

    def packed_bytes(self) -> int:
        """What the weights and constants that are kept for the next call take."""
        return 0 if self._packed is None else self._packed.constants.nbytes

    def _serves(self, x: Any) -> bool:
        return (
            type(x) is Tensor
            and ops.packs(x.dtype)
            and x.is_cpu
            and x.layout == torch.strided
            and x.dim() == (2 if self.run.flat_input else 4)
            and x.numel() > 0
            and x.shape[1] == self.channels
            and not (x.requires_grad and torch.is_grad_enabled())
            and not torch.is_autocast_enabled("cpu")
            and not in_functorch()
            and not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
        )

    def _can_go_stage_by_stage(self, x: Tensor) -> bool:
        return (
            not recorded()
            and not in_functorch()
            and not _needs_gradient([x, *(p for m in self.members for p in m.parameters())])
            and self.unobserved()
            and not any(module.training for module in self.inert)
        )

    def unobserved(self) -> bool:
        """No hook would miss a call, and the modules are those that were found."""
        return (
            not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
            and not any(self.hooks)
            and all(tuple(held.values()) == found for held, found in self.tree)
            and all(
                parent.__dict__.get("forward") is found
                for parent, found in zip(self.parents, self.forwards, strict=True)
            )
        )

    def _pack(self) -> tuple[Tensor, Tensor]:
        """(stages, constants) as csrc/cpu/sequence.h reads them."""
        rows: list[list[int]] = []
        parts: list[Tensor] = []
        offset, channels = 0, self.channels
        for stage, conv in zip(self.run.stages, self.modules, strict=True):
            other = -1 if stage.other is None else stage.other
            if conv is None:
                kind = Kind[stage.kind.upper()]
                rows.append([kind, channels, channels, *[1] * 6, *[0] * 5, other, 0])
                continue
            channels = conv.weight.shape[0]
            rows.append([*_row(conv, stage.activation), other, offset])
            for values in _flat(conv):
                cells = F.pad(values, (0, -values.nbytes % 64 // values.itemsize))
                parts.append(cells.view(torch.float32))
                offset += len(parts[-1])
            slope = (conv.fusion if isinstance(conv, FusedConv2d) else stage.activation).slope
            parts.append(torch.tensor([slope] + [0.0] * 15, dtype=torch.float32, device="cpu"))
            offset += 16
        return torch.tensor(rows, device="cpu"), torch.cat(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_seen": None}


def _inputs(conv: _Conv) -> int:
    return conv.in_features if isinstance(conv, nn.Linear) else conv.in_channels


#: By ``fusion.pair``.
_DEPTHWISE = {None: Kind.DEPTHWISE, True: Kind.DEPTHWISE_PAIRED, False: Kind.DEPTHWISE_APART}


def _row(conv: _Conv, activation: Activation) -> list[int]:
    """A convolution's row of `stages` up to its activation; ``activation``: a plain one's."""
    names = list(ACTIVATIONS)
    outputs, inputs = conv.weight.shape[0], _inputs(conv)
    if not isinstance(conv, FusedConv2d):  # 1x1
        return [Kind.DENSE, inputs, outputs, *[1] * 6, *[0] * 4, names.index(activation.name)]
    fusion = conv.fusion
    edges = (-1,) * 4 if fusion.pad == "same" else conv.padding_edges()
    kind = Kind.DENSE if conv.groups == 1 else _DEPTHWISE[fusion.pair]
    return [
        kind, inputs, outputs, *conv.kernel_size, *conv.stride, *conv.dilation, *edges,
        names.index(fusion.activation),
    ]  # fmt: skip


def _flat(conv: _Conv) -> Iterator[Tensor]:
    """Weight, scale and shift as the kernels read them."""
    weight, channels = conv.weight.detach(), conv.weight.shape[0]
    outputs = channels
    if isinstance(conv, nn.Linear):
        weight = weight[:, :, None, None]
    if isinstance(conv, nn.Linear) or conv.groups == 1:
        weight = ops.pack_conv_weight(weight)
        channels = weight.shape[0] * 32
        yield weight.flatten()
    else:
        weight = weight.permute(2, 3, 1, 0).flatten()
        yield weight.float()
        if weight.dtype != torch.float32:  # some kernels want it so
            yield weight
    norm = conv.fusion.norm if isinstance(conv, FusedConv2d) else None
    fills = (1.0, 0.0)
    for given, fill in zip(fold(torch.float32, conv.bias, norm), fills, strict=True):
        values = torch.full((channels,), fill, dtype=torch.float32, device="cpu")
        if given is not None:
            values[:outputs] = given.detach()
        yield values
