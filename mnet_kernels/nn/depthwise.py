"""The layer to build new networks from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mnet_kernels.nn.fused import FusedConv2d, Fusion, check_backend
from mnet_kernels.reference import ACTIVATIONS, Activation

_Pair = int | tuple[int, int]


def check_layer(layer: str, padding: _Pair | str, backend: str | None, **activations: str) -> None:
    """Raises ValueError, naming the layer and the argument, where one is not known."""
    for name, given in activations.items():
        if given not in ACTIVATIONS:
            raise ValueError(
                f"{layer}: {name}: expected one of {', '.join(ACTIVATIONS)}, got {given!r}"
            )
    if isinstance(padding, str) and padding != "same":
        raise ValueError(f'{layer}: padding: expected "same", int or (h, w), got {padding!r}')
    check_backend(layer, backend)


class DepthwiseConvBNAct(nn.Module):
    """``act(bn(depthwise_conv(x)))``, fused in eval mode and in training.

    Args:
        channels: C.
        kernel_size, stride, dilation: int or (h, w).
        padding: "same" in TensorFlow's sense (output = ceil(size / stride), the odd pixel at the
            bottom and right), or int or (h, w).
        depth_multiplier: M, outputs a channel.
        activation: a name in ``mnet_kernels.reference.ACTIVATIONS``; ``slope`` is leaky_relu's.
        eps, momentum: the BatchNorm's.
        bias: whether the convolution has one.
        backend: as for :func:`mnet_kernels.ops.dwconv_bn_act`.

    Shapes:
        x ``(N, C, H, W)`` -> ``(N, C*M, H_out, W_out)``.

    Raises:
        ValueError: an unknown activation, backend or padding.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: _Pair = 3,
        *,
        stride: _Pair = 1,
        padding: _Pair | str = "same",
        dilation: _Pair = 1,
        depth_multiplier: int = 1,
        activation: str = "relu",
        slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_layer("DepthwiseConvBNAct", padding, backend, activation=activation)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        outputs = channels * depth_multiplier
        same = padding == "same"
        conv = nn.Conv2d(
            channels, outputs, kernel_size, stride, 0 if same else padding, dilation,
            groups=channels, bias=bias, **place,
        )  # fmt: skip
        bn = nn.BatchNorm2d(outputs, eps, momentum, **place)
        fusion = Fusion(
            pad="same" if same else (0, 0, 0, 0),
            norm=bn,
            act=Activation(activation, slope),
            activation=activation,
            slope=slope,
            backend=backend,
        )
        self.conv = FusedConv2d.fuse(conv, fusion)
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.fusion.norm is not self.bn:  # exchanged, by convert_sync_batchnorm for one
            self.conv.fusion.norm = self.bn
        return self.conv(x)
