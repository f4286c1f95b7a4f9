"""conv_bn_act: act(scale[k] * conv2d(x, weight)[k] + shift[k]) in one pass, for all convolutions of
one group.

A product of matrices: pixels by depth, which is all channels of all taps, times depth by output
channels. A program owns PIXELS output pixels and BLOCK_K output channels, and goes through the
depth BLOCK_C at a time: channels of one tap, or of several where x has few (a picture has three).
Its tiles lie as x does, so that threads side by side reach memory side by side: pixels by channels
in channels_last, channels by pixels in contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mnet_kernels.registration import pair, same_device
from mnet_kernels.triton import arguments, launch, tuning
from mnet_kernels.triton.activation import activate
from mnet_kernels.triton.launch import wrap_triton
from mnet_kernels.triton.tile import per_channel, pixel


@triton.jit
def _numbers(block, COUNT: tl.constexpr, AXIS: tl.constexpr):
    """The block-th COUNT whole numbers, along one axis of two."""
    return tl.expand_dims(block * COUNT + tl.arange(0, COUNT), 1 - AXIS)


@triton.jit
def _depth(step, C: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr, AXIS: tl.constexpr):
    """Tap and channel of a block of depth, and what of it exists, along one axis of two."""
    if TAPS > 1 and C < BLOCK_C:
        d = _numbers(step, BLOCK_C, AXIS)
        return d // C, d % C, d < TAPS * C
    else:
        CHUNKS: tl.constexpr = tl.cdiv(C, BLOCK_C)
        c = _numbers(step % CHUNKS, BLOCK_C, AXIS)
        return step // CHUNKS, c, c < C


@tuning.autotune(tuning.DENSE)
@triton.jit(do_not_specialize=arguments.SIZES)
def _conv(
    x_ptr,  # (N, C, H, W), contiguous or channels_last
    w_ptr,  # (K, KH, KW, C)
    scale_ptr,  # (K,) float32 or None
    shift_ptr,  # (K,) float32 or None
    y_ptr,  # (N, K, OH, OW), laid out as x
    N, H, W, OH, OW, slope,
    C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, PIXELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """VECTOR: divides OW; PADDED: taps may lie outside of x; WIDE: offsets need 64 bits."""
    P: tl.constexpr = 0 if CHANNELS_LAST else 1  # the axis of pixels; in the weights', of depth
    Q: tl.constexpr = 1 - P  # of channels
    TAPS: tl.constexpr = KH * KW
    STEPS: tl.constexpr = tl.cdiv(TAPS * C, BLOCK_C) if C < BLOCK_C else TAPS * tl.cdiv(C, BLOCK_C)
    BLOCKS: tl.constexpr = tl.cdiv(K, BLOCK_K)
    OW = OW // VECTOR * VECTOR  # no change; says that rows begin at whole vectors
    if TAPS * SH * SW == 1 and not PADDED:
        W = OW
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    at = _numbers(pid // BLOCKS, PIXELS, P)
    k = _numbers(pid % BLOCKS, BLOCK_K, Q)  # the blocks of channels of the same pixels follow
    n, oh, ow = at // (OH * OW), at // OW % OH, at % OW
    exists, k_exists = n < N, k < K
    h, w = oh * SH - TOP, ow * SW - LEFT
    x_ptr += pixel(n, 0, h, w, C, H, W, CHANNELS_LAST)
    w_ptr += k * (TAPS * C)
    sums = tl.zeros((PIXELS, BLOCK_K) if CHANNELS_LAST else (BLOCK_K, PIXELS), tl.float32)
    for step in range(STEPS):
        if WIDE:
            step = tl.cast(step, tl.int64)
        tap, c, c_exists = _depth(step, C, TAPS, BLOCK_C, Q)
        i, j = tap // KW * DH, tap % KW * DW
        mask = exists & c_exists
        if PADDED:
            mask &= (h + i >= 0) & (h + i < H) & (w + j >= 0) & (w + j < W)
        values = tl.load(x_ptr + pixel(0, c, i, j, C, H, W, CHANNELS_LAST), mask, other=0.0)
        tap, c, c_exists = _depth(step, C, TAPS, BLOCK_C, P)
        weights = tl.load(w_ptr + (tap * C + c), k_exists & c_exists, other=0.0)
        if CHANNELS_LAST:
            sums = tl.dot(values, weights, sums, input_precision=PRECISION)
        else:
            sums = tl.dot(weights, values, sums, input_precision=PRECISION)
    scale = per_channel(scale_ptr, k, k_exists, 1.0)
    shift = per_channel(shift_ptr, k, k_exists, 0.0)
    y = activate(ACTIVATION, sums * scale + shift, slope).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + pixel(n, k, oh, ow, K, OH, OW, CHANNELS_LAST), y, exists & k_exists)


@launch.operator(
    "mnet_kernels::conv_bn_act_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, "
    f"{arguments.CONSTANTS}) -> Tensor",
)
def conv_bn_act(x, weight, scale, shift, stride, padding, dilation, activation, slope):
    """mnet_kernels.conv_bn_act of one group; an empty padding is "same"."""
    arguments.check(
        x, weight, scale, shift, stride, padding, dilation, activation, slope, "conv_bn_act", 1
    )  # fmt: skip
    y = _output(x, weight, scale, shift, stride, padding, dilation, activation, slope)
    if x.shape[0] == 0:
        return y
    call = arguments.Convolution(x, weight, y, stride, padding, dilation)
    K, pixels = y.shape[1], y.numel() // y.shape[1]
    sizes = call.sizes
    if weight.shape[2:] == (1, 1) and tuple(pair(stride)) == (1, 1) and not call.padded:
        sizes = (x.shape[0], *(1, x.shape[2] * x.shape[3]) * 2)  # a plane is one long row
    constants = call.constants | {
        "K": K, "PADDED": call.padded, "PRECISION": arguments.precision(),
        # Of planes of one pixel, as heads and gates have them, both layouts are the same.
        "CHANNELS_LAST": call.constants["CHANNELS_LAST"] or max(sizes[1:]) == 1,
    }  # fmt: skip

    def grid(meta):
        return (arguments.cdiv(pixels, meta["PIXELS"]) * arguments.cdiv(K, meta["BLOCK_K"]),)

    wrap_triton(_conv)[grid](
        call.dense(x), weight.permute(0, 2, 3, 1).contiguous(), arguments.dense(scale),
        arguments.dense(shift), y, *sizes, slope, ACTIVATION=activation, **constants,
        **tuning.dense(sizes[-1], call.itemsize, **constants),
    )  # fmt: skip
    return y


@conv_bn_act.register_fake
def _output(x, weight, scale, shift, stride, padding, dilation, activation, slope):
    """The result, uninitialised."""
    same_device("conv_bn_act", x, weight=weight, scale=scale, shift=shift)
    return arguments.empty_output(x, weight, stride, padding, dilation)
