"""1x1 convolution, BatchNorm with the batch's own statistics and activation, in training: on the
CPU, float32, channels_last.

Besides its inputs, backward keeps the convolution's output and one mean and one variance a channel;
native keeps the norm's output too. The gradient of the convolution's output goes to both matrix
products of backward without having been written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mnet_kernels import batch_statistics, reference, registration

_OP = "conv_bn_act_training"
_training = torch.ops.mnet_kernels.conv_bn_act_training.default
_training_backward = torch.ops.mnet_kernels.conv_bn_act_training_backward.default
_patches = torch.ops.mnet_kernels.conv_patches.default


def conv_bn_act_training(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    slope: float = 0.01,
) -> Tensor:
    """1x1 convolution, BatchNorm in training mode and activation, for x and its gradients.

    ``y = act(gamma[k] * (conv - mean[k]) * rsqrt(var[k] + eps) + beta[k])`` with the mean and the
    biased variance of ``conv = conv2d(x, weight)`` over N, H and W, as ``torch.nn.BatchNorm2d`` in
    training (Ioffe and Szegedy, 2015, arXiv 1502.03167).

    Args:
        x: ``(N, C_in, H, W)`` float32 on the CPU; channels_last, other layouts are copied.
        weight: ``(C_out, C_in, 1, 1)`` float32, any strides.
        gamma, beta: ``(C_out,)`` float32, or None for 1 and 0.
        running_mean, running_var, momentum, eps, activation, slope: as for
            :func:`mnet_kernels.dwconv_bn_act_training`.

    Returns:
        ``(N, C_out, H, W)`` float32, channels_last; differentiable in x, weight, gamma and beta.
        Second derivatives are plain PyTorch's.

    Raises:
        RuntimeError: an argument is wrong; the message names operator, argument, expected and
            actual. Nothing has run or changed by then.
    """
    if x.dtype != torch.float32 or not x.is_cpu:
        dtype = str(x.dtype).removeprefix("torch.")
        raise RuntimeError(f"{_OP}: x: expected float32 on the CPU, got {dtype} on {x.device}")
    batch_statistics.check(_OP, x, weight, running_mean, running_var, momentum)
    tensors = (x, weight, gamma, beta)
    eager = not torch.compiler.is_compiling() and batch_statistics.records_plainly(*tensors)
    operator = _Eager.apply if eager else _training
    y, _, mean, var = operator(*tensors, activation, slope, eps)
    batch_statistics.update(
        running_mean, running_var, mean, var, momentum, batch_statistics.values(y)
    )
    return y


def conv_patches(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """The rows that a convolution multiplies: with them it is a 1x1 one. No gradient of x.

    Args:
        x: ``(N, C, H, W)`` float32 on the CPU.
        weight: ``(K, C, Kh, Kw)`` float32, of which only the shape counts.
        stride: (h, w); padding: (top, left, bottom, right).

    Returns:
        ``(N, Kh*Kw*C, OH, OW)`` float32, channels_last; the weight belonging to it is
        ``(K, Kh*Kw*C, 1, 1)``, C last.

    Raises:
        RuntimeError: as for :func:`conv_bn_act_training`.
    """
    return _patches(x.detach(), weight.detach(), stride, padding)


# ---- torch.compile, torch.export ----
@torch.library.register_fake("mnet_kernels::conv_patches")
def _patches_fake(x, weight, stride, padding):
    registration.same_device("conv_patches", x, weight=weight)
    n, _, h, w = x.shape
    _, c, kh, kw = weight.shape
    top, left, bottom, right = padding
    sizes = (h + top + bottom - kh) // stride[0] + 1, (w + left + right - kw) // stride[1] + 1
    return x.new_empty((n, kh * kw * c, *sizes)).to(memory_format=torch.channels_last)


@torch.library.register_fake(f"mnet_kernels::{_OP}")
def _fake(x, weight, gamma, beta, activation, slope, eps):
    registration.same_device(_OP, x, weight=weight, gamma=gamma, beta=beta)
    n, _, h, w = x.shape
    y, z = (
        x.new_empty((n, weight.shape[0], h, w)).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    mean, var = (batch_statistics.per_channel(x, weight.shape[0]) for _ in range(2))
    return y, z, mean, var


@torch.library.register_fake(f"mnet_kernels::{_OP}_backward")
def _backward_fake(dy, x, z, weight, gamma, beta, mean, var, *constants_and_wanted):
    *_, data, _sums = constants_and_wanted
    dx = x.new_empty(x.shape).to(memory_format=torch.channels_last) if data else x.new_empty(0)
    dweight = registration.laid_out_as(x.new_empty(weight.shape), weight)
    dgamma, dbeta = (batch_statistics.per_channel(x, weight.shape[0]) for _ in range(2))
    return dx, dweight, dgamma, dbeta


# ---- autograd ----
def _setup_context(ctx, inputs, output):
    x, weight, gamma, beta, *ctx.constants = inputs
    _, z, mean, var = output
    ctx.mark_non_differentiable(z, mean, var)
    ctx.save_for_backward(x, weight, gamma, beta, z, mean, var)


def _backward(ctx, dy, dz, dmean, dvar):
    if dy is None:
        return (None,) * 7
    wanted = ctx.needs_input_grad[:4]
    x, weight, gamma, beta, z, mean, var = ctx.saved_tensors  # asked for once
    if torch.is_grad_enabled():  # gradients of gradients are asked for
        gradients = _differentiable_gradients(dy, (x, weight, gamma, beta), ctx.constants, wanted)
    else:
        gradients = _training_backward(
            dy, x, z, weight, gamma, beta, mean, var, *ctx.constants, wanted[0], any(wanted[1:])
        )
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *(None,) * 3


def _differentiable_gradients(dy, tensors, constants, wanted) -> list[Tensor | None]:
    """The gradients of x, weight, gamma and beta, where `wanted`: in plain PyTorch, which has
    derivatives of any order."""
    activation, slope, eps = constants
    x, weight, gamma, beta = tensors
    z = F.batch_norm(F.conv2d(x, weight), None, None, gamma, beta, True, 0.0, eps)
    y = reference.ACTIVATIONS[activation](z, slope)
    return registration.gradients_through(y, dy, tensors, wanted, True)


torch.library.register_autograd(f"mnet_kernels::{_OP}", _backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.set_materialize_grads(False)  # of z, mean and var
        with torch._C._AutoDispatchBelowAutograd():  # past register_autograd's Python
            output = _training(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)
