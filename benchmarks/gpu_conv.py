"""MobileNet V2's dense convolutions that follow no depthwise one, V1's stem and classifier among
them, on a GPU (the stage "conv" of `make gpu`): every kernel of conv_bn_act beside cuDNN with
BatchNorm folded and the activation in place, and torch.compile."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from gpu_fused import WITHOUT_TF32, Shape, Subject
from gpu_fused import row as fused_row
from gpu_timing import DEVICE, Layer
from peers import LAST
from shapes import shapes
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mnet_kernels import _cuda, backends
from mnet_kernels.nn.fold import fold
from mnet_kernels.registration import may_use_tf32

_conv_bn_act = torch.ops.mnet_kernels.conv_bn_act.default


def layer(shape: Shape) -> nn.Sequential:
    """Convolution + BatchNorm + ReLU6."""
    channels, _, _, kernel, stride, outputs, _ = shape
    conv = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


def ours(module: nn.Sequential, dtype: torch.dtype) -> dict[str, Layer]:
    conv, bn, _ = module
    affine = fold(dtype, None, bn)

    def one_pass(x: Tensor, tf32: bool) -> Tensor:
        return _conv_bn_act(
            x, conv.weight, *affine, list(conv.stride), list(conv.padding), [1], "relu6", 0.0, tf32
        )

    def triton(x: Tensor) -> Tensor:
        from mnet_kernels.triton.operators import conv_bn_act

        return conv_bn_act(
            x, conv.weight, *affine, list(conv.stride), list(conv.padding) * 2, [1, 1], "relu6",
            0.0,
        )  # fmt: skip

    ways: dict[str, Layer] = {"ours": partial(one_pass, tf32=may_use_tf32())}
    if dtype == torch.float32:
        ways[WITHOUT_TF32] = partial(one_pass, tf32=False)
    if backends.why_not("triton", device=DEVICE, dtype=dtype) is None:
        ways["ours, triton"] = triton
    return ways


def native(module: nn.Sequential) -> dict[str, Layer]:
    conv, bn, _ = module
    folded = nn.Sequential(fuse_conv_bn_eval(conv, bn), nn.ReLU6(inplace=True))
    return {"eager": module, "folded": folded.to(memory_format=LAST)}


def _facts(shape: Shape, batch: int, dtype: str) -> _cuda.CallFacts:
    channels, height, width, kernel, stride, outputs, _ = shape
    return _cuda.facts_of_conv_call(
        [batch, channels, height, width], dtype, [outputs, channels, kernel, kernel], [stride],
        [kernel // 2], tf32=dtype == "float32" and may_use_tf32(),
    )  # fmt: skip


row = partial(fused_row, Subject("conv", layer, ours, native, _facts, _cuda.force_conv_variant))


def plan() -> list[tuple[Any, ...]]:
    """(function, its arguments), the rows that matter most first."""
    layers, one = shapes("mobilenet_v2_dense"), ("compile",)
    rows = [(s, batch, "bfloat16", one) for batch in (256, 1) for s in layers]
    rows += [(s, batch, "float32", one) for batch in (256, 1) for s in layers]
    rows += [(s, 256, "bfloat16", ("compile", "max-autotune")) for s in layers]  # one peer more
    return [(row, *arguments) for arguments in rows]
