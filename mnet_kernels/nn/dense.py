"""Dense convolutions with fixed statistics on a GPU: one kernel, or the native convolution of a
fold with the activation after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mnet_kernels.gpu_cost import conv_seconds, gpu_of
from mnet_kernels.nn.server import FOLDED
from mnet_kernels.registration import may_use_tf32

if TYPE_CHECKING:
    from mnet_kernels.nn.fused import FusedConv2d


@dataclass(frozen=True)
class Decision:
    """How a convolution went at its latest input, and why."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    contiguous: bool
    backend: str
    reason: str


def decide(conv: FusedConv2d, x: Tensor) -> str:
    """The backend that can serve, or "folded" where the cost model says that this is faster; what
    was measured is above it."""
    name = conv.serving(x.device, x.dtype)
    if name not in ("cuda", "triton"):
        return FOLDED
    contiguous = not x.is_contiguous(memory_format=torch.channels_last)
    made: Decision | None = conv.__dict__.get("_decision")
    call = x.shape, x.dtype, x.device, contiguous
    if made is None or call != (made.shape, made.dtype, made.device, made.contiguous):
        one, folded = _estimate(conv, x, contiguous and name == "cuda")
        reason = f"estimated {one * 1e6:.1f} µs in one kernel, {folded * 1e6:.1f} µs folded"
        made = Decision(*call, name if one < folded else FOLDED, reason)
        conv.__dict__["_decision"] = made
    return name if name == conv.fusion.preferred else made.backend


def _estimate(conv: FusedConv2d, x: Tensor, copied: bool) -> tuple[float, float]:
    height, width = conv.output_size(x)
    kernel_height, kernel_width = conv.kernel_size
    return conv_seconds(
        x.shape[0] * height * width,
        x.shape[0] * x.shape[2] * x.shape[3],
        conv.in_channels,
        conv.out_channels,
        x.element_size(),
        gpu_of(x.device),
        taps=kernel_height * kernel_width,
        activation=conv.fusion.activation != "identity",
        tf32=may_use_tf32(),
        copied=copied,
    )


def told(
    conv: FusedConv2d, backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """Which way the latest call of a convolution went that ``backend`` can serve, and why."""
    made: Decision | None = conv.__dict__.get("_decision")
    if made is None or (made.device, made.dtype) != (device, dtype):
        return backend, "or folded, as the cost model says of an input"
    return made.backend, made.reason
