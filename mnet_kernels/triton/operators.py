"""The Triton operators as torch sees them: autograd, autocast, vmap."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mnet_kernels import reference
from mnet_kernels.registration import explicit_padding, pair, register_autocast, register_vmap
from mnet_kernels.triton.dwconv_bn_act import dwconv_bn_act
from mnet_kernels.triton.dwconv_bn_act_backward import dwconv_bn_act_backward
from mnet_kernels.triton.dwconv_bn_act_training import dwconv_bn_act_training
from mnet_kernels.triton.dwconv_bn_act_training_backward import dwconv_bn_act_training_backward

__all__ = [
    "dwconv_bn_act",
    "dwconv_bn_act_backward",
    "dwconv_bn_act_training",
    "dwconv_bn_act_training_backward",
]


def _setup_context(ctx, inputs, output):
    x, weight, scale, shift, *ctx.constants = inputs
    ctx.save_for_backward(x, weight, scale, shift)


def _backward(ctx, dy):
    tensors, constants, needed = ctx.saved_tensors, ctx.constants, ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():  # gradients of gradients are asked for
        gradients = _differentiable_gradients(dy, tensors, constants, needed)
    else:
        gradients = dwconv_bn_act_backward(dy, *tensors, *constants, list(needed))
    return *(g if n else None for g, n in zip(gradients, needed, strict=True)), *[None] * 5


def _differentiable_gradients(dy, tensors, constants, needed):
    stride, padding, dilation, activation, slope = constants
    stride, dilation = pair(stride), pair(dilation)
    padding = explicit_padding(tensors[0], tensors[1], stride, padding, dilation)
    y = reference.dwconv_bn_act(
        *tensors, stride=stride, padding=padding, dilation=dilation, activation=activation,
        slope=slope,
    )  # fmt: skip
    return _through(y, dy, tensors, needed)


def _through(y, dy, tensors, needed):
    """dy through the graph of y, so that what comes out can be differentiated again."""
    wanted = [t for t, n in zip(tensors, needed, strict=True) if n]
    gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(gradients) if n else None for n in needed]


def _setup_training(ctx, inputs, output):
    x, weight, gamma, beta, *ctx.constants = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, gamma, beta, mean, var)


def _training_backward(ctx, dy, *_):
    tensors, constants, needed = ctx.saved_tensors, ctx.constants, ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():
        gradients = _differentiable_training_gradients(dy, tensors[:4], constants, needed)
    else:
        gradients = dwconv_bn_act_training_backward(
            dy, *tensors, *constants, needed[0], any(needed[1:])
        )
    return *(g if n else None for g, n in zip(gradients, needed, strict=True)), *[None] * 6


def _differentiable_training_gradients(dy, tensors, constants, needed):
    x, weight, gamma, beta = tensors
    *conv, activation, slope, eps = constants
    stride, padding, dilation = pair(conv[0]), conv[1], pair(conv[2])
    padding = explicit_padding(x, weight, stride, padding, dilation)
    z = reference.dwconv_bn_act(
        x, weight, stride=stride, padding=padding, dilation=dilation, activation="identity"
    )
    z = F.batch_norm(z, None, None, gamma, beta, training=True, eps=eps)
    return _through(reference.ACTIVATIONS[activation](z, slope), dy, tensors, needed)


dwconv_bn_act_training.register_autograd(_training_backward, setup_context=_setup_training)
dwconv_bn_act.register_autograd(_backward, setup_context=_setup_context)
register_vmap("dwconv_bn_act_triton", dwconv_bn_act)
for _device in ("cpu", "cuda"):
    register_autocast("dwconv_bn_act_triton", dwconv_bn_act, _device)
    register_autocast("dwconv_bn_act_training_triton", dwconv_bn_act_training, _device)
