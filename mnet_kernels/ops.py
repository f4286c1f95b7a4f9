"""The public operators: how they are called, their fake kernels, autograd, autocast and vmap.

Arguments are checked in C++ (csrc/problem.h), once for all backends; the functions here only
choose the backend. What an operator means: reference.py.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnet_kernels import _C, backends, reference, registration
from mnet_kernels.registration import IntOrInts
from mnet_kernels.registration import explicit_padding as _explicit_padding
from mnet_kernels.registration import output_size as _output_size
from mnet_kernels.registration import pair as _pair
from mnet_kernels.registration import same_device as _same_device

_check = torch.ops.mnet_kernels.check_conv.default
_dwconv_bn_act = torch.ops.mnet_kernels.dwconv_bn_act.default
_dwconv_bn_act_backward = torch.ops.mnet_kernels.dwconv_bn_act_backward.default
_conv_bn_act = torch.ops.mnet_kernels.conv_bn_act.default
_conv_bn_act_packed = torch.ops.mnet_kernels.conv_bn_act_packed.default


def dwconv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    activation: str = "relu",
    slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """Depthwise convolution, per-channel affine and activation in one pass over memory.

    ``y[n, k] = act(scale[k] * conv(x[n, k // M], weight[k]) + shift[k])``, which is
    conv + BatchNorm (with fixed statistics) + activation: ``scale = bn.weight * rsqrt(var + eps)``,
    ``shift = bn.bias - mean * scale``.

    Args:
        x: ``(N, C, H, W)``; float32, float16, bfloat16 or (on the CPU) float64. Contiguous and
            channels_last are read as they are; any other strides are copied once.
        weight: ``(C*M, 1, Kh, Kw)`` with depth multiplier M >= 1; x's dtype, any strides.
        scale, shift: ``(C*M,)`` float32 (float64 for float64 x), or None for 1 and 0.
        stride, dilation: int or (h, w), positive.
        padding: int, (h, w) or (top, left, bottom, right), zeros; or ``"same"`` as TensorFlow
            means it: output = ceil(size / stride), the odd pixel at the bottom and right.
        activation: identity, relu, relu6, leaky_relu (with ``slope``), hardswish, silu or
            hardsigmoid.
        slope: leaky_relu's negative slope.
        backend: one of ``backends.NAMES``, or None for the best one that can serve x.

    Returns:
        ``(N, C*M, OH, OW)``, x's dtype and layout. Accumulated in float32 (float64 for float64)
        and rounded once, at the store.

    Raises:
        RuntimeError: an argument is wrong; the message names operator, argument, expected and
            actual. Nothing has run by then.
    """
    if padding == "same":
        padding = ()
    if torch.compiler.is_compiling():
        stride, padding, dilation = map(_static, (stride, padding, dilation))
    elif backend is None:
        y = _C.dwconv_bn_act_direct(
            x, weight, scale, shift, stride, padding, dilation, activation, slope
        )
        if y is not None:
            return y
    args = (x, weight, scale, shift, stride, padding, dilation, activation, slope)
    if backend is None and isinstance(x, Tensor) and x.is_cpu:
        return _dwconv_bn_act(*args)
    chosen = _select("dwconv_bn_act", backend, x)
    if chosen in ("cpu", "cuda"):
        return _dwconv_bn_act(*args)
    if chosen == "triton":
        return backends.triton_operator("dwconv_bn_act")(*args)
    return _native("dwconv_bn_act", 0, *args)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    activation: str = "relu",
    slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """:func:`dwconv_bn_act` for any other convolution: weight ``(C_out, C // groups, Kh, Kw)``.

    One pass where no gradient flows through: on the cpu backend for what :func:`can_pack` accepts,
    on GPUs for one group. Plain PyTorch for everything else. On the CPU the weight is packed at
    every call: where it stays the same, pack it once and call :func:`conv_bn_act_packed`.
    """
    if padding == "same":
        padding = ()
    if torch.compiler.is_compiling():
        stride, padding, dilation = map(_static, (stride, padding, dilation))
    chosen = _select("conv_bn_act", backend, x)
    tensors = (x, weight, scale, shift)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if chosen == "cpu" and not needs_grad and can_pack(x, groups):
        constants = (stride, padding, dilation, groups, activation, slope)
        _check("conv_bn_act", *tensors, *constants)
        y = conv_bn_act_packed(
            x, pack_conv_weight(weight), scale, shift, kernel_size=tuple(weight.shape[2:]),
            out_channels=weight.shape[0], stride=stride, padding=padding, dilation=dilation,
            activation=activation, slope=slope,
        )  # fmt: skip
        return y.contiguous(memory_format=registration.layout_of(x))  # with one channel, x is both
    if groups == 1 and not needs_grad and has_dense_kernel(chosen):
        args = (*tensors, stride, padding, dilation, activation, slope)
        if chosen == "triton":
            return backends.triton_operator("conv_bn_act")(*args)  # asks for TF32 by itself
        tf32 = x.dtype == torch.float32 and registration.may_use_tf32()
        return _conv_bn_act(*args, tf32=tf32)
    return _native(
        "conv_bn_act", groups, x, weight, scale, shift, stride, padding, dilation, activation, slope
    )


def has_dense_kernel(backend: str) -> bool:
    """Whether :func:`conv_bn_act` is one kernel of a GPU backend: one group, no gradient."""
    return backend in ("cuda", "triton") and backends.has_kernel("conv_bn_act", backend)


def can_pack(x: Tensor, groups: int) -> bool:
    """Whether :func:`conv_bn_act_packed` serves this input: on the CPU, channels_last, of a dtype
    that :func:`packs` tells, a dense convolution."""
    return (
        groups == 1
        and x.is_cpu
        and packs(x.dtype)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def packs(dtype: torch.dtype) -> bool:
    """Whether this machine's fastest dense convolution of the dtype is the packed one: float32,
    and bfloat16 unless there are matrix tiles (AMX), which PyTorch's own convolution uses."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and not _has_matrix_tiles())


@functools.cache
def _has_matrix_tiles() -> bool:
    return torch.cpu._is_amx_tile_supported()


def pack_conv_weight(weight: Tensor) -> Tensor:
    """The weight of a dense convolution as :func:`conv_bn_act_packed` reads it.

    Args:
        weight: ``(C_out, C, Kh, Kw)`` float32 or bfloat16 on the CPU, any strides.

    Returns:
        ``(ceil(C_out / 32), 1, Kh*Kw*C, 32)`` float32, the last panel filled up with zeros;
        ``(ceil(C_out / 32), 1, ceil(Kh*Kw*C / 2), 64)`` bfloat16, pairs of taps side by side.
    """
    return torch.ops.mnet_kernels.pack_conv_weight.default(weight)


def conv_bn_act_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    kernel_size: IntOrInts,
    out_channels: int,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    activation: str = "relu",
    slope: float = 0.01,
) -> Tensor:
    """:func:`conv_bn_act` on weights from :func:`pack_conv_weight`; no gradient.

    Args:
        x: ``(N, C, H, W)`` float32 or bfloat16 on the CPU; channels_last is read as it is,
            anything else copied once.
        packed: from :func:`pack_conv_weight` for ``(out_channels, C, *kernel_size)``.
        scale, shift: ``(out_channels,)`` float32 or None.

    Returns:
        ``(N, out_channels, OH, OW)``, x's dtype, channels_last. Accumulated in float32, long sums
        in pieces of 128 products, which keeps the rounding error at that of native; rounded once.

    Raises:
        RuntimeError: an argument is wrong; the message names it, the expected and the actual.
    """
    if padding == "same":
        padding = ()
    return _conv_bn_act_packed(
        x, packed, scale, shift, kernel_size, stride, padding, dilation, out_channels, activation,
        slope,
    )  # fmt: skip


def _native(op: str, groups: int, x: Tensor, weight: Tensor, *rest) -> Tensor:
    """Plain PyTorch behind the same checks. groups = 0 means depthwise."""
    scale, shift, stride, padding, dilation, activation, slope = rest
    _, _, *explicit = _check(
        op, x, weight, scale, shift, stride, padding, dilation, groups, activation, slope
    )
    return reference.conv_bn_act(
        x, weight, scale, shift,
        stride=_pair(stride), padding=explicit, dilation=_pair(dilation),
        groups=groups or x.shape[1], activation=activation, slope=slope,
    )  # fmt: skip


def _select(op: str, backend: str | None, x: Tensor) -> str:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x: expected a Tensor, got {type(x).__name__}")
    return backends.select(op, backend, x.device, x.dtype)


def _static(value: Any) -> Any:
    """Plain ints for the operator where torch.compile holds symbolic ones."""
    return operator.index(value) if isinstance(value, int) else [operator.index(v) for v in value]


# ---- torch.compile, torch.export ----
@torch.library.register_fake("mnet_kernels::check_conv")
def _check_fake(op, x, weight, scale, shift, stride, padding, dilation, groups, activation, slope):
    _same_device(op, x, weight=weight, scale=scale, shift=shift)
    pad = _explicit_padding(x, weight, _pair(stride), padding, _pair(dilation))
    return [*_output_size(x, weight, stride, pad, dilation), *pad]


def _register_fake(op: str) -> None:
    def fake(x, weight, scale, shift, stride, padding, dilation, activation, slope, tf32=False):
        _same_device(op, x, weight=weight, scale=scale, shift=shift)
        pad = _explicit_padding(x, weight, _pair(stride), padding, _pair(dilation))
        out_h, out_w = _output_size(x, weight, stride, pad, dilation)
        y = x.new_empty((x.shape[0], weight.shape[0], out_h, out_w))
        return y.to(memory_format=registration.layout_of(x))

    torch.library.register_fake(f"mnet_kernels::{op}")(fake)


for _op in ("dwconv_bn_act", "conv_bn_act"):
    _register_fake(_op)


@torch.library.register_fake("mnet_kernels::dwconv_bn_act_backward")
def _dwconv_bn_act_backward_fake(dy, x, weight, scale, shift, *constants_and_wanted):
    *_, data, sums = constants_and_wanted
    op = "dwconv_bn_act_backward"
    _same_device(op, x, dy=dy, weight=weight, scale=scale, shift=shift)
    dx = (
        x.new_empty(x.shape).to(memory_format=registration.layout_of(x)) if data else x.new_empty(0)
    )
    dweight = x.new_empty(weight.shape if sums else 0)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dscale, dshift = (x.new_empty(weight.shape[0] if sums else 0, dtype=wide) for _ in range(2))
    return dx, dweight, dscale, dshift


@torch.library.register_fake("mnet_kernels::conv_bn_act_packed")
def _conv_bn_act_packed_fake(
    x, packed, scale, shift, kernel, stride, padding, dilation, out_channels, activation, slope
):
    _same_device("conv_bn_act", x, packed=packed, scale=scale, shift=shift)
    weight = packed.new_empty((out_channels, x.shape[1], *_pair(kernel)))
    pad = _explicit_padding(x, weight, _pair(stride), padding, _pair(dilation))
    y = x.new_empty((x.shape[0], out_channels, *_output_size(x, weight, stride, pad, dilation)))
    return y.to(memory_format=torch.channels_last)


@torch.library.register_fake("mnet_kernels::pack_conv_weight")
def _pack_conv_weight_fake(weight):
    out_channels, *taps = weight.shape
    in_step = 2 if weight.dtype == torch.bfloat16 else 1
    steps = -(-math.prod(taps) // in_step)
    return weight.new_empty((-(-out_channels // 32), 1, steps, 32 * in_step))


# ---- autograd: frozen statistics, the pre-activation is recomputed ----
_ACTIVATION_BACKWARD = {
    "identity": lambda dy, z, slope: dy,
    "relu": lambda dy, z, slope: torch.ops.aten.threshold_backward(dy, z, 0),
    "relu6": lambda dy, z, slope: torch.ops.aten.hardtanh_backward(dy, z, 0, 6),
    "leaky_relu": lambda dy, z, slope: torch.ops.aten.leaky_relu_backward(dy, z, slope, False),
    "hardswish": lambda dy, z, slope: torch.ops.aten.hardswish_backward(dy, z),
    # aten's backwards of these two have no derivative of their own.
    "silu": lambda dy, z, slope: dy * z.sigmoid() * (1 + z * (1 - z.sigmoid())),
    "hardsigmoid": lambda dy, z, slope: torch.where((z > -3) & (z < 3), dy / 6, 0),
}


def _setup_context(ctx, inputs, output):
    x, weight, scale, shift, *ctx.constants = inputs
    ctx.save_for_backward(x, weight, scale, shift)


def _has_fused_backward(x: Tensor) -> bool:
    return x.is_cuda or x.is_cpu


def _backward(ctx, dy):
    needs_x, *needs_others = ctx.needs_input_grad[:4]
    saved = ctx.saved_tensors  # asked for once: gradient checkpointing gives them once
    # The fused operator has no derivative of its own: where one is asked for (create_graph), what
    # follows is recorded, and plain PyTorch has derivatives of any order.
    if _has_fused_backward(saved[0]) and not torch.is_grad_enabled():
        dx, dweight, *sums = _dwconv_bn_act_backward(
            dy, *saved, *ctx.constants, needs_x, any(needs_others)
        )
        gradients = dx, registration.laid_out_as(dweight, saved[1]), *sums
        wanted = zip(gradients, ctx.needs_input_grad[:4], strict=True)
        return *(g if needed else None for g, needed in wanted), *(None,) * 5
    return _native_backward(ctx, dy, *saved)


def _native_backward(ctx, dy, x, weight, scale, shift):
    stride, padding, dilation, activation, slope = ctx.constants
    stride, dilation = list(_pair(stride)), list(_pair(dilation))
    top, left, bottom, right = _explicit_padding(x, weight, stride, padding, dilation)
    groups = x.shape[1]
    padded = F.pad(x, (left, right, top, bottom))
    conv = F.conv2d(padded, weight, None, stride, 0, dilation, groups)

    def per_channel(t: Tensor) -> Tensor:
        return t.to(conv.dtype).view(-1, 1, 1)

    z = conv if scale is None else conv * per_channel(scale)
    z = z if shift is None else z + per_channel(shift)
    dz = _ACTIVATION_BACKWARD[activation](dy, z, slope)
    dconv = dz if scale is None else dz * per_channel(scale)
    needs_x, needs_weight, needs_scale, needs_shift = ctx.needs_input_grad[:4]
    dx = dweight = None
    if needs_x or needs_weight:
        dpadded, dweight, _ = torch.ops.aten.convolution_backward(
            dconv, padded, weight, None, stride, [0, 0], dilation, False, [0, 0], groups,
            [needs_x, needs_weight, False],
        )  # fmt: skip
        if needs_x:
            dx = dpadded[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    dscale = (dz * conv).sum((0, 2, 3), dtype=scale.dtype) if needs_scale else None
    dshift = dz.sum((0, 2, 3), dtype=shift.dtype) if needs_shift else None
    return dx, dweight, dscale, dshift, None, None, None, None, None


torch.library.register_autograd(
    "mnet_kernels::dwconv_bn_act", _backward, setup_context=_setup_context
)


# ---- autocast, vmap ----
registration.register_autocast("dwconv_bn_act", _dwconv_bn_act, "cpu")
registration.register_autocast("dwconv_bn_act", _dwconv_bn_act, "cuda")
registration.register_autocast("conv_bn_act", _conv_bn_act, "cuda")
registration.register_vmap("dwconv_bn_act", _dwconv_bn_act)
