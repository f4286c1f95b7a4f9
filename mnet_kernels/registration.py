"""What every operator's registration with torch shares, whatever its backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mnet_kernels import reference

IntOrInts = int | Sequence[int]

library = torch.library.Library("mnet_kernels", "FRAGMENT")

#: Of separable_conv's arguments: how many tensors come first, and which are images and weights.
SEPARABLE_TENSORS, SEPARABLE_IMAGES_AND_WEIGHTS = 8, (0, 1, 4, 7)


def pair(value: IntOrInts) -> tuple[int, int]:
    """(h, w) of a stride or dilation as the operators take it."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def explicit_padding(x, weight, stride, padding, dilation) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of padding as the operators take it; () is "same"."""
    if len(padding) == 0:
        return reference.same_padding(x.shape[2:], weight.shape[2:], stride, dilation)
    top, left = padding[0], padding[1 % len(padding)]
    return (top, left, top, left) if len(padding) < 4 else tuple(padding)


@torch.compiler.assume_constant_result
def may_use_tf32() -> bool:
    """Whether float32 convolutions on a GPU may multiply as TF32: cuDNN's flag, which native's
    follow. A compiled graph keeps what it was when it was compiled."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def output_size(x, weight, stride, pad, dilation) -> list[int]:
    """(OH, OW) for explicit padding."""
    top, left, bottom, right = pad
    size = []
    for n, k, s, d, total in zip(
        x.shape[2:], weight.shape[2:], pair(stride), pair(dilation),
        (top + bottom, left + right), strict=True,
    ):  # fmt: skip
        room = n + total - (k - 1) * d - 1
        torch._check(room >= 0, lambda: "the padded size of x is below that of the dilated kernel")
        size.append(room // s + 1)
    return size


def same_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raises RuntimeError, naming the argument, where one is not on x's device."""
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise RuntimeError(f"{op}: {name}: expected x's device {x.device}, got {t.device}")


def layout_of(x: Tensor) -> torch.memory_format:
    """The output's layout; csrc/tensor.h (layout_of) says the same."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) == 1:
        return torch.channels_last
    return torch.contiguous_format


def laid_out_as(gradient: Tensor, t: Tensor) -> Tensor:
    """A contiguous gradient with t's strides where they differ in dimensions of size 1 alone, as
    those of a channels_last depthwise weight do: DistributedDataParallel would warn of them."""
    if gradient.stride() == t.stride() or gradient.shape != t.shape or not t.is_contiguous():
        return gradient
    return gradient.as_strided(t.shape, t.stride())


def gradients_through(y: Tensor, dy: Tensor, tensors, wanted, again: bool) -> list[Tensor | None]:
    """The gradients of those `tensors` that are `wanted`, None for the others: dy, taken back
    through the graph of y. again: they can be differentiated again."""
    inputs = [t for t, w in zip(tensors, wanted, strict=True) if w]
    gradients = iter(torch.autograd.grad(y, inputs, dy, create_graph=again))
    return [next(gradients) if w else None for w in wanted]


def training_gradients(dy: Tensor, tensors, constants, wanted) -> list[Tensor | None]:
    """The gradients of dwconv_bn_act_training's x, weight, gamma and beta, where `wanted`: in plain
    PyTorch, which has derivatives of any order."""
    stride, padding, dilation, activation, slope, eps = constants
    stride, dilation = pair(stride), pair(dilation)
    padding = explicit_padding(tensors[0], tensors[1], stride, padding, dilation)
    y = reference.dwconv_bn_act_training(
        *tensors, eps=eps, stride=stride, padding=padding, dilation=dilation,
        activation=activation, slope=slope,
    )  # fmt: skip
    return gradients_through(y, dy, tensors, wanted, True)


def gradients_of(function: Callable[..., Tensor], ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """A backward: of the tensors that ctx saved, the gradients of ``function`` of them, which is
    computed again. None for the constants that come after them."""
    again = torch.is_grad_enabled()  # gradients of gradients are asked for
    tensors = ctx.saved_tensors  # asked for once: gradient checkpointing gives them once
    wanted = ctx.needs_input_grad[: len(tensors)]
    if not again:
        tensors = [
            t if t is None else t.detach().requires_grad_(w)
            for t, w in zip(tensors, wanted, strict=True)
        ]
    with torch.enable_grad():
        y = function(*tensors)
    return *gradients_through(y, dy, tensors, wanted, again), *[None] * len(ctx.constants)


def register_autocast(
    name: str, operator: Callable, device_type: str, cast: Sequence[int] = (0, 1)
) -> None:
    """The arguments at the positions ``cast``, images and weights, are cast as native convolution's
    are; scale and shift stay float32."""

    def autocast(*given):
        dtype, args = torch.get_autocast_dtype(device_type), list(given)
        for i in cast:
            t = args[i]
            if t is not None and t.is_floating_point() and t.dtype != torch.float64:
                args[i] = t.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return operator(*args)

    library.impl(name, autocast, f"Autocast{device_type.upper()}")


def call_by_call(operator: Callable, info, in_dims, args) -> tuple[Tensor, int]:
    """A vmap: one call after the other."""
    rows = [
        operator(
            *(a.select(d, i) if type(d) is int else a for a, d in zip(args, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    return torch.stack(rows), 0


def register_vmap(name: str, operator: Callable) -> None:
    """Where only x is batched: more images. Otherwise call by call."""

    def vmap(info, in_dims, x, *others):
        if in_dims[1:4] != (None, None, None):  # weight, scale, shift
            return call_by_call(operator, info, in_dims, (x, *others))
        stacked = x.movedim(in_dims[0], 0)
        y = operator(stacked.flatten(0, 1), *others)
        return y.unflatten(0, stacked.shape[:2]), 0

    torch.library.register_vmap(f"mnet_kernels::{name}", vmap)
