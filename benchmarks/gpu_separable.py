"""The separable blocks of MobileNet V1 on a GPU (the stage "separable" of `make gpu`): one pass
(every kernel of separable_conv) beside our own two passes and plain PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_fused import WITHOUT_TF32, Shape, Subject
from gpu_fused import row as fused_row
from gpu_timing import DEVICE, Layer
from peers import LAST
from shapes import shapes
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mnet_kernels import _cuda, backends, ops
from mnet_kernels.nn.fold import fold
from mnet_kernels.registration import may_use_tf32

_separable_conv = torch.ops.mnet_kernels.separable_conv.default


def block(shape: Shape) -> nn.Sequential:
    """Depthwise + BatchNorm + ReLU6, pointwise + BatchNorm + ReLU6."""
    channels, _, _, kernel, stride, outputs, _ = shape
    depthwise = nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
    )
    pointwise = nn.Conv2d(channels, outputs, 1, bias=False)
    return nn.Sequential(
        depthwise, nn.BatchNorm2d(channels), nn.ReLU6(),
        pointwise, nn.BatchNorm2d(outputs), nn.ReLU6(),
    )  # fmt: skip


def ours(module: nn.Sequential, dtype: torch.dtype) -> dict[str, Layer]:
    """The block in one pass, and in two: dwconv_bn_act, then PyTorch's convolution (folded); in one
    pass on Triton too."""
    conv_dw, bn_dw, _, conv_pw, bn_pw, _ = module
    dw_affine, pw_affine = fold(dtype, None, bn_dw), fold(dtype, None, bn_pw)
    stride, padding = conv_dw.stride[0], conv_dw.padding[0]
    folded = fuse_conv_bn_eval(conv_pw, bn_pw).to(memory_format=LAST)

    def one_pass(x: Tensor, tf32: bool) -> Tensor:
        return _separable_conv(
            x, conv_dw.weight, *dw_affine, conv_pw.weight, *pw_affine, None, [stride], [padding],
            [1], "relu6", "relu6", 0.0, tf32,
        )  # fmt: skip

    def triton(x: Tensor) -> Tensor:
        from mnet_kernels.triton.operators import separable_conv

        return separable_conv(
            x, conv_dw.weight, *dw_affine, conv_pw.weight, *pw_affine, None, [stride],
            [padding] * 4, [1], "relu6", "relu6", 0.0,
        )  # fmt: skip

    def two_passes(x: Tensor) -> Tensor:
        middle = ops.dwconv_bn_act(
            x, conv_dw.weight, *dw_affine, stride=stride, padding=padding, activation="relu6",
            backend="cuda",
        )  # fmt: skip
        return F.relu6(folded(middle), inplace=True)

    ways: dict[str, Layer] = {
        "ours": partial(one_pass, tf32=may_use_tf32()), "ours in two passes": two_passes
    }  # fmt: skip
    if dtype == torch.float32:
        ways[WITHOUT_TF32] = partial(one_pass, tf32=False)
    if backends.why_not("triton", device=DEVICE, dtype=dtype) is None:
        ways["ours, triton"] = triton
    return ways


def native(module: nn.Sequential) -> dict[str, Layer]:
    """Plain PyTorch without torch.compile."""
    conv_dw, bn_dw, _, conv_pw, bn_pw, _ = module
    folded_dw, folded_pw = fuse_conv_bn_eval(conv_dw, bn_dw), fuse_conv_bn_eval(conv_pw, bn_pw)
    folded = nn.Sequential(folded_dw, nn.ReLU6(inplace=True), folded_pw, nn.ReLU6(inplace=True))
    return {"eager": module, "folded": folded.to(memory_format=LAST)}


def _facts(shape: Shape, batch: int, dtype: str) -> _cuda.CallFacts:
    channels, height, width, kernel, stride, outputs, _ = shape
    return _cuda.facts_of_separable_call(
        [batch, channels, height, width], dtype, [channels, 1, kernel, kernel], outputs, [stride],
        [kernel // 2], tf32=dtype == "float32" and may_use_tf32(),
    )  # fmt: skip


row = partial(
    fused_row, Subject("block", block, ours, native, _facts, _cuda.force_separable_variant)
)


def plan() -> list[tuple[Any, ...]]:
    """(function, its arguments), the rows that matter most first."""
    blocks, one, both = shapes("mobilenet_v1_blocks"), ("compile",), ("compile", "max-autotune")
    rows = [(s, batch, "bfloat16", one) for batch in (256, 1) for s in blocks]
    rows += [(s, 256, "float32", ()) for s in blocks]
    rows += [(s, 256, "bfloat16", both) for s in blocks]  # again, with one peer more
    rows += [(s, 32, "bfloat16", one) for s in blocks]
    rows += [(s, batch, "float32", ()) for batch in (1, 32) for s in blocks]
    rows += [(s, batch, "float16", ()) for batch in (256, 1, 32) for s in blocks]
    return [(row, *arguments) for arguments in rows]
