"""Depthwise + BatchNorm + ReLU6 layers alone: the operator, its weights laid out as swap keeps
them, against every peer.

"ours" is channels_last, with contiguous timed beside it; the peers have the choice of layouts.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from machine import THREADS
from peers import Case, Ready, to_last
from rows import DTYPES, depthwise, row
from shapes import shapes
from torch import nn

from mnet_kernels import ops
from mnet_kernels.nn.fold import fold

MODELS = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "convnext_tiny")


def _rows():
    for model in MODELS:
        for shape in shapes(model):
            for batch in (1, 16):
                for dtype in DTYPES:
                    for threads in sorted({1, THREADS}, reverse=True):
                        for cold in (False, True):
                            usual = (
                                model == "mobilenet_v1" or (batch == 1 and model != "mobilenet_v2")
                                or (batch == 1 and dtype == "float32")
                            ) and threads == THREADS  # fmt: skip
                            if cold:
                                usual &= (model, batch, dtype) == ("mobilenet_v1", 1, "float32")
                            yield row(
                                model, shape, batch, dtype, threads, "cold" if cold else "warm",
                                full=not usual,
                            )  # fmt: skip


@pytest.mark.parametrize("model,shape,batch,dtype,threads,cache", list(_rows()))
def test_layer(race, model, shape, batch, dtype, threads, cache):
    channels, height, width, kernel, stride, count = shape
    layer = nn.Sequential(*depthwise(channels, kernel, stride)).eval().to(DTYPES[dtype])
    x = torch.randn(batch, channels, height, width).to(DTYPES[dtype])
    weight, constants = layer[0].weight.detach(), fold(x.dtype, None, layer[1])
    weight = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    scale, shift = (c.detach() for c in constants)

    def ours(x):
        return ops.dwconv_bn_act(
            x, weight, scale, shift, stride=stride, padding=kernel // 2, activation="relu6"
        )

    out = (1 + (height - 1) // stride) * (1 + (width - 1) // stride) * channels * batch
    race(
        Case(layer, x, threads), Ready(ours, to_last), {"ours contiguous": Ready(ours)},
        cold=cache == "cold", budget_s=0.7,
        slow=("torch.compile frozen",) if model == "mobilenet_v1" and batch == 1 else (),
        kind="layer", model=model, shape=list(shape[:5]), count=count, layout="channels_last",
        flops=2 * out * kernel * kernel, bytes=(x.numel() + out) * x.element_size(),
    )  # fmt: skip


def test_overhead_of_a_call(measure):
    """A 1x8x4x4 input: what is left is the cost of a call. The peer is F.conv2d alone."""
    x, weight = torch.randn(1, 8, 4, 4), torch.randn(8, 1, 3, 3)
    exact = ops.dwconv_bn_act(
        x.double(), weight.double(), padding=1, activation="identity", backend="native"
    )
    measure(
        lambda: ops.dwconv_bn_act(x, weight, padding=1, activation="identity"),
        {"F.conv2d": lambda: F.conv2d(x, weight, None, 1, 1, 1, 8)},
        exact,
        tolerance=1e-5, budget_s=0.3,
        kind="overhead", shape=[8, 4, 4, 3, 1], batch=1, dtype="float32", layout="contiguous",
    )  # fmt: skip
