"""Depthwise convolution, BatchNorm with the batch's own statistics and activation: the operator
of training, its fake kernels, autograd, autocast and vmap.

Besides its inputs, backward keeps one mean and one variance a channel: the convolution's output
and the activation's mask are computed again. On the CPU the former is kept in float32 where
strides make it small beside the input. What the operator means: reference.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mnet_kernels import backends, batch_statistics, ops, reference, registration
from mnet_kernels.registration import IntOrInts, explicit_padding, pair

_OP = "dwconv_bn_act_training"
_training = torch.ops.mnet_kernels.dwconv_bn_act_training.default
_training_backward = torch.ops.mnet_kernels.dwconv_bn_act_training_backward.default
_check = torch.ops.mnet_kernels.check_conv.default


def dwconv_bn_act_training(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    activation: str = "relu",
    slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """Depthwise convolution, BatchNorm in training mode and activation, for x and its gradients.

    ``y = act(gamma[k] * (conv - mean[k]) * rsqrt(var[k] + eps) + beta[k])`` with the mean and the
    biased variance of ``conv = depthwise(x, weight)`` over N, OH and OW, as
    ``torch.nn.BatchNorm2d`` in training (Ioffe and Szegedy, 2015, arXiv 1502.03167).

    Args:
        x: ``(N, C, H, W)``; float32, float16, bfloat16 or (on the CPU) float64; layouts as for
            :func:`mnet_kernels.dwconv_bn_act`.
        weight: ``(C*M, 1, Kh, Kw)`` with depth multiplier M >= 1; x's dtype, any strides.
        gamma, beta: ``(C*M,)`` float32 (float64 for float64 x), or None for 1 and 0.
        running_mean, running_var: ``(C*M,)`` of gamma's dtype, or both None. Updated in place:
            ``running = (1 - momentum) * running + momentum * batch``, the variance unbiased.
        momentum: the weight of this batch in the running statistics.
        eps: added to the variance.
        stride, padding, dilation, activation, slope, backend: as for
            :func:`mnet_kernels.dwconv_bn_act`.

    Returns:
        ``(N, C*M, OH, OW)``, x's dtype and layout; differentiable in x, weight, gamma and beta.
        Second derivatives are plain PyTorch's.

    Raises:
        RuntimeError: an argument is wrong (one value a channel has no variance); the message names
            operator, argument, expected and actual. Nothing has run or changed by then.
    """
    if padding == "same":
        padding = ()
    if torch.compiler.is_compiling():
        stride, padding, dilation = map(ops._static, (stride, padding, dilation))
    chosen = _select(backend, x)
    constants = (stride, padding, dilation, activation, slope)
    try:
        batch_statistics.check(_OP, x, weight, running_mean, running_var, momentum)
    except RuntimeError:  # x and weight come first
        _check(_OP, x, weight, None, None, stride, padding, dilation, 0, activation, slope)
        raise
    if chosen == "native":
        return _native(x, weight, gamma, beta, running_mean, running_var, momentum, eps, *constants)
    if chosen == "triton":
        operator = backends.triton_operator("dwconv_bn_act_training")
    else:
        eager = not torch.compiler.is_compiling() and batch_statistics.records_plainly(
            x, weight, gamma, beta
        )
        operator = _Eager.apply if eager else _training
    y, *_, mean, var = operator(x, weight, gamma, beta, *constants, eps)
    batch_statistics.update(
        running_mean, running_var, mean, var, momentum, batch_statistics.values(y)
    )
    return y


def _select(backend: str | None, x: Tensor) -> str:
    if backend is None and type(x) is Tensor and x.is_cpu and backends.has_kernel(_OP, "cpu"):
        return "cpu"
    chosen = ops._select(_OP, backend, x)
    if chosen in ("cpu", "cuda") and not backends.has_kernel(_OP, chosen):
        if backend is not None:
            raise RuntimeError(
                f"{_OP}: backend: expected one that can serve x, got {backend!r}: "
                "it was built without this operator"
            )
        backends._warn_native(_OP, x.device.type)
        return "native"
    return chosen


def _native(x, weight, gamma, beta, running_mean, running_var, momentum, eps, *constants) -> Tensor:
    """Plain PyTorch behind the same checks."""
    stride, padding, dilation, activation, slope = constants
    out_h, out_w, *explicit = _check(
        _OP, x, weight, None, None, stride, padding, dilation, 0, activation, slope
    )
    for name, t in (("gamma", gamma), ("beta", beta)):
        if t is not None:
            batch_statistics.check_channels(_OP, name, t, x, weight)
    if not (math.isfinite(eps) and eps >= 0):
        raise RuntimeError(f"{_OP}: eps: expected a finite number, at least 0, got {eps}")
    if x.shape[0] * out_h * out_w == 1:
        raise RuntimeError(
            f"{_OP}: x: expected more than one value a channel in training, "
            f"got an output of shape (1, {weight.shape[0]}, 1, 1)"
        )
    return reference.dwconv_bn_act_training(
        x, weight, gamma, beta, running_mean, running_var, momentum=momentum, eps=eps,
        stride=pair(stride), padding=explicit, dilation=pair(dilation), activation=activation,
        slope=slope,
    )  # fmt: skip


# ---- torch.compile, torch.export ----
@torch.library.register_fake(f"mnet_kernels::{_OP}")
def _fake(x, weight, gamma, beta, stride, padding, dilation, activation, slope, eps):
    registration.same_device(_OP, x, weight=weight, gamma=gamma, beta=beta)
    pad = explicit_padding(x, weight, pair(stride), padding, pair(dilation))
    out_h, out_w = ops._output_size(x, weight, stride, pad, dilation)
    y, z = (
        x.new_empty((x.shape[0], weight.shape[0], out_h, out_w)).to(
            memory_format=registration.layout_of(x)
        )
        for _ in range(2)
    )
    mean, var = (batch_statistics.per_channel(x, weight.shape[0]) for _ in range(2))
    return y, z if _keeps_convolution(x, stride) else x.new_empty(0), mean, var


def _keeps_convolution(x: Tensor, stride: IntOrInts) -> bool:
    """Whether the CPU keeps the convolution for backward; csrc/cpu/dwconv_training.cpp says the
    same, and why."""
    small = math.prod(pair(stride)) >= 4 and x.shape[2] * x.shape[3] > 1
    return small and x.dtype == torch.float32 and x.device.type == "cpu"


@torch.library.register_fake(f"mnet_kernels::{_OP}_backward")
def _backward_fake(dy, x, z, weight, gamma, beta, mean, var, *constants_and_wanted):
    *_, data, sums = constants_and_wanted
    others = {"dy": dy, "weight": weight, "gamma": gamma, "beta": beta, "mean": mean, "var": var}
    registration.same_device(f"{_OP}_backward", x, **others)
    layout = registration.layout_of(x)
    dx = x.new_empty(x.shape).to(memory_format=layout) if data else x.new_empty(0)
    dweight = x.new_empty(weight.shape if sums else 0)
    dgamma, dbeta = (
        batch_statistics.per_channel(x, weight.shape[0] if sums else 0) for _ in range(2)
    )
    return dx, dweight, dgamma, dbeta


# ---- autograd ----
def _setup_context(ctx, inputs, output):
    x, weight, gamma, beta, *ctx.constants = inputs
    _, z, mean, var = output
    ctx.mark_non_differentiable(z, mean, var)
    ctx.save_for_backward(x, weight, gamma, beta, z, mean, var)


def _backward(ctx, dy, dz, dmean, dvar):
    if dy is None:
        return (None,) * 10
    wanted = ctx.needs_input_grad[:4]
    x, weight, gamma, beta, z, mean, var = ctx.saved_tensors  # asked for once
    if torch.is_grad_enabled():  # gradients of gradients are asked for
        tensors = (x, weight, gamma, beta)
        gradients = registration.training_gradients(dy, tensors, ctx.constants, wanted)
    else:
        needs_x, *needs_others = wanted
        dx, dweight, *sums = _training_backward(
            dy, x, z, weight, gamma, beta, mean, var, *ctx.constants, needs_x, any(needs_others)
        )
        gradients = [dx, registration.laid_out_as(dweight, weight), *sums]
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *(None,) * 6


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


# ---- autocast, vmap ----
registration.register_autocast(_OP, _training, "cpu")
registration.register_autocast(_OP, _training, "cuda")


def _vmap(info, in_dims, x, weight, gamma, beta, *constants):
    """Call by call: every one has statistics of its own."""
    tensors = (x, weight, gamma, beta)
    rows = [
        _training(
            *(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=False)),
            *constants,
        )
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(outputs) for outputs in zip(*rows, strict=True)), (0,) * 4


torch.library.register_vmap(f"mnet_kernels::{_OP}", _vmap)
