"""dwconv_bn_act_training backward: the gradients of x, weight, gamma and beta.

    xhat = (conv - mean) / sqrt(var + eps);  z = gamma * xhat + beta;  y = act(z)
    dz = dy * act'(z);  dbeta = sum(dz);  dgamma = sum(dz * xhat)
    dconv = gamma / sqrt(var + eps) * (dz - dbeta / m - xhat * dgamma / m),  m pixels a channel

The passes are those of dwconv_bn_act_backward.py; the first runs once for the sums and once more,
with conv and dz computed again, for dconv. Nothing is kept from the forward but x, weight and the
vectors of one number a channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mnet_kernels.triton import arguments, launch
from mnet_kernels.triton.dwconv_bn_act_backward import (
    chunks_of,
    launch_conv,
    launch_data,
    launch_weight,
    partials,
)
from mnet_kernels.triton.dwconv_bn_act_training import CONSTANTS, MERGED
from mnet_kernels.triton.launch import wrap_triton
from mnet_kernels.triton.tile import channels, per_channel


@triton.jit(do_not_specialize=("CHUNKS", "COUNT"))
def _merge_gradients(
    partial_ptr,  # (CHUNKS, 2, K) float32: sums of dz * (conv - mean) and of dz
    gamma_ptr,  # (K,) float32 or None
    var_ptr,  # (K,) float32
    dgamma_ptr,  # (K,) float32
    dbeta_ptr,  # (K,) float32
    linear_ptr,  # (K,) float32
    constant_ptr,  # (K,) float32: dconv = scale * dz + linear * (conv - mean) + constant
    CHUNKS, COUNT, eps, K: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    k, k_exists = channels(tl.program_id(0), K, MERGED)
    dz_conv = tl.full((MERGED, MERGED), 0.0, tl.float32)
    dz = tl.full((MERGED, MERGED), 0.0, tl.float32)
    for first in range(0, CHUNKS, MERGED):
        chunk = (first + tl.arange(0, MERGED))[:, None]
        at = partial_ptr + chunk * (2 * K) + k
        mask = (chunk < CHUNKS) & k_exists
        dz_conv += tl.load(at, mask, other=0.0)
        dz += tl.load(at + K, mask, other=0.0)
    inverse = 1 / tl.sqrt_rn(tl.load(var_ptr + k, k_exists, other=1.0) + eps)
    scale = per_channel(gamma_ptr, k, k_exists, 1.0) * inverse
    dgamma = tl.sum(dz_conv, 0)[None, :] * inverse
    dbeta = tl.sum(dz, 0)[None, :]
    tl.store(dgamma_ptr + k, dgamma, k_exists)
    tl.store(dbeta_ptr + k, dbeta, k_exists)
    count = COUNT.to(tl.float32)
    tl.store(linear_ptr + k, -scale * inverse * dgamma / count, k_exists)
    tl.store(constant_ptr + k, -scale * dbeta / count, k_exists)


@launch.operator(
    "mnet_kernels::dwconv_bn_act_training_triton_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor mean, "
    f"Tensor var, {CONSTANTS}, bool data, bool sums) -> (Tensor, Tensor, Tensor, Tensor)",
)
def dwconv_bn_act_training_backward(
    dy, x, weight, gamma, beta, mean, var, stride, padding, dilation, activation, slope, eps,
    data, sums,
):  # fmt: skip
    """(dx, dweight, dgamma, dbeta); dx is empty without `data`, the others without `sums`."""
    dx, dweight, *vectors = _gradients(
        dy, x, weight, gamma, beta, mean, var, stride, padding, dilation, activation, slope, eps,
        data, sums,
    )  # fmt: skip
    if x.shape[0] == 0:
        return dx, dweight.zero_(), *(t.zero_() for t in vectors)
    dgamma, dbeta = vectors if sums else (torch.empty_like(mean) for _ in range(2))
    call = arguments.Depthwise(x, weight, dy, stride, padding, dilation)
    dy, x, taps = call.dense(dy), call.dense(x), call.taps(weight)
    gamma, beta = arguments.dense(gamma), arguments.dense(beta)
    K, chunks, count = dy.shape[1], chunks_of(dy), dy.numel() // dy.shape[1]
    scale = (var + eps).rsqrt()
    if gamma is not None:
        scale *= gamma
    partial = partials(dy, 2)
    launch_conv(
        call, dy, x, taps, (scale, beta, mean, None, None), None, partial, activation, slope
    )
    linear, constant = torch.empty_like(mean), torch.empty_like(mean)
    wrap_triton(_merge_gradients)[(arguments.cdiv(K, MERGED),)](
        partial, gamma, var, dgamma, dbeta, linear, constant, chunks, count, eps, K=K,
        MERGED=MERGED,
    )  # fmt: skip
    dconv = torch.empty_like(dy, memory_format=call.layout)
    launch_conv(
        call, dy, x, taps, (scale, beta, mean, linear, constant), dconv, None, activation, slope
    )
    if data:
        launch_data(call, dconv, taps, dx)
    if sums:
        launch_weight(call, dconv, x, dweight)
    return dx, dweight, *vectors


@dwconv_bn_act_training_backward.register_fake
def _gradients(
    dy, x, weight, gamma, beta, mean, var, stride, padding, dilation, activation, slope, eps,
    data, sums,
):  # fmt: skip
    """The results, uninitialised."""
    return (
        torch.empty_like(x, memory_format=arguments.layout_of(x)) if data else x.new_empty(0),
        weight.new_empty(weight.shape if sums else 0),
        mean.new_empty(mean.shape if sums else 0),
        mean.new_empty(mean.shape if sums else 0),
    )
