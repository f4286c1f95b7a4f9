"""A depthwise convolution and the 1x1 convolution after it, modules both, as one separable_conv.

For GPUs, and for SeparableConv; on the CPU a run's operator pairs its layers by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnet_kernels.nn import FusedConv2d
from mnet_kernels.nn.fused import in_functorch
from mnet_kernels.separable import separable_conv, why_composed


def why_apart(dw: FusedConv2d, pw: FusedConv2d, x: Tensor) -> str | None:
    """The sentence why a call runs the two one after the other; None: :func:`in_one_pass` can."""
    for half in (dw, pw):
        if x.dim() != 4 or (x.dtype, x.device) != (half.weight.dtype, half.weight.device):
            return "input and weights differ in dtype or device"
        if half.uses_batch_statistics():
            return "statistics of the batch are taken half by half"
        if (reason := half.why_native(x.device, x.dtype)) is not None:
            return reason
    if torch.is_autocast_enabled(x.device.type) or in_functorch():
        return "autocast and functorch go through the halves"
    return why_composed(x.device, x.dtype, backend_of(dw))


def in_one_pass(
    dw: FusedConv2d, pw: FusedConv2d, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """``pw(dw(x)) + residual``, where :func:`why_apart` has nothing against it."""
    return separable_conv(
        x,
        *dw._depthwise_constants(x, dw.weight),
        *pw._constants(x, pw.weight, "as_is"),
        residual=residual,
        stride=dw.stride,
        padding="same" if dw.fusion.pad == "same" else dw.padding_edges(),
        dilation=dw.dilation,
        dw_activation=dw.fusion.activation,
        pw_activation=pw.fusion.activation,
        slope=slopes(dw, pw).pop(),
        backend=backend_of(dw),
    )


def backend_of(dw: FusedConv2d) -> str | None:
    """The one that was asked for, or measured to be the fastest; None: the best there is."""
    return dw.fusion.backend or dw.fusion.preferred


def slopes(*halves: FusedConv2d) -> set[float]:
    """The slopes of their leaky_relus, or the default: one separable_conv has one slope."""
    return {h.fusion.slope for h in halves if h.fusion.activation == "leaky_relu"} or {0.01}
