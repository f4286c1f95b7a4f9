"""What the operators that normalise by the batch's own statistics share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mnet_kernels import registration

_update = torch.ops.mnet_kernels.update_running_statistics.default


def values(y: Tensor) -> int:
    """Values a channel, of which a statistic is taken."""
    return y.shape[0] * y.shape[2] * y.shape[3]


def per_channel(x: Tensor, count: int) -> Tensor:
    """What holds one statistic a channel: float32, float64 for float64."""
    return x.new_empty(count, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def check(
    op: str,
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> None:
    """What the operators themselves do not see.

    Raises:
        RuntimeError: the sentences of csrc/problem.h.
    """
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise RuntimeError(f"{op}: {missing}: expected a Tensor beside the other one, got None")
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if t is not None:
            check_channels(op, name, t, x, weight)
    if not math.isfinite(momentum):
        raise RuntimeError(f"{op}: momentum: expected a finite number, got {momentum}")


def check_channels(op: str, name: str, t: Tensor, x: Tensor, weight: Tensor) -> None:
    """Raises RuntimeError where ``t``, the argument ``name``, does not hold one value an output
    channel, in the dtype of statistics, on x's device."""
    if t.dim() != 1 or t.shape[0] != weight.shape[0]:
        raise RuntimeError(
            f"{op}: {name}: expected shape ({weight.shape[0]},), one value an output channel, "
            f"got shape {tuple(t.shape)}"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if t.dtype != dtype:
        wanted, x_dtype, actual = (str(d).removeprefix("torch.") for d in (dtype, x.dtype, t.dtype))
        raise RuntimeError(f"{op}: {name}: expected {wanted} (x is {x_dtype}), got {actual}")
    registration.same_device(op, x, **{name: t})


def update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    count: int,
) -> None:
    """Running statistics in place, as nn.BatchNorm2d: ``var`` is biased, what is kept is not.

    Args:
        count: values a channel; without any nothing changes.
    """
    if running_mean is None or running_var is None or not count:
        return
    if running_mean.is_cpu and not (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    ):
        with torch.no_grad():
            _update(running_mean, running_var, mean, var, momentum, count)
        return
    with torch.no_grad():
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        unbiased = count / (count - 1)
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * unbiased)


def records_plainly(*tensors: Tensor | None) -> bool:
    """Whether an eager call has gradients to record and nothing else to do: then an
    autograd.Function around the operator saves the dispatcher's detour through Python, which costs
    as much as a small layer."""
    x = tensors[0]
    return (
        type(x) is Tensor
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._are_functorch_transforms_active()
        and any(t is not None and t.requires_grad for t in tensors)
    )


@torch.library.register_fake("mnet_kernels::update_running_statistics")
def _fake(running_mean, running_var, mean, var, momentum, count):
    """It returns nothing."""
