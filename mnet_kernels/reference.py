"""What each operator means, in plain PyTorch.

Everything here runs on any device and dtype, is differentiable, and is the ``native`` backend.
The fused kernels are tested against these functions in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

#: The activations every backend knows, by the name the operators take: functions of a tensor and
#: leaky_relu's slope, which may write over the tensor where they are told so. csrc/activation.h
#: lists the same names in the same order.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda z, slope, inplace=False: z,
    "relu": lambda z, slope, inplace=False: F.relu(z, inplace),
    "relu6": lambda z, slope, inplace=False: F.relu6(z, inplace),
    "leaky_relu": lambda z, slope, inplace=False: F.leaky_relu(z, slope, inplace),
    "hardswish": lambda z, slope, inplace=False: F.hardswish(z, inplace),
    "silu": lambda z, slope, inplace=False: F.silu(z, inplace),
    "hardsigmoid": lambda z, slope, inplace=False: F.hardsigmoid(z, inplace),
}


@dataclass(frozen=True)
class Activation:
    """One of ACTIVATIONS as a function of one tensor, which can be compared and pickled."""

    name: str
    slope: float = 0.01

    def __call__(self, z: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](z, self.slope)


IDENTITY = Activation("identity")


def same_padding(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """TensorFlow's "same" padding as (top, left, bottom, right): output = ceil(size / stride).

    The odd pixel goes to the bottom and to the right.
    """
    begin, end = [], []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        begin.append(total // 2)
        end.append(total - total // 2)
    return begin[0], begin[1], end[0], end[1]


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "relu",
    slope: float = 0.01,
) -> Tensor:
    """``act(scale[c] * conv2d(x, weight)[c] + shift[c])``, each step rounded to x's dtype.

    Args:
        x: ``(N, C, H, W)``, any floating dtype.
        weight: ``(C_out, C // groups, Kh, Kw)``, x's dtype.
        scale, shift: ``(C_out,)`` or None for 1 and 0.
        padding: (top, left, bottom, right), zeros.
    """
    z = _conv(x, weight, stride, padding, dilation, groups)
    if scale is not None:
        z = z * scale.to(z.dtype).view(-1, 1, 1)
    if shift is not None:
        z = z + shift.to(z.dtype).view(-1, 1, 1)
    return ACTIVATIONS[activation](z, slope)


def _conv(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    top, left, bottom, right = padding
    if (top, left) == (bottom, right):
        return F.conv2d(x, weight, None, stride, (top, left), dilation, groups)
    padded = F.pad(x, (left, right, top, bottom))
    return F.conv2d(padded, weight, None, stride, 0, dilation, groups)


def dwconv_bn_act(x: Tensor, weight: Tensor, *args: Tensor | None, **kwargs) -> Tensor:
    """:func:`conv_bn_act` with one group a channel; weight ``(C*M, 1, Kh, Kw)``."""
    return conv_bn_act(x, weight, *args, groups=x.shape[1], **kwargs)


def dwconv_bn_act_training(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "relu",
    slope: float = 0.01,
) -> Tensor:
    """``act(batch_norm(conv2d(x, weight), gamma, beta))`` with the batch's own statistics.

    Args:
        x: ``(N, C, H, W)``, any floating dtype.
        weight: ``(C*M, 1, Kh, Kw)``, x's dtype.
        gamma, beta: ``(C*M,)`` or None for 1 and 0.
        running_mean, running_var: ``(C*M,)``, updated in place as nn.BatchNorm2d's, or None.
        padding: (top, left, bottom, right), zeros.
    """
    conv = _conv(x, weight, stride, padding, dilation, x.shape[1])
    z = F.batch_norm(conv, running_mean, running_var, gamma, beta, True, momentum, eps)
    return ACTIVATIONS[activation](z, slope)


def separable_conv(
    x: Tensor,
    dw_weight: Tensor,
    dw_scale: Tensor | None,
    dw_shift: Tensor | None,
    pw_weight: Tensor,
    pw_scale: Tensor | None = None,
    pw_shift: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dw_activation: str = "relu",
    pw_activation: str = "relu",
    slope: float = 0.01,
    **geometry: Sequence[int],
) -> Tensor:
    """:func:`dwconv_bn_act`, then :func:`conv_bn_act` with a 1x1 kernel, then ``+ residual``.

    Args:
        pw_weight: ``(K, C*M, 1, 1)``.
        geometry: stride, padding, dilation of the depthwise half.
    """
    middle = dwconv_bn_act(
        x, dw_weight, dw_scale, dw_shift, activation=dw_activation, slope=slope, **geometry
    )
    y = conv_bn_act(middle, pw_weight, pw_scale, pw_shift, activation=pw_activation, slope=slope)
    return y if residual is None else y + residual
