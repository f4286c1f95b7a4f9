"""separable_conv: a depthwise convolution and the 1x1 convolution after it, in one operator.

What it means: reference.py. Where a backend has no kernel for the pair, its dwconv_bn_act and a
1x1 convolution run one after the other; :func:`why_composed` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mnet_kernels import backends, ops, reference, registration
from mnet_kernels.registration import (
    SEPARABLE_IMAGES_AND_WEIGHTS,
    SEPARABLE_TENSORS,
    IntOrInts,
    explicit_padding,
    may_use_tf32,
    output_size,
    pair,
    same_device,
)

_OP = "separable_conv"
_check = torch.ops.mnet_kernels.check_separable_conv.default
_separable_conv = torch.ops.mnet_kernels.separable_conv.default


def separable_conv(
    x: Tensor,
    dw_weight: Tensor,
    dw_scale: Tensor | None,
    dw_shift: Tensor | None,
    pw_weight: Tensor,
    pw_scale: Tensor | None = None,
    pw_shift: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    dw_activation: str = "relu",
    pw_activation: str = "relu",
    slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """Depthwise + affine + activation, pointwise + affine + activation, ``+ residual``.

    ``y = pw_act(pw_scale * (pw_weight @ d) + pw_shift) + residual`` at every pixel, where ``d`` is
    :func:`mnet_kernels.dwconv_bn_act` of x, rounded to x's dtype; d never reaches memory. Sums are
    accumulated in float32 and rounded once. On a GPU both factors of a float32 product are rounded
    to TF32 where native may do so (``torch.backends.cudnn.allow_tf32``).

    Args:
        x: ``(N, C, H, W)``; float32 or bfloat16 on the CPU in one pass, channels_last as it is and
            any other layout through a copy; other dtypes one after the other.
        dw_weight: ``(C*M, 1, Kh, Kw)``, x's dtype.
        dw_scale, dw_shift: ``(C*M,)`` float32 (float64 for float64 x), or None for 1 and 0.
        pw_weight: ``(K, C*M, 1, 1)``, x's dtype. On the CPU it is packed at every call; a
            :class:`mnet_kernels.SeparableConv` or a swapped model packs it once.
        pw_scale, pw_shift: ``(K,)``, likewise.
        residual: ``(N, K, OH, OW)``, x's dtype, added after the activation.
        stride, padding, dilation: the depthwise half's, as for dwconv_bn_act.
        dw_activation, pw_activation: as for dwconv_bn_act; ``slope`` is leaky_relu's in both.
        backend: one of ``backends.NAMES``, or None for the best one that can serve x.

    Returns:
        ``(N, K, OH, OW)``, x's dtype and layout.

    Raises:
        RuntimeError: an argument is wrong; the message names operator, argument, expected and
            actual. Nothing has run by then.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{_OP}: x: expected a Tensor, got {type(x).__name__}")
    chosen = backends.select(_OP, backend, x.device, x.dtype)
    if padding == "same":
        padding = ()
    if torch.compiler.is_compiling():
        stride, padding, dilation = map(ops._static, (stride, padding, dilation))
    args = (
        x, dw_weight, dw_scale, dw_shift, pw_weight, pw_scale, pw_shift, residual,
        stride, padding, dilation, dw_activation, pw_activation, slope,
    )  # fmt: skip
    if chosen == "native":
        return _native(*args)
    if _reason(chosen, x.dtype) is None:
        # Triton's operator asks by itself.
        more = {"tf32": may_use_tf32()} if chosen == "cuda" and x.dtype == torch.float32 else {}
        return _operator(chosen)(*args, **more)
    _check(*args)
    return _composed(chosen, *args)


def why_composed(
    device: torch.device | str, dtype: torch.dtype, backend: str | None = None
) -> str | None:
    """The sentence why a call runs its halves one after the other; None where it is one pass.

    Args:
        device, dtype: x's.
        backend: as for :func:`separable_conv`.

    Raises:
        RuntimeError: the backend cannot serve such a call at all.
    """
    chosen = backends.select(_OP, backend, torch.device(device), dtype)
    return "the native backend is plain PyTorch" if chosen == "native" else _reason(chosen, dtype)


@torch.compiler.assume_constant_result
def _reason(chosen: str, dtype: torch.dtype) -> str | None:
    name = str(dtype).removeprefix("torch.")
    if chosen == "cpu" and dtype not in (torch.float32, torch.bfloat16):
        return f"the cpu backend's {_OP} serves float32 and bfloat16, not {name}"
    if chosen == "cpu" and not ops.packs(dtype):
        return f"this processor's matrix tiles make PyTorch's own {name} product faster"
    if chosen in ("cuda", "triton") and not backends.has_kernel(_OP, chosen):
        return f"the {chosen} backend has no {_OP}"
    return None


def _operator(chosen: str) -> Callable[..., Tensor]:
    return backends.triton_operator(_OP) if chosen == "triton" else _separable_conv


def _native(*args: Any) -> Tensor:
    tensors, (stride, _, dilation, dw_activation, pw_activation, slope) = (
        args[: SEPARABLE_TENSORS - 1], args[SEPARABLE_TENSORS:],
    )  # fmt: skip
    _, _, *padding = _check(*args)
    return reference.separable_conv(
        *tensors, residual=args[SEPARABLE_TENSORS - 1], stride=pair(stride), padding=padding,
        dilation=pair(dilation), dw_activation=dw_activation, pw_activation=pw_activation,
        slope=slope,
    )  # fmt: skip


def _composed(backend: str | None, *args: Any) -> Tensor:
    """The halves one after the other, differentiable to any order."""
    x, dw_weight, dw_scale, dw_shift, pw_weight, pw_scale, pw_shift, residual, *constants = args
    stride, padding, dilation, dw_activation, pw_activation, slope, *_ = constants
    middle = ops.dwconv_bn_act(
        x, dw_weight, dw_scale, dw_shift, stride=stride, padding=padding or "same",
        dilation=dilation, activation=dw_activation, slope=slope, backend=backend,
    )  # fmt: skip
    y = ops.conv_bn_act(
        middle, pw_weight, pw_scale, pw_shift, activation=pw_activation, slope=slope,
        backend=backend,
    )  # fmt: skip
    return y if residual is None else y + residual


# ---- torch.compile, torch.export ----
@torch.library.register_fake("mnet_kernels::separable_conv")
def _fake(*args):
    x, pw_weight = args[0], args[4]
    size = _check_fake(*args)[:2]
    y = x.new_empty((x.shape[0], pw_weight.shape[0], *size))
    return y.to(memory_format=registration.layout_of(x))


@torch.library.register_fake("mnet_kernels::check_separable_conv")
def _check_fake(
    x, dw_weight, dw_scale, dw_shift, pw_weight, pw_scale, pw_shift, residual,
    stride, padding, dilation, *activations_and_slope,
):  # fmt: skip
    same_device(
        _OP, x, dw_weight=dw_weight, dw_scale=dw_scale, dw_shift=dw_shift, pw_weight=pw_weight,
        pw_scale=pw_scale, pw_shift=pw_shift, residual=residual,
    )  # fmt: skip
    edges = explicit_padding(x, dw_weight, pair(stride), padding, pair(dilation))
    return [*output_size(x, dw_weight, stride, edges, dilation), *edges]


# ---- autograd: frozen statistics, everything in between is computed anew ----
def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:SEPARABLE_TENSORS])
    ctx.constants = inputs[SEPARABLE_TENSORS:]


def _backward(ctx, dy):
    return registration.gradients_of(
        lambda *tensors: _composed(None, *tensors, *ctx.constants), ctx, dy
    )


torch.library.register_autograd(
    "mnet_kernels::separable_conv", _backward, setup_context=_setup_context
)


# ---- autocast, vmap ----
for _device in ("cpu", "cuda"):
    registration.register_autocast(_OP, _separable_conv, _device, SEPARABLE_IMAGES_AND_WEIGHTS)


@torch.library.register_vmap("mnet_kernels::separable_conv")
def _vmap(info, in_dims, *args):
    """Where only images are batched: more images. Otherwise call by call."""
    images = {0, 7}
    if not any(type(d) is int for i, d in enumerate(in_dims) if i not in images):

        def flat(a: Tensor, d: int | None) -> Tensor:
            rows = a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
            return rows.flatten(0, 1)

        y = _separable_conv(
            *(
                flat(a, d) if i in images and a is not None else a
                for i, (a, d) in enumerate(zip(args, in_dims, strict=True))
            )
        )
        return y.unflatten(0, (info.batch_size, -1)), 0
    return registration.call_by_call(_separable_conv, info, in_dims, args)
