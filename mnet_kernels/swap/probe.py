"""What a module computes, found out by running it: which activation, which normalisation.

Nothing is recognised by its class's name. A copy of the module runs in float64 on values that
tell the candidates apart (both signs, the knees, huge, infinite, NaN), and counts as one of them
if it agrees everywhere.
"""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnet_kernels.reference import ACTIVATIONS, IDENTITY, Activation, same_padding

_Answer = TypeVar("_Answer")

_EDGES = [0.0, -0.0, 3.0, -3.0, 6.0, 1e-3, -1e-3, 1e4, -1e4, float("inf"), -float("inf")]
_NORM_PARAMETERS = {"weight", "bias"}
_NORM_BUFFERS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


@dataclass(frozen=True)
class Norm:
    """A normalisation ``activation(weight * (x - mean) / sqrt(var + eps) + bias)``."""

    activation: Activation
    #: In training mode it uses the batch's statistics instead.
    batch_statistics: bool
    #: Why it has to do that itself, where it is not just what nn.BatchNorm2d does.
    native_training: str | None = None
    #: Without running statistics it uses the batch's in eval mode too.
    keeps_statistics: bool = True


def activation_of(call: Callable[[Tensor], Tensor]) -> Activation | None:
    """Which activation a function is, or None if it is none of ours.

    ``identity`` means that the very tensor comes back. What draws random numbers is nothing.
    """
    probed = _probed(call)
    if probed is None:
        return None
    x, given, y = probed
    if y is given and torch.equal(y.nan_to_num(), x.nan_to_num()):
        return IDENTITY
    return _matching(x, y, names=[name for name in ACTIVATIONS if name != "identity"])


def is_sigmoid(call: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function is the sigmoid, which is no activation of ours, but gates end in it."""
    probed = _probed(call)
    return probed is not None and _close(probed[2], probed[0].sigmoid())


def _probed(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Values that tell functions apart, the copy that a function was given, and what it gave; None
    if it is no function of one tensor alone."""
    values = torch.tensor(
        [*_EDGES, float("nan"), -1.0, *torch.linspace(-9, 9, 51)], dtype=torch.float64
    )
    x = values.view(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    given = x.clone(memory_format=torch.preserve_format)
    try:
        y, drew = _run(call, given)
    except Exception:  # whatever it needs, it is not a function of one tensor
        return None
    return None if drew or not _same_kind(y, x) else (x, given, y)


def module_activation(module: nn.Module) -> Activation | None:
    """Which activation a module without state is, both in training and in eval mode."""
    return _in_both_modes(module, activation_of)


def module_is_sigmoid(module: nn.Module) -> bool:
    """Whether a module without state is the sigmoid, both in training and in eval mode."""
    return _in_both_modes(module, is_sigmoid) or False


def _in_both_modes(module: nn.Module, ask: Callable[[Any], _Answer]) -> _Answer | None:
    if any(True for _ in (*module.children(), *module.parameters(), *module.buffers())):
        return None
    try:
        module = copy.deepcopy(module)
    except Exception:
        return None
    found = ask(module.train())
    return found if found == ask(module.eval()) else None


def rests_in_eval(module: nn.Module) -> bool:
    """Whether a module without state hands its input on in eval mode."""
    if any(True for _ in (*module.children(), *module.parameters(), *module.buffers())):
        return False
    try:
        return activation_of(copy.deepcopy(module).eval()) == IDENTITY
    except Exception:
        return False


def pads_same(conv: nn.Conv2d) -> bool:
    """Whether a convolution with a forward of its own adds TensorFlow's "same" padding, and does
    nothing else beside convolving (timm's Conv2dSame): seen at sizes with every remainder, in both
    layouts."""
    if conv.padding not in ((0, 0), "valid") or conv.padding_mode != "zeros":
        return False
    extents = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    try:
        conv = copy.deepcopy(conv).to_empty(device="cpu").double()
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.normal_(generator=generator)
        for i in range(2 * max(*conv.stride, 3)):
            height, width = (max(1, n - 2 + i) for n in extents)
            x = torch.randn(
                (1, conv.in_channels, height, width + i % 2), dtype=torch.float64,
                generator=generator,
            )  # fmt: skip
            top, left, bottom, right = same_padding(
                x.shape[2:], conv.kernel_size, conv.stride, conv.dilation
            )
            expected = nn.Conv2d.forward(conv, F.pad(x, (left, right, top, bottom)))
            for mode, layout in itertools.product(
                (True, False), (torch.contiguous_format, torch.channels_last)
            ):
                y, drew = _run(conv.train(mode), x.clone(memory_format=layout))
                if drew or y.shape != expected.shape or not _close(y, expected):
                    return False
    except Exception:  # it is the model's own code
        return False
    return True


def is_norm_like(module: nn.Module) -> bool:
    """Has a place for running statistics of channels, and nothing beside an affine transform."""
    buffers = dict(module.named_buffers())
    if not _NORM_BUFFERS.issuperset(buffers) or any(
        name not in _NORM_PARAMETERS for name, _ in module.named_parameters()
    ):
        return False
    if not {"running_mean", "running_var"} <= module._buffers.keys():
        return False
    mean, var = module._buffers["running_mean"], module._buffers["running_var"]
    if mean is None or var is None:
        return mean is var and isinstance(getattr(module, "num_features", None), int)
    return mean.dim() == var.dim() == 1


def norm_of(module: nn.Module) -> Norm | str:
    """What a norm-like module computes, or the reason why it is nothing that can be folded."""
    eps = getattr(module, "eps", None)
    if not isinstance(eps, float):
        return "the norm has no attribute eps"
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator)

    keeps_statistics = module._buffers["running_mean"] is not None
    channels = (
        module.get_buffer("running_mean").numel()
        if keeps_statistics
        else cast(int, module.num_features)
    )
    x = uniform(-12, 12, 2, channels, 2, 4)
    x = x.contiguous(memory_format=torch.channels_last)  # it must take any layout
    finite = x.clone(memory_format=torch.preserve_format)
    if keeps_statistics:
        x[0, :, 0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")], dtype=x.dtype)
    try:
        module = copy.deepcopy(module).to_empty(device="cpu").double().eval()
        mean, var = uniform(-1, 1, channels), uniform(0.5, 2, channels)
        weight, bias = uniform(0.5, 2, channels), uniform(-1, 1, channels)
        given = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        values = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
        with torch.no_grad():
            for name, value in values.items():
                if name in given:
                    given[name].copy_(value)
            if "num_batches_tracked" in given:
                given["num_batches_tracked"].zero_()
        y, drew = _run(module, x.clone())
    except Exception as error:
        return f"the norm cannot be run on its own ({type(error).__name__})"
    if not keeps_statistics:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    z = (x - mean.view(-1, 1, 1)) * torch.rsqrt(var + eps).view(-1, 1, 1)
    if "weight" in given:
        z = z * weight.view(-1, 1, 1)
    if "bias" in given:
        z = z + bias.view(-1, 1, 1)
    activation = _matching(z, y, list(ACTIVATIONS)) if _same_kind(y, x) and not drew else None
    if activation is None:
        return "the norm computes something other than BatchNorm and a known activation"
    try:
        trained, _ = _run(copy.deepcopy(module).train(), x.clone())
        batch_statistics = not torch.equal(trained.nan_to_num(), y.nan_to_num())
    except Exception:
        batch_statistics = True
    batch_statistics = batch_statistics or not keeps_statistics
    why = _unlike_batch_norm(module, finite, activation) if batch_statistics else None
    return Norm(activation, batch_statistics, why, keeps_statistics)


def _unlike_batch_norm(module: Any, x: Tensor, activation: Activation) -> str | None:
    """Why a norm does something other than nn.BatchNorm2d in training, or None: what it returns,
    its running statistics and its counter after two batches are compared, with a momentum and
    without."""
    if _MANY & set(_names(type(module).forward.__code__)):
        return "the norm's forward talks to other processes"
    try:
        for momentum in (0.3, None):
            module = copy.deepcopy(module).train()
            twin = nn.BatchNorm2d(
                x.shape[1], module.eps, momentum, module._parameters.get("weight") is not None,
                module.track_running_stats,
            ).double()  # fmt: skip
            twin.load_state_dict(module.state_dict())
            module.momentum = momentum
            for batch in (x * 0.01, x.flip(0) * 2 + 1):
                expected = activation(twin(batch))
                torch.testing.assert_close(_run(module, batch.clone())[0], expected)
            torch.testing.assert_close(module.state_dict(), twin.state_dict())
    except Exception:
        return "the norm does not train as nn.BatchNorm2d does"
    return None


#: What a forward that takes statistics from several processes calls.
_MANY = {"distributed", "dist", "comm", "all_reduce", "all_gather", "get_world_size"}


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _run(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, bool]:
    """The result, and whether it took random numbers. The caller's generator is left as it was."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        y = call(x)
        return y, not torch.equal(before, torch.get_rng_state())


def _same_kind(y: object, x: Tensor) -> bool:
    return (
        isinstance(y, Tensor)
        and (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        and y.stride() == x.stride()
    )


def _matching(z: Tensor, y: Tensor, names: list[str]) -> Activation | None:
    """The activation among ``names`` that gives ``y`` for ``z``."""
    negative = (z > -2) & (z < -0.5)  # where a leaky_relu shows its slope
    slope = float((y[negative] / z[negative]).median())
    for name in names:
        if name == "leaky_relu" and not 0 < slope < 1:
            continue
        candidate = Activation(name, slope) if name == "leaky_relu" else Activation(name)
        if _close(y, candidate(z)):
            return candidate
    return None


def _close(y: Tensor, expected: Tensor) -> bool:
    return torch.allclose(y, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
