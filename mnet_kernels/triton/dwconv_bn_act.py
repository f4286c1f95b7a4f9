"""dwconv_bn_act forward: act(scale[k] * depthwise(x, weight)[k] + shift[k]) in one pass.

What lanes, patches and tiles are: tile.py. What belongs to the layer (channels, kernel, stride,
dilation, padding, activation) is a compile-time constant; what belongs to the input (N, H, W) is
not, so that another batch size or resolution compiles nothing.
"""

# ruff: noqa: RUF005 (Triton knows no unpacking)
from __future__ import annotations

import triton
import triton.language as tl

from mnet_kernels.registration import same_device
from mnet_kernels.triton import arguments, launch, tuning
from mnet_kernels.triton.activation import activate
from mnet_kernels.triton.launch import wrap_triton
from mnet_kernels.triton.tile import (
    channels,
    column,
    load_columns,
    patches,
    per_channel,
    pixel,
    store_row,
    weight_at,
)


@triton.jit
def convolve(
    x_ptr, w_ptr, n, gh, gw, exists, k, k_exists, H, W,
    C: tl.constexpr, M: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The convolution at every pixel of the lanes' patches: ROWS * COLS float32 tiles, row by row.

    x_ptr: (N, C, H, W); w_ptr: (KH*KW, C*M) channels_last, (C*M, KH*KW) contiguous.
    """
    STEP: tl.constexpr = C if CHANNELS_LAST else 1
    VECTOR: tl.constexpr = COLS * SW if COLS > 1 and not CHANNELS_LAST else 1
    W = W // VECTOR * VECTOR  # no change; says that rows begin at whole vectors
    h = gh * (ROWS * SH) - TOP
    w = gw * (COLS * SW)
    base = x_ptr + pixel(n, k // M, h, w, C, H, W, CHANNELS_LAST)
    mask = exists & k_exists
    result = ()
    for r in tl.static_range(ROWS):
        sums = ()
        for _ in tl.static_range(COLS):
            sums = sums + (tl.full((LANES, BLOCK_C), 0.0, tl.float32),)
        if UNROLL:
            for i in tl.static_range(KH):
                row = base + (r * SH + i * DH) * (W * STEP)
                row_mask = mask & (h + (r * SH + i * DH) >= 0) & (h + (r * SH + i * DH) < H)
                vector = ()
                if VECTOR > 1:
                    vector = load_columns(row, row_mask & (w < W), LANES, VECTOR)
                for j in tl.static_range(KW):
                    tap = weight_at(w_ptr, k, k_exists, i * KW + j, C * M, KH * KW, CHANNELS_LAST)
                    added = ()
                    for t in tl.static_range(COLS):
                        value = column(row, vector, t * SW + j * DW - LEFT, STEP, w, W, row_mask)
                        added = added + (sums[t] + value * tap,)
                    sums = added
        else:  # one pixel a lane
            sum = sums[0]
            for i in range(KH):
                for j in range(KW):
                    at_h = h + i * DH
                    at_w = w + j * DW - LEFT
                    inside = (at_h >= 0) & (at_h < H) & (at_w >= 0) & (at_w < W)
                    at = x_ptr + pixel(n, k // M, at_h, at_w, C, H, W, CHANNELS_LAST)
                    value = tl.load(at, mask & inside, other=0.0).to(tl.float32)
                    tap = weight_at(w_ptr, k, k_exists, i * KW + j, C * M, KH * KW, CHANNELS_LAST)
                    sum += value * tap
            sums = (sum,)
        result = result + sums
    return result


@tuning.autotune(tuning.FORWARD)
@triton.jit(do_not_specialize=arguments.SIZES)
def _forward(
    x_ptr,  # (N, C, H, W), contiguous or channels_last
    w_ptr,  # (C*M, KH*KW); (KH*KW, C*M) for channels_last
    scale_ptr,  # (C*M,) float32 or None
    shift_ptr,  # (C*M,) float32 or None
    mean_ptr,  # (C*M,) float32 or None: taken off the convolution before scale
    y_ptr,  # (N, C*M, OH, OW), laid out as x
    N, H, W, OH, OW, slope,
    C: tl.constexpr, M: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = tl.cdiv(C * M, BLOCK_C)
    GH = tl.cdiv(OH, ROWS)
    GW = tl.cdiv(OW, COLS)
    pid = tl.program_id(0)  # the blocks of channels of one tile follow one another
    n, gh, gw, exists = patches(pid // BLOCKS, N, GH, GW, LANES, WIDE)
    k, k_exists = channels(pid % BLOCKS, C * M, BLOCK_C)
    conv = convolve(
        x_ptr, w_ptr, n, gh, gw, exists, k, k_exists, H, W, C, M, KH, KW, SH, SW, DH, DW,
        TOP, LEFT, CHANNELS_LAST, UNROLL, ROWS, COLS, LANES, BLOCK_C,
    )  # fmt: skip
    scale = per_channel(scale_ptr, k, k_exists, 1.0)
    shift = per_channel(shift_ptr, k, k_exists, 0.0)
    mean = per_channel(mean_ptr, k, k_exists, 0.0)
    for r in tl.static_range(ROWS):
        y = ()
        for t in tl.static_range(COLS):
            z = (conv[r * COLS + t] - mean) * scale + shift
            y = y + (activate(ACTIVATION, z, slope),)
        store_row(
            y_ptr, y, n, k, gh * ROWS + r, gw * COLS, exists & k_exists, C * M, OH, OW,
            CHANNELS_LAST, True, LANES,
        )  # fmt: skip


@launch.operator(
    "mnet_kernels::dwconv_bn_act_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, "
    f"{arguments.CONSTANTS}) -> Tensor",
)
def dwconv_bn_act(x, weight, scale, shift, stride, padding, dilation, activation, slope):
    """mnet_kernels.dwconv_bn_act; an empty padding is "same"."""
    arguments.check(x, weight, scale, shift, stride, padding, dilation, activation, slope)
    y = _output(x, weight, scale, shift, stride, padding, dilation, activation, slope)
    if x.shape[0] == 0:
        return y
    call = arguments.Depthwise(x, weight, y, stride, padding, dilation)
    affine = arguments.dense(scale), arguments.dense(shift)
    launch_forward(call, call.dense(x), call.taps(weight), *affine, None, y, activation, slope)
    return y


def launch_forward(call, x, taps, scale, shift, mean, y, activation, slope) -> None:
    """y = act(scale * (depthwise(x, weight) - mean) + shift) on dense tensors."""

    def grid(meta):
        return (call.programs(meta, y.shape),)

    wrap_triton(_forward)[grid](
        x, taps, scale, shift, mean, y, *call.sizes, slope, ACTIVATION=activation,
        UNROLL=call.unrolled, **call.constants, **call.block(y.shape[1]),
    )  # fmt: skip


@dwconv_bn_act.register_fake
def _output(x, weight, scale, shift, stride, padding, dilation, activation, slope):
    """The result, uninitialised."""
    same_device("dwconv_bn_act", x, weight=weight, scale=scale, shift=shift)
    return arguments.empty_output(x, weight, stride, padding, dilation)
