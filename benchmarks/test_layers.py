"""Depthwise + BatchNorm + ReLU6 layers alone: the operator, its weights laid out as swap keeps
them, against plain PyTorch.

Batch 1 runs in cache, as inside a network; batch 16 partly from memory. "ours" is channels_last,
with contiguous timed beside it; the peers have the choice of both layouts.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peers import layer_peers
from shapes import shapes
from torch import nn

from mnet_kernels import ops
from mnet_kernels.fold import fold

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS = [("mobilenet_v1", s) for s in shapes("mobilenet_v1")]
LAYERS_5X5 = [("mobilenet_v3_large", s) for s in shapes("mobilenet_v3_large")]


def _layer(channels: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
    )  # fmt: skip
    bn = nn.BatchNorm2d(channels)
    with torch.no_grad():
        bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
        bn.weight.uniform_(0.5, 2), bn.bias.normal_()
    return nn.Sequential(conv, bn, nn.ReLU6()).eval()


def _compare(measure, model, shape, batch, dtype):
    channels, height, width, kernel, stride, count = shape
    layer = _layer(channels, kernel, stride).to(DTYPES[dtype])
    x = torch.randn(batch, channels, height, width).to(DTYPES[dtype])
    with torch.inference_mode():
        exact = copy.deepcopy(layer).double()(x.double())
    weight, (scale, shift) = layer[0].weight.detach(), fold(x.dtype, None, layer[1])
    weight = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)

    def ours(x):
        return lambda: ops.dwconv_bn_act(
            x, weight, scale.detach(), shift.detach(), stride=stride, padding=kernel // 2,
            activation="relu6",
        )  # fmt: skip

    measure(
        ours(x.to(memory_format=torch.channels_last)),
        layer_peers(layer[0], layer[1], x),
        exact,
        tolerance=1e-5 if dtype == "float32" else 5e-2,
        others={"ours contiguous": ours(x)},
        kind="layer", model=model, shape=list(shape[:5]), count=count, batch=batch, dtype=dtype,
        flops=2 * exact.numel() * kernel * kernel,
        bytes=(x.numel() + exact.numel()) * x.element_size(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("model,shape", LAYERS, ids=lambda v: v if isinstance(v, str) else str(v))
def test_mobilenet_v1(measure, model, shape, batch, dtype):
    _compare(measure, model, shape, batch, dtype)


@pytest.mark.parametrize("model,shape", LAYERS_5X5, ids=str)
def test_5x5(measure, model, shape):
    _compare(measure, model, shape, 1, "float32")


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
        tolerance=1e-5,
        kind="overhead", shape=[8, 4, 4, 3, 1], batch=1, dtype="float32", layout="contiguous",
    )  # fmt: skip
