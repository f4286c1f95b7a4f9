"""Squeeze-and-excitation and global means inside a run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from networks import image, network, randomize
from test_sequences import both_dtypes, calls, finish, runs, unit  # noqa: F401
from torch import nn
from torchvision.ops import SqueezeExcitation

from mnet_kernels.swap import swap

conv_sequence = torch.ops.mnet_kernels.conv_sequence.default


class Gate(nn.Module):
    """Squeeze and excitation as timm writes it."""

    def __init__(self, channels, squeezed=5, act=nn.SiLU, gate=nn.Hardsigmoid):
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = act()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x):
        y = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(self.act(self.reduce(y))))


def gated(channels=20, gate=None):
    """What MobileNetV3's blocks are made of, between two other layers."""
    gate = gate or SqueezeExcitation(channels, 7, scale_activation=nn.Hardsigmoid)
    return [
        unit(3, channels, 3, padding=1, act=nn.Hardswish),
        nn.Sequential(
            unit(channels, channels, 5, channels, padding=2, act=nn.Hardswish),
            gate,
            unit(channels, 60, act=None),
        ),
        unit(60, 60, act=nn.ReLU),
    ]


def mean_error(y, exact):
    return (y.double() - exact).abs().mean()


def check_accuracy(model, fast, x):
    """Not further from float64 than native, beyond what rounding does to either."""
    with torch.no_grad():
        y, native = fast(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert y.shape == native.shape and y.dtype == native.dtype
    epsilon = torch.finfo(x.dtype).eps
    error, allowed = mean_error(y, exact), mean_error(native, exact)
    assert error <= 1.25 * allowed + epsilon / 2 * exact.abs().mean()


# ---- the operator's stages, on every instruction set -----------------------------------


def filled(rows):
    return torch.tensor(rows, dtype=torch.int64)


def pool(channels):
    return [4, channels, channels, *[1] * 6, *[0] * 5, -1, 0]


def scale(channels, other):
    return [5, channels, channels, *[1] * 6, *[0] * 5, other, 0]


SIGMOID = 6


def sigmoid(channels):
    return [SIGMOID, channels, channels, *[1] * 6, *[0] * 5, -1, 0]


@both_dtypes
@pytest.mark.parametrize("channels", [1, 3, 16, 31, 32, 64, 77, 130])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (13, 11), (40, 41)])
def test_mean_and_product(instruction_set, dtype, channels, size):
    x = (image(3, channels, *size) + 1).to(dtype).to(memory_format=torch.channels_last)
    nothing = torch.zeros(16)
    mean = conv_sequence(x, filled([pool(channels)]), nothing)
    exact = x.double().mean((2, 3), keepdim=True)
    assert mean.shape == exact.shape and mean.dtype == dtype
    # Sums of 16 values, of 16 such sums, and of those, in float32; rounded once to x's type.
    roundings = 16 + 16 + math.ceil(size[0] * size[1] / 256) + 1
    unit_roundoff = torch.finfo(torch.float32).eps / 2
    allowed = roundings * unit_roundoff * x.double().abs().mean((2, 3), keepdim=True)
    if dtype == torch.bfloat16:
        allowed += torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((mean.double() - exact).abs() <= allowed).all()
    product = conv_sequence(x, filled([pool(channels), scale(channels, 0)]), nothing)
    assert torch.equal(product, x * mean)
    assert product.is_contiguous(memory_format=torch.channels_last)


@both_dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 16, 1, 1), (3, 37, 5, 2), (1, 65, 40, 41)])
def test_sigmoid(instruction_set, dtype, shape):
    x = (12 * image(*shape)).to(dtype).contiguous(memory_format=torch.channels_last)
    edges = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e4, -1e4, -88.0, 0.0])
    x.permute(0, 2, 3, 1).view(-1)[: len(edges)] = edges[: x.numel()].to(dtype)
    y = conv_sequence(x, filled([sigmoid(shape[1])]), torch.zeros(16))
    exact = x.double().sigmoid()
    # The exponential is good to 2e-7, two operations more are rounded; then once to x's type.
    allowed = 2e-7 + torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
    finite = ~exact.isnan()
    assert y.dtype == dtype and torch.equal(y.isnan(), exact.isnan())
    errors = (y.double() - exact).abs()[finite]
    assert (errors <= allowed * exact[finite] + torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_threads_change_nothing(threads, batch):
    """Large enough to be shared out; a product in place and one whose operand is read later."""
    x = image(batch, 96, 30, 31).to(memory_format=torch.channels_last)
    rows = [pool(96), scale(96, 0), pool(96), scale(96, 2), pool(96), scale(96, 2)]
    torch.set_num_threads(1)
    gates = conv_sequence(x, filled([sigmoid(96)]), torch.zeros(16))
    torch.set_num_threads(threads)
    assert torch.equal(conv_sequence(x, filled([sigmoid(96)]), torch.zeros(16)), gates)
    y = conv_sequence(x, filled(rows), torch.zeros(16))
    first = x * conv_sequence(x, filled([pool(96)]), torch.zeros(16))
    mean = conv_sequence(first, filled([pool(96)]), torch.zeros(16))
    again = conv_sequence(first * mean, filled([pool(96)]), torch.zeros(16))
    assert torch.equal(y, first * again)


@pytest.mark.parametrize(
    "rows,message",
    [
        ([[7, *pool(8)[1:]]], "a kind from 0 to 6"),
        ([[SIGMOID, 8, 9, *pool(8)[3:]]], "as many channels as before"),
        ([[4, 8, 9, *pool(8)[3:]]], "as many channels as before"),
        ([pool(7)], "x: expected 7 channels, got 8"),
        ([scale(8, 0)], "an earlier value to multiply by one factor a channel"),
        ([pool(8), scale(8, -1)], "an earlier value to multiply"),
        ([pool(8), scale(8, 2)], "an earlier value to multiply"),
        ([[*pool(8)[:-2], 0, 0]], "as residual"),
    ],
)
def test_stages_are_checked(rows, message):
    with pytest.raises(RuntimeError, match=f"conv_sequence: .*{message}"):
        conv_sequence(image(1, 8, 4, 4), filled(rows), torch.zeros(16))


# ---- gates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [lambda: None, lambda: Gate(20), lambda: Gate(20, 6, nn.ReLU)])
@both_dtypes
def test_squeeze_and_excitation(calls, make, batch, threads, dtype):  # noqa: F811
    model = randomize(finish(*gated(gate=make()))).to(dtype)
    fast = swap(model)
    assert runs(fast) == {"": [(0, 3, 8)]}
    torch.set_num_threads(threads)
    check_accuracy(model, fast, image(batch, 3, 17, 21).to(dtype))
    assert len(calls) == 1


def by_function(self, x):
    return torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1))))) * x


def by_method(self, x):
    return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid_()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda: SqueezeExcitation(20, 6, activation=nn.SiLU),
        lambda: Gate(20, gate=nn.Sigmoid),
        lambda: network(by_function, reduce=nn.Conv2d(20, 4, 1), expand=nn.Conv2d(4, 20, 1)),
        lambda: network(by_method, reduce=nn.Conv2d(20, 4, 1), expand=nn.Conv2d(4, 20, 1)),
    ],
)
@both_dtypes
def test_sigmoid_gates(calls, make, batch, dtype):  # noqa: F811
    """EfficientNet's."""
    model = randomize(finish(*gated(gate=make()))).to(dtype)
    fast = swap(model)
    assert runs(fast) == {"": [(0, 3, 9)]}
    check_accuracy(model, fast, image(batch, 3, 17, 21).to(dtype))
    assert len(calls) == 1


def in_place_and_seen(self, x):
    gate = self.expand(x.mean((2, 3), keepdim=True))
    return x * gate.sigmoid_() * gate


def seen_inside(self, x):
    y = self.reduce(x.mean((2, 3), keepdim=True))
    return x * torch.sigmoid(self.expand(y)) + y.sum()


def before_its_activation(self, x):
    y = self.reduce(x.mean((2, 3), keepdim=True))
    return x * (self.expand(F.relu(y)) + self.expand(y))


def one_for_all_channels(self, x):
    return x * self.expand(x.mean((2, 3), keepdim=True))


def flat_mean(self, x):
    return x * self.reduce(x.mean((2, 3))[..., None, None])


def largest(self, x):
    return x * self.expand(F.adaptive_max_pool2d(x, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gate(20, gate=nn.LogSigmoid),  # none of our activations
        lambda: Gate(20, act=nn.Tanh),
        lambda: network(seen_inside, reduce=nn.Conv2d(20, 4, 1), expand=nn.Conv2d(4, 20, 1)),
        lambda: network(
            before_its_activation, reduce=nn.Conv2d(20, 4, 1), expand=nn.Conv2d(4, 20, 1)
        ),
        lambda: network(in_place_and_seen, expand=nn.Conv2d(20, 20, 1)),
        lambda: network(one_for_all_channels, expand=nn.Conv2d(20, 1, 1)),
        lambda: network(flat_mean, reduce=nn.Conv2d(20, 20, 1)),
        lambda: network(largest, expand=nn.Conv2d(20, 20, 1)),
    ],
)
def test_other_gates_end_a_run(make):
    model = randomize(finish(unit(3, 20), unit(20, 20), make(), unit(20, 20), unit(20, 6)))
    fast = swap(model)
    assert [(a, b) for a, b, _ in runs(fast)[""]] == [(0, 2), (3, 5)]
    x = image(2, 3, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
