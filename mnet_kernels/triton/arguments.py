"""From a call of an operator to what its kernels are given."""

from __future__ import annotations

import torch
from torch import Tensor

from mnet_kernels.registration import explicit_padding, layout_of, may_use_tf32, pair
from mnet_kernels.triton import tuning

#: In the operators' schemas, behind the tensors.
CONSTANTS = "int[2] stride, int[4] padding, int[2] dilation, str activation, float slope"
#: The kernels' run-time integers: another value compiles nothing.
SIZES = ("N", "H", "W", "OH", "OW")
_UNROLLED_TAPS = 49


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return (a + b - 1) // b


def dense(t: Tensor | None) -> Tensor | None:
    """A vector without gaps, as kernels read it."""
    return None if t is None else t.contiguous()


def precision() -> str:
    """What float32 products may lose: as for native's convolutions, which follow cuDNN's flag."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if may_use_tf32() else "ieee"


def check(
    x, weight, scale, shift, stride, padding, dilation, activation, slope, op="dwconv_bn_act",
    groups=0,
) -> None:  # fmt: skip
    """The checks of every backend; while torch traces, those of the shapes that kernels trust.
    groups: 0 for depthwise, or else 1."""
    if type(x) is Tensor and not torch.compiler.is_compiling():
        torch.ops.mnet_kernels.check_conv.default(
            op, x, weight, scale, shift, stride, padding, dilation, groups, activation, slope
        )  # fmt: skip
        return
    depthwise = groups == 0
    torch._check(weight.shape[1] == (1 if depthwise else x.shape[1]))
    torch._check(not depthwise or weight.shape[0] % x.shape[1] == 0)
    for t in (scale, shift):
        torch._check(t is None or (t.shape == weight.shape[:1] and t.dtype == torch.float32))


def empty_output(x, weight, stride, padding, dilation, outputs=None) -> Tensor:
    """Memory for a convolution's result, or for one with ``outputs`` channels instead."""
    stride, dilation = pair(stride), pair(dilation)
    top, left, bottom, right = explicit_padding(x, weight, stride, padding, dilation)
    room_h = x.shape[2] + top + bottom - (weight.shape[2] - 1) * dilation[0] - 1
    room_w = x.shape[3] + left + right - (weight.shape[3] - 1) * dilation[1] - 1
    torch._check(room_h >= 0 and room_w >= 0)
    size = (room_h // stride[0] + 1, room_w // stride[1] + 1)
    shape = (x.shape[0], outputs or weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


class Convolution:
    """A checked call: the kernels' sizes and compile-time constants.

    Args:
        x: ``(N, C, H, W)``; weight: ``(K, ., Kh, Kw)``; y: ``(N, K, OH, OW)``, or its gradient.
    """

    def __init__(self, x: Tensor, weight: Tensor, y: Tensor, stride, padding, dilation) -> None:
        stride, dilation = pair(stride), pair(dilation)
        top, left, bottom, right = explicit_padding(x, weight, stride, padding, dilation)
        reach = max(x.shape[2] + top + bottom, x.shape[3] + left + right)
        KH, KW = weight.shape[2:]
        self.layout = layout_of(x)
        self.itemsize = x.element_size()
        self.sizes = (x.shape[0], *x.shape[2:], *y.shape[2:])  # SIZES
        self.padded = any((top, left, bottom, right))
        self.constants = {
            "C": x.shape[1], "KH": KH, "KW": KW,
            "SH": stride[0], "SW": stride[1], "DH": dilation[0], "DW": dilation[1],
            "TOP": top, "LEFT": left,
            "CHANNELS_LAST": self.layout == torch.channels_last,
            # Half of what 32 bits hold: offsets that a mask rejects lie a little outside.
            "WIDE": max(x.numel(), weight.numel(), y.numel(), reach) >= 2**30,
        }  # fmt: skip

    def dense(self, t: Tensor) -> Tensor:
        """An image without gaps, in the call's layout."""
        return t.contiguous(memory_format=self.layout)


class Depthwise(Convolution):
    """A checked call of a depthwise convolution: also how many programs its kernels have.

    Args:
        weight: ``(C*M, 1, Kh, Kw)``.
    """

    def __init__(self, x: Tensor, weight: Tensor, y: Tensor, stride, padding, dilation) -> None:
        super().__init__(x, weight, y, stride, padding, dilation)
        constants = self.constants
        constants["M"] = weight.shape[0] // x.shape[1]
        self.unrolled = (
            constants["KH"] * constants["KW"] <= _UNROLLED_TAPS
            and constants["SH"] * constants["SW"] <= 16
        )

    def taps(self, weight: Tensor) -> Tensor:
        """Tap by tap for channels_last: a copy unless the weight already lies so in memory."""
        by_tap = self.layout == torch.channels_last
        return (weight.permute(2, 3, 1, 0) if by_tap else weight).contiguous()

    def block(self, channels: int) -> dict[str, int]:
        """LANES and BLOCK_C of a tensor of so many channels."""
        return tuning.block(channels, self.itemsize, self.constants["CHANNELS_LAST"])

    def programs(self, meta: dict[str, int], shape: torch.Size, *, of_x: bool = False) -> int:
        """How many programs go over the patches of a tensor of this shape, and its blocks of
        channels. of_x: it is the gradient of x, whose patches grow with the stride."""
        rows, cols = meta["ROWS"], meta["COLS"]
        if of_x and self.unrolled:
            rows, cols = rows * self.constants["SH"], cols * self.constants["SW"]
        patches = shape[0] * cdiv(shape[2], rows) * cdiv(shape[3], cols)
        return cdiv(patches, self.block(shape[1])["LANES"]) * self.blocks(shape[1])

    def blocks(self, channels: int) -> int:
        """Blocks of channels."""
        return cdiv(channels, self.block(channels)["BLOCK_C"])
