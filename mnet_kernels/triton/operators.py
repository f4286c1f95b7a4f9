"""The Triton operators as torch sees them: autograd, autocast, vmap."""

from __future__ import annotations

import torch

from mnet_kernels import reference
from mnet_kernels.registration import explicit_padding, pair, register_autocast, register_vmap
from mnet_kernels.triton.dwconv_bn_act import dwconv_bn_act
from mnet_kernels.triton.dwconv_bn_act_backward import dwconv_bn_act_backward

__all__ = ["dwconv_bn_act", "dwconv_bn_act_backward"]


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
    wanted = [t for t, n in zip(tensors, needed, strict=True) if n]
    gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(gradients) if n else None for n in needed]


dwconv_bn_act.register_autograd(_backward, setup_context=_setup_context)
register_vmap("dwconv_bn_act_triton", dwconv_bn_act)
for _device in ("cpu", "cuda"):
    register_autocast("dwconv_bn_act_triton", dwconv_bn_act, _device)
