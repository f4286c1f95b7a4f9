"""What a normalisation with fixed statistics comes to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def fold(dtype: torch.dtype, bias: Tensor | None, norm: Any) -> tuple[Tensor | None, Tensor | None]:
    """What a norm with fixed statistics and a bias come to.

    Args:
        dtype: the input's; scale and shift are float32, or float64 where it is.
        bias: the convolution's, ``(C,)`` or None.
        norm: with ``running_mean``, ``running_var``, ``eps``, and perhaps ``weight``, ``bias``.

    Returns:
        (scale, shift), ``(C,)`` each: ``norm(conv(x) + bias) = conv(x) * scale + shift``.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if norm is None:
        return None, None if bias is None else bias.to(wide)
    mean, var, gamma, beta = statistics_of(norm)
    scale = torch.rsqrt(var.to(wide) + norm.eps)
    mean = mean.to(wide)
    if gamma is not None:
        scale = scale * gamma.to(wide)
    if bias is not None:
        mean = mean - bias.to(wide)
    shift = -mean * scale if beta is None else torch.addcmul(beta.to(wide), mean, scale, value=-1)
    return scale, shift


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """``weight`` ``(C, ...)`` times ``scale`` ``(C,)``, in weight's dtype."""
    if scale is None:
        return weight
    return (weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def statistics_of(norm: nn.Module) -> tuple[Any, ...]:
    """(mean, var, weight, bias), past nn.Module's attribute search, which costs a microsecond."""
    buffers, parameters = norm._buffers, norm._parameters
    return (
        buffers["running_mean"],
        buffers["running_var"],
        parameters.get("weight", buffers.get("weight")),
        parameters.get("bias", buffers.get("bias")),
    )
