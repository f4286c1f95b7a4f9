"""The Triton operators as torch sees them: autograd, autocast, vmap."""

from __future__ import annotations

import torch

from mnet_kernels import reference
from mnet_kernels.registration import (
    SEPARABLE_IMAGES_AND_WEIGHTS,
    SEPARABLE_TENSORS,
    call_by_call,
    explicit_padding,
    gradients_of,
    gradients_through,
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
    return gradients_of(lambda *tensors: _in_pytorch(1, tensors, ctx.constants), ctx, dy)


dwconv_bn_act_training.register_autograd(_training_backward, setup_context=_setup_training)
dwconv_bn_act.register_autograd(_backward, setup_context=_setup_context)
conv_bn_act.register_autograd(_dense_backward, setup_context=_setup_context)
register_vmap("dwconv_bn_act_triton", dwconv_bn_act)
register_vmap("conv_bn_act_triton", conv_bn_act)
for _device in ("cpu", "cuda"):
    register_autocast("conv_bn_act_triton", conv_bn_act, _device)
    register_autocast("dwconv_bn_act_triton", dwconv_bn_act, _device)
    register_autocast("dwconv_bn_act_training_triton", dwconv_bn_act_training, _device)


def _setup_separable(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:SEPARABLE_TENSORS])
    ctx.constants = inputs[SEPARABLE_TENSORS:]


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

    return gradients_of(halves, ctx, dy)


separable_conv.register_autograd(_separable_backward, setup_context=_setup_separable)


for _device in ("cpu", "cuda"):
    register_autocast(
        "separable_conv_triton", separable_conv, _device, SEPARABLE_IMAGES_AND_WEIGHTS
    )


@separable_conv.register_vmap
def _separable_vmap(info, in_dims, *call):
    return call_by_call(separable_conv, info, in_dims, call)
