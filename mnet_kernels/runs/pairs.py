"""Depthwise + 1x1 pairs inside a run: which go in one pass, why, and which way is faster here.

The cost model is csrc/cpu/pair.cpp's pair_cost, for a GPU gpu_cost.py. It can be overruled,
for all pairs by ``swap(model, pairs=...)`` and for one by its depthwise convolution's
``fusion.pair``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn

from mnet_kernels.nn import FusedConv2d, Fusion
from mnet_kernels.runs.forwards import Sequenced, Whole
from mnet_kernels.runs.one_pass import in_one_pass, why_apart
from mnet_kernels.runs.runner import KIND, OTHER, Kind, Runner
from mnet_kernels.runs.stage_by_stage import PairDecision, StageByStage
from mnet_kernels.timing import interleave, ratio

_conv_sequence = torch.ops.mnet_kernels.conv_sequence.default
_plan = torch.ops.mnet_kernels.conv_sequence_plan.default
_ROUNDS = 9


@dataclass(frozen=True)
class Pair:
    """A depthwise convolution and the 1x1 convolution after it."""

    depthwise: str
    pointwise: str
    in_one_pass: bool
    reason: str


def runners(fast: nn.Module) -> Iterator[Runner]:
    """What takes the runs of a swapped model."""
    for module in fast.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Sequenced | Whole):
            yield from (runner for _, _, runner in forward.runs)


def pairs(runner: Runner) -> list[Pair]:
    """The pairs of a run, decided for its latest input and the threads there are now; none before
    the first call."""
    if runner.latest is None:
        return list(_pairs_stage_by_stage(runner))
    shape, dtype, stages, constants = runner.latest
    x = torch.empty(1, dtype=dtype).expand(shape)  # only its shape is looked at
    numbers = _plan(x, stages, constants, torch.get_num_threads())
    found = []
    for i in range(len(stages)):
        together, fused, separate = numbers[3 * i : 3 * i + 3]
        if fused == separate == 0:  # no pair begins here
            continue
        depthwise, pointwise = runner.run.stages[i : i + 2]
        told = _fusion(runner, i).pair
        reason = (
            f"estimated extra cost {fused / 1e3:.0f} µs in one pass, {separate / 1e3:.0f} µs apart"
            if told is None
            else "measured or set"
        )
        found.append(Pair(str(depthwise.module), str(pointwise.module), together > 0, reason))
    return found


def _pairs_stage_by_stage(runner: Runner) -> Iterator[Pair]:
    for i, made in sorted(runner.stage_by_stage.decisions.items()):
        depthwise, pointwise = runner.run.stages[i : i + 2]
        yield Pair(str(depthwise.module), str(pointwise.module), made.one_pass, made.reason)


def measure(runner: Runner) -> None:
    """Set every pair of a run to the way that is faster on an input like its latest."""
    if runner.latest is None:
        for i, made in runner.stage_by_stage.decisions.items():
            _measure_stage_by_stage(runner.stage_by_stage, i, made)
        return
    shape, dtype, stages, constants = runner.latest
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    can_pair = {pair.depthwise for pair in pairs(runner)}
    for i, stage in enumerate(runner.run.stages):
        if stage.module not in can_pair:
            continue
        before = x if i == 0 else _conv_sequence(x, stages[:i], constants)
        calls = {}
        for way, kind in (("one pass", Kind.DEPTHWISE_PAIRED), ("apart", Kind.DEPTHWISE_APART)):
            rows = stages[i : i + 2].clone()
            rows[0, KIND] = kind
            rows[:, OTHER] = -1
            calls[way] = partial(_conv_sequence, before, rows, constants)
        done = interleave(calls, rounds=_ROUNDS)
        _fusion(runner, i).pair = ratio(done["apart"], done["one pass"]).median >= 1


def _measure_stage_by_stage(stages: StageByStage, i: int, made: PairDecision) -> None:
    dw, pw = stages.halves(i)
    x = torch.randn(made.shape, device=dw.weight.device).to(
        dw.weight.dtype, memory_format=made.layout
    )
    if why_apart(dw, pw, x) is not None:
        return
    done = interleave(
        {"one pass": partial(in_one_pass, dw, pw, x), "apart": lambda: pw(dw(x))},
        rounds=_ROUNDS,
        synchronize=partial(torch.cuda.synchronize, x.device) if x.is_cuda else None,
    )
    dw.fusion.pair = ratio(done["apart"], done["one pass"]).median >= 1


def _fusion(runner: Runner, i: int) -> Fusion:
    return cast(FusedConv2d, runner.modules[i]).fusion
