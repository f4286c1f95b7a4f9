"""The Triton operators as torch sees them: autograd, autocast, vmap."""

from __future__ import annotations

import torch

from mnet_kernels import reference
from mnet_kernels.registration import (
    explicit_padding,
    gradients_through,
    library,
    pair,
    register_autocast,
    register_vmap,
    training_gradients,
)
from mnet_kernels.triton.conv_bn_act import conv_bn_act
from mnet_kernels.triton.dwconv_bn_act import dwconv_bn_act
from mnet_kernels.triton.dwconv_bn_act_backward import dwconv_bn_act_backward
from mnet_kernels.triton.dwconv_bn_act_training import dwconv_bn_act_training
from mnet_kernels.triton.dwconv_bn_act_training_backward import dwconv_bn_act_training_backward
from mnet_kernels.triton.separable_conv import separable_conv

__all__ = [
    "conv_bn_act",
    "dwconv_bn_act",
    "dwconv_bn_act_backward",
    "dwconv_bn_act_training",
    "dwconv_bn_act_training_backward",
    "separable_conv",
]


def _setup_context(ctx, inputs, output):
    x, weight, scale, shift, *ctx.constants = inputs
    ctx.save_for_backward(x, weight, scale, shift)


def _backward(ctx, dy):
    tensors, constants, needed = ctx.saved_tensors, ctx.constants, ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():  # gradients of gradients are asked for
        y = _in_pytorch(tensors[0].shape[1], tensors, constants)
        gradients = gradients_through(y, dy, tensors, needed, True)
    else:
        gradients = dwconv_bn_act_backward(dy, *tensors, *constants, list(needed))
    return *(g if n else None for g, n in zip(gradients, needed, strict=True)), *[None] * 5


def _in_pytorch(groups, tensors, constants):
    stride, padding, dilation, activation, slope = constants
    stride, dilation = pair(stride), pair(dilation)
    padding = explicit_padding(tensors[0], tensors[1], stride, padding, dilation)
    return reference.conv_bn_act(
        *tensors, stride=stride, padding=padding, dilation=dilation, groups=groups,
        activation=activation, slope=slope,
    )  # fmt: skip


def _setup_training(ctx, inputs, output):
    x, weight, gamma, beta, *ctx.constants = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, gamma, beta, mean, var)


def _training_backward(ctx, dy, *_):
    tensors, constants, needed = ctx.saved_tensors, ctx.constants, ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():
        gradients = training_gradients(dy, tensors[:4], constants, needed)
    else:
        gradients = dwconv_bn_act_training_backward(
            dy, *tensors, *constants, needed[0], any(needed[1:])
        )
    return *(g if n else None for g, n in zip(gradients, needed, strict=True)), *[None] * 6


def _dense_backward(ctx, dy):
    return _gradients_of(lambda *tensors: _in_pytorch(1, tensors, ctx.constants), ctx, dy)


dwconv_bn_act_training.register_autograd(_training_backward, setup_context=_setup_training)
dwconv_bn_act.register_autograd(_backward, setup_context=_setup_context)
conv_bn_act.register_autograd(_dense_backward, setup_context=_setup_context)
register_vmap("dwconv_bn_act_triton", dwconv_bn_act)
register_vmap("conv_bn_act_triton", conv_bn_act)
for _device in ("cpu", "cuda"):
    register_autocast("conv_bn_act_triton", conv_bn_act, _device)
    register_autocast("dwconv_bn_act_triton", dwconv_bn_act, _device)
    register_autocast("dwconv_bn_act_training_triton", dwconv_bn_act_training, _device)


#: Tensors come first in separable_conv; of them, those of x's dtype.
_SEPARABLE_TENSORS, _SEPARABLE_IMAGES = 8, (0, 1, 4, 7)


def _setup_separable(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_SEPARABLE_TENSORS])
    ctx.constants = inputs[_SEPARABLE_TENSORS:]


def _separable_backward(ctx, dy):
    """Through the two halves one after the other."""
    *convolution, dw_activation, pw_activation, slope = ctx.constants

    def halves(x, dw_weight, dw_scale, dw_shift, pw_weight, pw_scale, pw_shift, residual):
        between = dwconv_bn_act(
            x, dw_weight, dw_scale, dw_shift, *convolution, dw_activation, slope
        )
        y = reference.conv_bn_act(
            between, pw_weight, pw_scale, pw_shift, activation=pw_activation, slope=slope
        )
        return y if residual is None else y + residual

    return _gradients_of(halves, ctx, dy)


def _gradients_of(function, ctx, dy):
    """Of the tensors that ctx saved, through function of them, computed again."""
    again = torch.is_grad_enabled()
    needed = ctx.needs_input_grad[: len(ctx.saved_tensors)]
    tensors = [
        t if t is None or again else t.detach().requires_grad_(n)
        for t, n in zip(ctx.saved_tensors, needed, strict=True)
    ]
    with torch.enable_grad():
        y = function(*tensors)
    return *gradients_through(y, dy, tensors, needed, again), *[None] * len(ctx.constants)


separable_conv.register_autograd(_separable_backward, setup_context=_setup_separable)


def _separable_autocast(device_type):
    def autocast(*call):
        """Images and weights are cast as native convolutions cast them; scales stay float32."""
        dtype = torch.get_autocast_dtype(device_type)
        cast = [
            t.to(dtype) if i in _SEPARABLE_IMAGES and t is not None else t
            for i, t in enumerate(call)
        ]
        with torch.autocast(device_type, enabled=False):
            return separable_conv(*cast)

    return autocast


for _device in ("cpu", "cuda"):
    library.impl(
        "separable_conv_triton", _separable_autocast(_device), f"Autocast{_device.upper()}"
    )


@separable_conv.register_vmap
def _separable_vmap(info, in_dims, *call):
    """Call by call."""
    rows = [
        separable_conv(
            *(t.select(d, i) if type(d) is int else t for t, d in zip(call, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    return torch.stack(rows), 0
