"""Depthwise-separable blocks of MobileNet V1 alone: depthwise and pointwise convolution, BatchNorm
and ReLU6 after each. Ours is what swap makes of an nn.Sequential of the six.
"""

from __future__ import annotations

import pytest
import torch
from machine import THREADS
from peers import Case, Ready, to_last
from rows import DTYPES, depthwise, flops, parameter_bytes, pointwise, row
from shapes import shapes
from torch import nn

from mnet_kernels import swap

LAYERS = shapes("mobilenet_v1")
#: A block's output is the next one's input; the last keeps its channels.
PAIRS = [
    (layer, following[0])
    for layer, following in zip(LAYERS, [*LAYERS[1:], LAYERS[-1]], strict=True)
]


def _rows():
    for shape, out_channels in PAIRS:
        for batch in (1, 16):
            for dtype in DTYPES:
                for threads in sorted({1, THREADS}, reverse=True):
                    for cold in (False, True):
                        usual = (
                            threads == THREADS and not cold
                            and (batch == 1 or dtype == "float32")
                        )  # fmt: skip
                        yield row(
                            shape, out_channels, batch, dtype, threads,
                            "cold" if cold else "warm", full=not usual,
                        )  # fmt: skip


@pytest.mark.parametrize("shape,out_channels,batch,dtype,threads,cache", list(_rows()))
def test_pair(race, shape, out_channels, batch, dtype, threads, cache):
    channels, height, width, kernel, stride, count = shape
    pair = nn.Sequential(*depthwise(channels, kernel, stride), *pointwise(channels, out_channels))
    pair = pair.eval().to(DTYPES[dtype])
    x = torch.randn(batch, channels, height, width).to(DTYPES[dtype])
    fast = swap(pair)
    pixels = (1 + (height - 1) // stride) * (1 + (width - 1) // stride)
    traffic = (x.numel() + batch * out_channels * pixels) * x.element_size()
    race(
        Case(pair, x, threads), Ready(fast, to_last), {"ours contiguous": Ready(fast)},
        cold=cache == "cold", budget_s=1.0,
        kind="pair", model="mobilenet_v1", shape=list(shape[:5]), out_channels=out_channels,
        count=count, layout="channels_last",
        flops=flops(pair, x), bytes=traffic + parameter_bytes(pair),
    )  # fmt: skip
