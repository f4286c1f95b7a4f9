"""TensorFlow's "same" padding as a module of its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SamePad2d(nn.Module):
    """TensorFlow's "same" padding, with zeros, for the convolution without padding that follows.

    That convolution then gives ``ceil(size / stride)`` outputs; where the padding is odd, the
    larger half lies at the bottom and right. x ``(N, C, H, W)``, any dtype.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        if kernel_size < stride:  # the closed form below would ask for a negative padding
            raise ValueError(
                f"SamePad2d: kernel_size must be at least stride ({stride}), got {kernel_size}"
            )
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # max((ceil(n / stride) - 1) * stride + kernel_size - n, 0), written without a comparison:
        # torch.fx traces it and torch.export keeps it for every size.
        rows = self.kernel_size - 1 - (x.shape[-2] - 1) % self.stride
        cols = self.kernel_size - 1 - (x.shape[-1] - 1) % self.stride
        return F.pad(x, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"
