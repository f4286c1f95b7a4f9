"""1x1 convolutions of a single pixel: heads, squeeze-and-excitation."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnet_kernels.nn.fused import recorded

_DTYPES = (torch.float32, torch.bfloat16)


class PixelConv2d(nn.Conv2d):
    """A plain 1x1 Conv2d, which for one pixel is a Linear, and runs as one on the CPU.

    PyTorch's convolution (oneDNN's) brings weight and gradient into its own order at every call,
    which takes longer than the product: of 1024 channels to 1000, batch 8, forward and backward,
    6 times as long. Parameters, buffers and state_dict are the Conv2d's; inputs of more pixels, a
    single image (no faster) and other dtypes than float32 and bfloat16 go to Conv2d itself, and so
    does everything that is compiled or traced.

    Args:
        x: ``(N, C_in, H, W)``.

    Returns:
        ``(N, C_out, H, W)``, x's dtype.
    """

    @staticmethod
    def take(conv: nn.Module) -> None:
        """Turn ``conv`` itself into a PixelConv2d if it is a 1x1 Conv2d and nothing else."""
        if type(conv) is not nn.Conv2d or "forward" in vars(conv):
            return
        padded = conv.padding not in ((0, 0), "same", "valid")
        if conv.kernel_size == (1, 1) and conv.groups == 1 and not padded:
            conv.__class__ = PixelConv2d

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_product(x):
            return super().forward(x)
        product = F.linear(x.flatten(1), self.weight.flatten(1), self.bias)
        return product[:, :, None, None]

    def _is_product(self, x: Tensor) -> bool:
        if recorded() or type(x) is not Tensor:
            return False
        weight = cast(Tensor, self.weight)
        return (
            x.is_cpu
            and weight.is_cpu
            and x.dim() == 4
            and x.shape[0] > 1
            and x.shape[1:] == (self.in_channels, 1, 1)
            and x.dtype in _DTYPES
            and (x.dtype == weight.dtype or torch.is_autocast_enabled("cpu"))
        )
