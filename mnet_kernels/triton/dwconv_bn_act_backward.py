"""dwconv_bn_act backward: the gradients of x, weight, scale and shift.

    conv = depthwise(x, weight);  z = scale * conv + shift;  y = act(z)
    dz = dy * act'(z);  dconv = dz * scale

conv is recomputed, not kept. One pass over x and dy writes dconv and sums up dscale and dshift; a
second gathers dx out of dconv, and a third sums up dweight. Sums go into float32 partials, a row a
program, which torch adds up in a fixed order: the same call gives the same bits.

dwconv_bn_act_training_backward.py runs the same kernels, the first one twice: its dconv needs the
sums, as the mean and the variance depend on conv too.
"""

# ruff: noqa: RUF005 (Triton knows no unpacking)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnet_kernels.triton import arguments, launch, tuning
from mnet_kernels.triton.activation import activation_gradient
from mnet_kernels.triton.dwconv_bn_act import convolve
from mnet_kernels.triton.launch import wrap_triton
from mnet_kernels.triton.tile import (
    channels,
    column,
    load_columns,
    load_row,
    patches,
    per_channel,
    pixel,
    store_row,
    weight_at,
    weights_of_turn,
)


@tuning.autotune(tuning.CONV)
@triton.jit(do_not_specialize=(*arguments.SIZES, "CHUNKS"))
def _backward_conv(
    dy_ptr,  # (N, C*M, OH, OW), laid out as x
    x_ptr,  # (N, C, H, W), contiguous or channels_last
    w_ptr,  # (C*M, KH*KW); (KH*KW, C*M) for channels_last
    scale_ptr,  # (C*M,) float32 or None
    shift_ptr,  # (C*M,) float32 or None
    mean_ptr,  # (C*M,) float32 or None: taken off conv wherever it is used
    linear_ptr,  # (C*M,) float32 or None
    constant_ptr,  # (C*M,) float32 or None: dconv = dz * scale + linear * conv + constant
    dconv_ptr,  # (N, C*M, OH, OW), laid out as x, or None
    partial_ptr,  # (CHUNKS, 2, C*M) float32 or None: sums of dz * conv and of dz
    N, H, W, OH, OW, CHUNKS, slope,
    C: tl.constexpr, M: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = tl.cdiv(C * M, BLOCK_C)
    GH = tl.cdiv(OH, ROWS)
    GW = tl.cdiv(OW, COLS)
    chunk = tl.program_id(0) // BLOCKS
    k, k_exists = channels(tl.program_id(0) % BLOCKS, C * M, BLOCK_C)
    scale = per_channel(scale_ptr, k, k_exists, 1.0)
    shift = per_channel(shift_ptr, k, k_exists, 0.0)
    mean = per_channel(mean_ptr, k, k_exists, 0.0)
    linear = per_channel(linear_ptr, k, k_exists, 0.0)
    constant = per_channel(constant_ptr, k, k_exists, 0.0)
    dscale = tl.full((LANES, BLOCK_C), 0.0, tl.float32)
    dshift = tl.full((LANES, BLOCK_C), 0.0, tl.float32)
    for tile in range(chunk, tl.cdiv(N * GH * GW, LANES), CHUNKS):
        n, gh, gw, exists = patches(tile, N, GH, GW, LANES, WIDE)
        taps_ptr = weights_of_turn(w_ptr, tile, chunk, CHUNKS, KH * KW)
        conv = convolve(
            x_ptr, taps_ptr, n, gh, gw, exists, k, k_exists, H, W, C, M, KH, KW, SH, SW, DH, DW,
            TOP, LEFT, CHANNELS_LAST, UNROLL, ROWS, COLS, LANES, BLOCK_C,
        )  # fmt: skip
        for r in tl.static_range(ROWS):
            h = gh * ROWS + r
            dy = load_row(
                dy_ptr, n, k, h, gw * COLS, exists & k_exists, C * M, OH, OW,
                CHANNELS_LAST, COLS, LANES,
            )  # fmt: skip
            dconv = ()
            for t in tl.static_range(COLS):
                centred = conv[r * COLS + t] - mean
                z = centred * scale + shift
                dz = activation_gradient(ACTIVATION, dy[t].to(tl.float32), z, slope)
                if partial_ptr is not None:
                    inside = exists & (h < OH) & (gw * COLS + t < OW)
                    dscale += tl.where(inside, dz * centred, 0.0)
                    dshift += tl.where(inside, dz, 0.0)
                value = dz * scale
                if linear_ptr is not None:
                    value += linear * centred + constant
                dconv = dconv + (value,)
            if dconv_ptr is not None:
                store_row(
                    dconv_ptr, dconv, n, k, h, gw * COLS, exists & k_exists, C * M, OH, OW,
                    CHANNELS_LAST, True, LANES,
                )  # fmt: skip
    if partial_ptr is not None:
        partial = partial_ptr + chunk * (2 * C * M) + k
        tl.store(partial, tl.sum(dscale, 0)[None, :], k_exists)
        tl.store(partial + C * M, tl.sum(dshift, 0)[None, :], k_exists)


@tuning.autotune(tuning.DATA)
@triton.jit(do_not_specialize=arguments.SIZES)
def _backward_data(
    dconv_ptr,  # (N, C*M, OH, OW), laid out as dx
    w_ptr,  # (C*M, KH*KW); (KH*KW, C*M) for channels_last
    dx_ptr,  # (N, C, H, W), contiguous or channels_last
    N, H, W, OH, OW,
    C: tl.constexpr, M: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A patch is ROWS x COLS times the stride, so that which taps reach a pixel of it is known at
    compile time: those whose output, (pixel + padding - tap) / stride, is whole."""
    BLOCKS: tl.constexpr = tl.cdiv(C, BLOCK_C)
    STEP: tl.constexpr = C * M if CHANNELS_LAST else 1
    VECTOR: tl.constexpr = COLS if COLS > 1 and not CHANNELS_LAST else 1
    HEIGHT: tl.constexpr = ROWS * SH if UNROLL else 1
    WIDTH: tl.constexpr = COLS * SW if UNROLL else 1
    OW = OW // VECTOR * VECTOR
    pid = tl.program_id(0)
    n, gh, gw, exists = patches(
        pid // BLOCKS, N, tl.cdiv(H, HEIGHT), tl.cdiv(W, WIDTH), LANES, WIDE
    )
    c, c_exists = channels(pid % BLOCKS, C, BLOCK_C)
    mask = exists & c_exists
    dx = ()
    for r in tl.static_range(HEIGHT):
        sums = ()
        for _ in tl.static_range(WIDTH):
            sums = sums + (tl.full((LANES, BLOCK_C), 0.0, tl.float32),)
        for m in tl.static_range(M):
            k = c * M + m
            if UNROLL:
                base = dconv_ptr + pixel(n, k, gh * ROWS, gw * COLS, C * M, OH, OW, CHANNELS_LAST)
                for i in tl.static_range(KH):
                    if (r + TOP - i * DH) % SH == 0:
                        h = (r + TOP - i * DH) // SH
                        row = base + h * (OW * STEP)
                        row_mask = mask & (gh * ROWS + h >= 0) & (gh * ROWS + h < OH)
                        vector = ()
                        if VECTOR > 1:
                            vector = load_columns(row, row_mask & (gw * COLS < OW), LANES, VECTOR)
                        for j in tl.static_range(KW):
                            tap = weight_at(
                                w_ptr, k, c_exists, i * KW + j, C * M, KH * KW, CHANNELS_LAST
                            )
                            added = ()
                            for t in tl.static_range(WIDTH):
                                if (t + LEFT - j * DW) % SW == 0:
                                    value = column(
                                        row, vector, (t + LEFT - j * DW) // SW, STEP,
                                        gw * COLS, OW, row_mask,
                                    )  # fmt: skip
                                    added = added + (sums[t] + value * tap,)
                                else:
                                    added = added + (sums[t],)
                            sums = added
            else:  # one pixel a lane
                sum = sums[0]
                for i in range(KH):
                    for j in range(KW):
                        at_h = gh + TOP - i * DH
                        at_w = gw + LEFT - j * DW
                        whole = (at_h % SH == 0) & (at_w % SW == 0) & (at_h >= 0) & (at_w >= 0)
                        inside = whole & (at_h // SH < OH) & (at_w // SW < OW)
                        at = dconv_ptr + pixel(
                            n, k, at_h // SH, at_w // SW, C * M, OH, OW, CHANNELS_LAST
                        )
                        value = tl.load(at, mask & inside, other=0.0).to(tl.float32)
                        tap = weight_at(
                            w_ptr, k, c_exists, i * KW + j, C * M, KH * KW, CHANNELS_LAST
                        )
                        sum += value * tap
                sums = (sum,)
        dx = dx + (sums,)
    for r in tl.static_range(HEIGHT):  # after all loads: none is kept across a store
        store_row(
            dx_ptr, dx[r], n, c, gh * HEIGHT + r, gw * WIDTH, mask, C, H, W,
            CHANNELS_LAST, COLS > 1, LANES,
        )  # fmt: skip


@tuning.autotune(tuning.WEIGHT)
@triton.jit(do_not_specialize=(*arguments.SIZES, "CHUNKS"))
def _backward_weight(
    dconv_ptr,  # (N, C*M, OH, OW), laid out as x
    x_ptr,  # (N, C, H, W), contiguous or channels_last
    partial_ptr,  # (CHUNKS, KH*KW, C*M) float32
    N, H, W, OH, OW, CHUNKS,
    C: tl.constexpr, M: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    TAP_ROWS: tl.constexpr, TAP_COLS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program sums up a chunk of the pixels for a block of channels and TAP_ROWS x TAP_COLS of
    the kernel's taps."""
    BLOCKS: tl.constexpr = tl.cdiv(C * M, BLOCK_C)
    STEP: tl.constexpr = C if CHANNELS_LAST else 1
    VECTOR: tl.constexpr = COLS * SW if COLS > 1 and TAP_COLS >= KW and not CHANNELS_LAST else 1
    W = W // VECTOR * VECTOR
    GH = tl.cdiv(OH, ROWS)
    GW = tl.cdiv(OW, COLS)
    chunk = tl.program_id(0) // BLOCKS
    k, k_exists = channels(tl.program_id(0) % BLOCKS, C * M, BLOCK_C)
    tap_h = tl.program_id(1) * TAP_ROWS
    tap_w = tl.program_id(2) * TAP_COLS
    sums = ()
    for _ in tl.static_range(TAP_ROWS * TAP_COLS):
        sums = sums + (tl.full((LANES, BLOCK_C), 0.0, tl.float32),)
    for tile in range(chunk, tl.cdiv(N * GH * GW, LANES), CHUNKS):
        n, gh, gw, exists = patches(tile, N, GH, GW, LANES, WIDE)
        mask = exists & k_exists
        h = gh * (ROWS * SH) - TOP + tap_h * DH
        w = gw * (COLS * SW)
        if TAP_COLS < KW:
            w += tap_w * DW
        base = x_ptr + pixel(n, k // M, h, w, C, H, W, CHANNELS_LAST)
        for r in tl.static_range(ROWS):
            dconv = load_row(
                dconv_ptr, n, k, gh * ROWS + r, gw * COLS, mask, C * M, OH, OW,
                CHANNELS_LAST, COLS, LANES,
            )  # fmt: skip
            added = ()
            for i in tl.static_range(TAP_ROWS):
                row = base + (r * SH + i * DH) * (W * STEP)
                row_mask = mask & (h + (r * SH + i * DH) >= 0) & (h + (r * SH + i * DH) < H)
                vector = ()
                if VECTOR > 1:
                    vector = load_columns(row, row_mask & (w < W), LANES, VECTOR)
                for j in tl.static_range(TAP_COLS):
                    sum = sums[i * TAP_COLS + j]
                    for t in tl.static_range(COLS):
                        value = column(row, vector, t * SW + j * DW - LEFT, STEP, w, W, row_mask)
                        sum += value * dconv[t].to(tl.float32)
                    added = added + (sum,)
            sums = added
    for i in tl.static_range(TAP_ROWS):
        for j in tl.static_range(TAP_COLS):
            tap = (tap_h + i) * KW + tap_w + j
            taken = k_exists & (tap_w + j < KW)  # TAP_ROWS divides KH
            total = tl.sum(sums[i * TAP_COLS + j], 0)[None, :]
            tl.store(partial_ptr + (chunk * (KH * KW) + tap) * (C * M) + k, total, taken)


@launch.operator(
    "mnet_kernels::dwconv_bn_act_triton_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, "
    f"{arguments.CONSTANTS}, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)",
)
def dwconv_bn_act_backward(
    dy, x, weight, scale, shift, stride, padding, dilation, activation, slope, needed
):
    """The gradients of x, weight, scale and shift; empty tensors for those not `needed`."""
    arguments.check(x, weight, scale, shift, stride, padding, dilation, activation, slope)
    dx, dweight, dscale, dshift = _gradients(
        dy, x, weight, scale, shift, stride, padding, dilation, activation, slope, needed
    )
    if x.shape[0] == 0:
        return dx, dweight.zero_(), dscale.zero_(), dshift.zero_()
    call = arguments.Depthwise(x, weight, dy, stride, padding, dilation)
    dy, x, taps = call.dense(dy), call.dense(x), call.taps(weight)
    dconv = torch.empty_like(dy, memory_format=call.layout)
    partial = partials(dy, 2)
    launch_conv(
        call, dy, x, taps, (arguments.dense(scale), arguments.dense(shift), None, None, None),
        dconv, partial, activation, slope,
    )  # fmt: skip
    sums = partial.sum(0)
    if needed[2]:
        dscale = sums[0].clone()
    if needed[3]:
        dshift = sums[1].clone()
    if needed[0]:
        launch_data(call, dconv, taps, dx)
    if needed[1]:
        launch_weight(call, dconv, x, dweight)
    return dx, dweight, dscale, dshift


def chunks_of(y: Tensor) -> int:
    """Parts of the pixels, each with a program and sums of its own: enough to fill a GPU; at least
    256 pixels each, so that sums cost little."""
    return max(1, min(1024, y.numel() // y.shape[1] // 256))


def partials(y: Tensor, count: int) -> Tensor:
    """(CHUNKS, count, C*M) float32, uninitialised."""
    shape = (chunks_of(y), count, y.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=y.device)


def launch_conv(call, dy, x, taps, vectors, dconv, partial, activation, slope) -> None:
    """The first pass: dconv, the gradient of the convolution's result, and partial sums for those
    of scale and shift. vectors: scale, shift, mean, linear, constant; dconv or partial may be
    None."""
    chunks = chunks_of(dy)

    def grid(meta):
        return (chunks * call.blocks(dy.shape[1]),)

    wrap_triton(_backward_conv)[grid](
        dy, x, taps, *vectors, dconv, partial, *call.sizes, chunks, slope,
        ACTIVATION=activation, UNROLL=call.unrolled, **call.constants, **call.block(dy.shape[1]),
    )  # fmt: skip


def launch_data(call, dconv, taps, dx) -> None:
    """dx, from dconv."""

    def grid(meta):
        return (call.programs(meta, dx.shape, of_x=True),)

    wrap_triton(_backward_data)[grid](
        dconv, taps, dx, *call.sizes, UNROLL=call.unrolled, **call.constants,
        **call.block(dx.shape[1]),
    )  # fmt: skip


def launch_weight(call, dconv, x, dweight) -> None:
    """dweight, from dconv and x: partial sums a chunk, then their sum."""
    KH, KW = dweight.shape[2:]
    rows, cols = (KH, KW) if KH * KW <= 9 else (1, min(KW, 8))
    chunks, partial = chunks_of(dconv), partials(dconv, KH * KW)

    def grid(meta):
        blocks = call.blocks(dconv.shape[1])
        return chunks * blocks, arguments.cdiv(KH, rows), arguments.cdiv(KW, cols)

    wrap_triton(_backward_weight)[grid](
        dconv, x, partial, *call.sizes, chunks, TAP_ROWS=rows, TAP_COLS=cols, **call.constants,
        **call.block(dconv.shape[1]),
    )  # fmt: skip
    dweight.copy_(partial.sum(0).t().reshape(dweight.shape))


@dwconv_bn_act_backward.register_fake
def _gradients(dy, x, weight, scale, shift, stride, padding, dilation, activation, slope, needed):
    """The results, uninitialised."""
    layout = arguments.layout_of(x)
    return (
        torch.empty_like(x, memory_format=layout) if needed[0] else x.new_empty(0),
        weight.new_empty(weight.shape if needed[1] else 0),
        x.new_empty(weight.shape[0] if needed[2] else 0, dtype=torch.float32),
        x.new_empty(weight.shape[0] if needed[3] else 0, dtype=torch.float32),
    )
