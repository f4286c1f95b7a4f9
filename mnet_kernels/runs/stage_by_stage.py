"""A run on a GPU: its stages one by one, but pairs in one pass where that pays.

On the CPU one operator does the whole run (runner.py), pairs included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mnet_kernels.gpu_cost import gpu_of, separable_seconds
from mnet_kernels.nn import FusedConv2d, is_depthwise
from mnet_kernels.registration import layout_of, may_use_tf32
from mnet_kernels.runs.one_pass import in_one_pass, slopes, why_apart
from mnet_kernels.runs.stages import Stage
from mnet_kernels.triton import TRITON_INTERPRETED


@dataclass(frozen=True)
class PairDecision:
    """How a pair went at its latest input, and why."""

    shape: torch.Size
    layout: torch.memory_format
    one_pass: bool
    reason: str


class StageByStage:
    """The stages of a run one by one, but pairs in one pass where the cost model says that this
    pays (gpu_cost.py), or ``fusion.pair`` of the depthwise convolution does."""

    def __init__(self, stages: Sequence[Stage], modules: Sequence[nn.Module | None]) -> None:
        self.stages, self.modules = stages, modules
        #: The last stage that reads a value besides the one before it.
        self.readers = {s.other: i for i, s in enumerate(stages) if s.other is not None}
        self.has_pairs = bool(self.pairs())
        self.decisions: dict[int, PairDecision] = {}

    def pairs(self) -> list[int]:
        """Stages that are the depthwise half of a pair."""
        return [i for i in range(len(self.stages) - 1) if self._is_pair(i)]

    def _is_pair(self, i: int) -> bool:
        dw, pw = self.modules[i : i + 2]
        return (
            isinstance(dw, FusedConv2d)
            and isinstance(pw, FusedConv2d)
            and is_depthwise(dw)
            and (pw.groups, pw.kernel_size, pw.stride) == (1, (1, 1), (1, 1))
            and pw.fusion.pad == (0, 0, 0, 0) == pw.padding_edges()
            and self.stages[i].other is None
            and i + 1 not in self.readers
            and len(slopes(dw, pw)) == 1
        )

    def halves(self, i: int) -> tuple[FusedConv2d, FusedConv2d]:
        """Both halves of the pair that begins at stage i."""
        return cast(tuple[FusedConv2d, FusedConv2d], tuple(self.modules[i : i + 2]))

    def serves(self, x: object) -> bool:
        """Whether some pair may go in one pass here; it costs little to ask."""
        return (
            self.has_pairs
            and type(x) is Tensor
            and (x.is_cuda or TRITON_INTERPRETED)
            and x.dim() == 4
        )

    def __call__(self, x: Tensor) -> Tensor:
        pairs = self.pairs()
        values = {0: x}  # those that are still to be read, by number
        i = 0
        while i < len(self.stages):
            stage, both = self.stages[i], i in pairs and self._together(i, x)
            if both:
                stage = self.stages[i + 1]
                other = None if stage.other is None else values[stage.other]
                x = in_one_pass(*self.halves(i), x, other)
            else:
                x = _one(stage, self.modules[i], x, values)
            i += 2 if both else 1
            values = {n: v for n, v in values.items() if self.readers.get(n, -1) >= i}
            if i in self.readers:
                values[i] = x
        return x

    def _together(self, i: int, x: Tensor) -> bool:
        dw, pw = self.halves(i)
        told = dw.fusion.pair
        one_pass, reason = bool(told), "measured or set"
        if told is not False and (why := why_apart(dw, pw, x)) is not None:
            one_pass, reason = False, why
        elif told is None:
            one, two = _estimate(dw, pw, x)
            one_pass = one <= two
            reason = f"estimated {one * 1e6:.1f} µs in one pass, {two * 1e6:.1f} µs apart"
        self.decisions[i] = PairDecision(x.shape, layout_of(x), one_pass, reason)
        return one_pass


def _estimate(dw: FusedConv2d, pw: FusedConv2d, x: Tensor) -> tuple[float, float]:
    height, width = dw.output_size(x)
    return separable_seconds(
        x.shape[0] * height * width,
        x.shape[0] * x.shape[2] * x.shape[3],
        dw.out_channels,
        pw.out_channels,
        x.element_size(),
        gpu_of(x.device),
        taps=dw.kernel_size[0] * dw.kernel_size[1],
        tf32=may_use_tf32(),
        # Triton's kernel reads either layout.
        copied=dw.serving(x.device, x.dtype) == "cuda"
        and not x.is_contiguous(memory_format=torch.channels_last),
    )


def _one(stage: Stage, module: nn.Module | None, x: Tensor, values: dict[int, Tensor]) -> Tensor:
    """A stage on its own. A plain convolution or Linear of a head has its activation after it."""
    other = None if stage.other is None else values[stage.other]
    if stage.kind == "sigmoid":
        return x.sigmoid()
    if module is None:
        return x.mean((2, 3), keepdim=True) if other is None else x * other
    linear = isinstance(module, nn.Linear)
    y = module(x.flatten(1))[:, :, None, None] if linear else module(x)
    if not isinstance(module, FusedConv2d):
        y = stage.activation(y)
    return y if other is None else y + other
