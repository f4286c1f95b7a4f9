"""A convolution and its norm while the norm uses the batch's own statistics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mnet_kernels.conv_training import conv_bn_act_training, conv_patches
from mnet_kernels.dwconv_training import dwconv_bn_act_training
from mnet_kernels.nn.fold import statistics_of

if TYPE_CHECKING:
    from mnet_kernels.nn.fused import FusedConv2d


def run(conv: FusedConv2d, x: Tensor, weight: Tensor, depthwise: bool) -> Tensor | None:
    """``act(norm(conv(pad(x))))`` in one operator, the norm's state updated as the norm does it;
    None where that is left to the modules.

    Args:
        conv: depthwise, or one that has no :func:`why_not_dense`; with a norm that
            :meth:`FusedConv2d.uses_batch_statistics`.
        weight: its weight in x's dtype.
    """
    if not depthwise:
        if not _is_pointwise(conv) and x.requires_grad and torch.is_grad_enabled():
            return None  # native is faster where pictures have a gradient
        if conv.fusion.free_layout:
            x = x.contiguous(memory_format=torch.channels_last)  # the layout of the fast paths
        elif x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return None  # the next module may ask for this layout
    if x.numel() == 0 or (x.shape[0] == 1 and conv.output_size(x) == [1, 1]):
        return None  # the norm has its own words for that
    fusion, bias = conv.fusion, conv._parameters["bias"]
    norm = cast(Any, fusion.norm)
    mean, var, gamma, beta = statistics_of(norm)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    given = [t for t in (mean, var, gamma, beta, bias) if t is not None]
    if any(t.dtype not in (wide, x.dtype) for t in given):
        return None  # whatever is wrong, it is the norm's own error
    if bias is not None and bias.requires_grad:
        # It cancels out: its gradient is zero, and not missing.
        nothing = bias.to(wide) * 0
        beta = nothing if beta is None else beta + nothing
    momentum = _count(norm)
    if norm.training and not norm.track_running_stats:
        mean = var = None
    running = [_as(t, wide) for t in (mean, var)]
    arguments = (x, weight, _as(gamma, wide), _as(beta, wide), *running)
    constants: dict[str, Any] = {
        "momentum": momentum,
        "eps": norm.eps,
        "activation": fusion.activation,
        "slope": fusion.slope,
    }
    if depthwise:
        y = dwconv_bn_act_training(
            *arguments,
            **constants,
            backend=fusion.backend,
            stride=conv.stride,
            padding="same" if fusion.pad == "same" else conv.padding_edges(),
            dilation=conv.dilation,
        )
    else:
        if not _is_pointwise(conv):
            arguments = (*_as_pointwise(conv, x, weight), *arguments[2:])
        y = conv_bn_act_training(*arguments, **constants)
    if mean is not None:
        with torch.no_grad():
            if bias is not None:
                running[0].add_(bias, alpha=momentum)
            for held, updated in zip((mean, var), running, strict=True):
                if held is not updated:
                    held.copy_(updated)
    return _seen_to_the_end(y)


def why_not_dense(conv: FusedConv2d, device: str, dtype: torch.dtype) -> str | None:
    """The sentence why a convolution that is not depthwise is native in training mode, or None."""
    if not (_is_pointwise(conv) or _is_first(conv)):
        kinds = "depthwise, plain 1x1 and small first ones"
        return f"convolutions but {kinds} are native in training mode"
    if conv.fusion.backend not in (None, "cpu") or not device.startswith("cpu"):
        return "convolutions not depthwise are native in training mode but on the CPU"
    if dtype != torch.float32:
        return "convolutions not depthwise are native in training mode but in float32"
    return None


def _is_pointwise(conv: FusedConv2d) -> bool:
    return (
        conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.fusion.pad in ("same", (0, 0, 0, 0))
        and not (isinstance(conv.padding, tuple) and any(conv.padding))
    )


def _is_first(conv: FusedConv2d) -> bool:
    """Whether it reads pictures, whose patches and the convolution's result take no more memory
    than what native keeps: the pictures, that result and the norm's."""
    taps = conv.in_channels * math.prod(conv.kernel_size)
    return (
        conv.in_channels <= 4
        and taps <= conv.out_channels + conv.in_channels * math.prod(conv.stride)
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
    )


def _as_pointwise(conv: FusedConv2d, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The patches that the convolution reads, ``(N, Kh*Kw*C, OH, OW)`` channels_last, and its
    weight as that of a 1x1 convolution of them."""
    patches = conv_patches(x, weight, conv.stride, conv._all_edges(x))
    return patches, weight.permute(0, 2, 3, 1).flatten(1)[:, :, None, None]


def _count(norm: Any) -> float:
    """Count the batch, and the weight of it in the running statistics, as nn.BatchNorm2d does."""
    if norm.training and norm.track_running_stats:
        counter = norm._buffers.get("num_batches_tracked")
        if counter is not None:
            counter.add_(1)
            if norm.momentum is None:
                return 1.0 / float(counter)
    return 0.0 if norm.momentum is None else norm.momentum


def _as(t: Tensor | None, dtype: torch.dtype) -> Any:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def _seen_to_the_end(y: Tensor) -> Tensor:
    """``y``; under hooks for saved tensors, one more is saved.

    Gradient checkpointing runs a region again only up to the last tensor that it saved. Native
    saves some after the norm; so must we, for the running statistics to be updated again too.
    """
    if torch.compiler.is_compiling() or not y.requires_grad:
        return y
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return y
    return cast(Tensor, _SavesOne.apply(y))


class _SavesOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y.new_empty(0))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy
