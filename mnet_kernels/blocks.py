"""SeparableConv: MobileNet's block as a module, to build new networks from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mnet_kernels.nn import (
    DepthwiseConvBNAct,
    FusedConv2d,
    Fusion,
)
from mnet_kernels.nn.depthwise import check_layer
from mnet_kernels.reference import Activation
from mnet_kernels.registration import layout_of
from mnet_kernels.runs.one_pass import in_one_pass, why_apart
from mnet_kernels.runs.runner import Runner
from mnet_kernels.runs.stages import Run, Stage

_Pair = int | tuple[int, int]


class SeparableConv(nn.Module):
    """``pw_act(bn(pointwise(dw_act(bn(depthwise(x))))))``, plus x where ``residual``.

    One pass whenever the BatchNorms' statistics are fixed: on the CPU on weights that are packed
    once and again when one changes, elsewhere (and where gradients flow) by
    :func:`mnet_kernels.separable_conv`. With batch statistics the halves run one after the other.

    Args:
        in_channels, out_channels: C and K.
        kernel_size, stride, dilation: of the depthwise half, int or (h, w).
        padding: "same" in TensorFlow's sense (output = ceil(size / stride), the odd pixel at the
            bottom and right), or int or (h, w).
        depth_multiplier: M, depthwise outputs a channel.
        dw_activation, pw_activation: names in ``mnet_kernels.reference.ACTIVATIONS``; ``slope`` is
            leaky_relu's.
        residual: add x to the result.
        eps, momentum: the BatchNorms'.
        backend: as for :func:`mnet_kernels.separable_conv`.

    Shapes:
        x ``(N, C, H, W)`` -> ``(N, K, H_out, W_out)``.

    Raises:
        ValueError: an unknown activation, backend or padding; a residual where K is not C or the
            stride not 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair = 3,
        *,
        stride: _Pair = 1,
        padding: _Pair | str = "same",
        dilation: _Pair = 1,
        depth_multiplier: int = 1,
        dw_activation: str = "relu",
        pw_activation: str = "relu",
        slope: float = 0.01,
        residual: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        activations = {"dw_activation": dw_activation, "pw_activation": pw_activation}
        check_layer("SeparableConv", padding, backend, **activations)
        if residual and (in_channels != out_channels or stride not in (1, (1, 1))):
            raise ValueError(
                "SeparableConv: residual: expected out_channels = in_channels and stride 1, got "
                f"{in_channels} to {out_channels} channels, stride {stride}"
            )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        depthwise = DepthwiseConvBNAct(
            in_channels, kernel_size, stride=stride, padding=padding, dilation=dilation,
            depth_multiplier=depth_multiplier, activation=dw_activation, slope=slope, eps=eps,
            momentum=momentum, backend=backend, **place,
        )  # fmt: skip
        self.conv_dw, self.bn_dw = depthwise.conv, depthwise.bn
        conv = nn.Conv2d(in_channels * depth_multiplier, out_channels, 1, bias=False, **place)
        self.bn_pw = nn.BatchNorm2d(out_channels, eps, momentum, **place)
        fusion = Fusion(
            norm=self.bn_pw,
            act=Activation(pw_activation, slope),
            activation=pw_activation,
            slope=slope,
            backend=backend,
        )
        self.conv_pw = FusedConv2d.fuse(conv, fusion)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        run = self._run()
        y = run.on_cpu(x)  # elsewhere no cost model is asked: one pass is what was asked for
        if y is not None:
            return y.contiguous(memory_format=layout_of(x))
        if run.unobserved() and self.why_composed(x) is None:
            return in_one_pass(self.conv_dw, self.conv_pw, x, x if self.residual else None)
        y = self.conv_pw(self.conv_dw(x))
        return y + x if self.residual else y

    def why_composed(self, x: Tensor) -> str | None:
        """The sentence why a call runs its halves one after the other, or None."""
        return why_apart(self.conv_dw, self.conv_pw, x)

    def _run(self) -> Runner:
        run = self.__dict__.get("_runner")
        if run is None:
            other = 0 if self.residual else None
            stages = (Stage("conv", "conv_dw"), Stage("conv", "conv_pw", other))
            run = self.__dict__["_runner"] = Runner(self, Run(0, 4, stages), self)
        return run
