"""separable_conv: depthwise + affine + activation, then pointwise + affine + activation, in one
pass; what lies between the two stays on the chip.

A program owns PIXELS output pixels and BLOCK_K output channels. It goes through the channels in
between BLOCK_C at a time: their depthwise tile as in dwconv_bn_act.py, rounded to the tensors'
dtype as a tensor in memory would be, times the pointwise weights on the matrix units, summed up in
float32. Programs of the same pixels compute the depthwise half again, nine products beside BLOCK_K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mnet_kernels.registration import same_device
from mnet_kernels.triton import arguments, launch, tuning
from mnet_kernels.triton.activation import activate
from mnet_kernels.triton.dwconv_bn_act import convolve
from mnet_kernels.triton.launch import wrap_triton
from mnet_kernels.triton.tile import channels, load_row, patches, per_channel, store_row

_CONSTANTS = (
    "int[2] stride, int[4] padding, int[2] dilation, str dw_activation, str pw_activation, "
    "float slope"
)


@tuning.autotune(tuning.SEPARABLE)
@triton.jit(do_not_specialize=arguments.SIZES)
def _separable(
    x_ptr,  # (N, C, H, W), contiguous or channels_last
    w_ptr,  # (C*M, KH*KW); (KH*KW, C*M) for channels_last
    dw_scale_ptr,  # (C*M,) float32 or None
    dw_shift_ptr,  # (C*M,) float32 or None
    pw_ptr,  # (K, C*M)
    pw_scale_ptr,  # (K,) float32 or None
    pw_shift_ptr,  # (K,) float32 or None
    residual_ptr,  # (N, K, OH, OW) or None, laid out as x
    y_ptr,  # (N, K, OH, OW), laid out as x
    N, H, W, OH, OW, slope,
    C: tl.constexpr, M: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr,
    DW_ACTIVATION: tl.constexpr, PW_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, UNROLL: tl.constexpr, WIDE: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)  # the blocks of channels of the same pixels follow one another
    n, h, w, exists = patches(pid // BLOCKS, N, OH, OW, PIXELS, WIDE)
    k, k_exists = channels(pid % BLOCKS, K, BLOCK_K)
    sums = tl.full((PIXELS, BLOCK_K), 0.0, tl.float32)
    for block in range(tl.cdiv(C * M, BLOCK_C)):
        c, c_exists = channels(block, C * M, BLOCK_C)
        conv = convolve(
            x_ptr, w_ptr, n, h, w, exists, c, c_exists, H, W, C, M, KH, KW, SH, SW, DH, DW,
            TOP, LEFT, CHANNELS_LAST, UNROLL, 1, 1, PIXELS, BLOCK_C,
        )  # fmt: skip
        scale = per_channel(dw_scale_ptr, c, c_exists, 1.0)
        shift = per_channel(dw_shift_ptr, c, c_exists, 0.0)
        between = activate(DW_ACTIVATION, conv[0] * scale + shift, slope)
        between = between.to(x_ptr.dtype.element_ty)
        c = (block * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
        weights = tl.load(pw_ptr + k * (C * M) + c, k_exists & (c < C * M), other=0.0)
        sums = tl.dot(between, weights, sums, input_precision=PRECISION)
    scale = per_channel(pw_scale_ptr, k, k_exists, 1.0)
    shift = per_channel(pw_shift_ptr, k, k_exists, 0.0)
    y = activate(PW_ACTIVATION, sums * scale + shift, slope)
    mask = exists & k_exists
    if residual_ptr is not None:
        row = load_row(residual_ptr, n, k, h, w, mask, K, OH, OW, CHANNELS_LAST, 1, PIXELS)
        y += row[0].to(tl.float32)
    store_row(y_ptr, (y,), n, k, h, w, mask, K, OH, OW, CHANNELS_LAST, False, PIXELS)


@launch.operator(
    "mnet_kernels::separable_conv_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor dw_weight, Tensor? dw_scale, Tensor? dw_shift, Tensor pw_weight, "
    f"Tensor? pw_scale, Tensor? pw_shift, Tensor? residual, {_CONSTANTS}) -> Tensor",
)
def separable_conv(
    x, dw_weight, dw_scale, dw_shift, pw_weight, pw_scale, pw_shift, residual,
    stride, padding, dilation, dw_activation, pw_activation, slope,
):  # fmt: skip
    """mnet_kernels.separable_conv; an empty padding is "same"."""
    tensors = (x, dw_weight, dw_scale, dw_shift, pw_weight, pw_scale, pw_shift, residual)
    constants = (stride, padding, dilation, dw_activation, pw_activation, slope)
    _check(*tensors, *constants)
    y = _output(*tensors, *constants)
    if x.shape[0] == 0:
        return y
    call = arguments.Depthwise(x, dw_weight, y, stride, padding, dilation)
    K, pixels = y.shape[1], y.numel() // y.shape[1]

    def grid(meta):
        return (arguments.cdiv(pixels, meta["PIXELS"]) * arguments.cdiv(K, meta["BLOCK_K"]),)

    wrap_triton(_separable)[grid](
        call.dense(x), call.taps(dw_weight), arguments.dense(dw_scale), arguments.dense(dw_shift),
        pw_weight.contiguous(), arguments.dense(pw_scale), arguments.dense(pw_shift),
        None if residual is None else call.dense(residual), y, *call.sizes, slope, K=K,
        DW_ACTIVATION=dw_activation, PW_ACTIVATION=pw_activation, PRECISION=arguments.precision(),
        UNROLL=call.unrolled, **call.constants,
    )  # fmt: skip
    return y


def _check(*call) -> None:
    """The checks of every backend; while torch traces, those of the shapes that kernels trust."""
    x, dw_weight, dw_scale, dw_shift, pw_weight, pw_scale, pw_shift, *_ = call
    if type(x) is torch.Tensor and not torch.compiler.is_compiling():
        torch.ops.mnet_kernels.check_separable_conv.default(*call)
        return
    torch._check(dw_weight.shape[0] % x.shape[1] == 0 and dw_weight.shape[1] == 1)
    torch._check(pw_weight.shape[1:] == (dw_weight.shape[0], 1, 1))
    for t, weight in (
        (dw_scale, dw_weight), (dw_shift, dw_weight), (pw_scale, pw_weight), (pw_shift, pw_weight),
    ):  # fmt: skip
        torch._check(t is None or (t.shape == weight.shape[:1] and t.dtype == torch.float32))


@separable_conv.register_fake
def _output(
    x, dw_weight, dw_scale, dw_shift, pw_weight, pw_scale, pw_shift, residual,
    stride, padding, dilation, dw_activation, pw_activation, slope,
):  # fmt: skip
    """The result, uninitialised."""
    same_device(
        "separable_conv", x, dw_weight=dw_weight, dw_scale=dw_scale, dw_shift=dw_shift,
        pw_weight=pw_weight, pw_scale=pw_scale, pw_shift=pw_shift, residual=residual,
    )  # fmt: skip
    K = pw_weight.shape[0]
    y = arguments.empty_output(x, dw_weight, stride, padding, dilation, outputs=K)
    torch._check(residual is None or residual.shape == y.shape)
    return y
