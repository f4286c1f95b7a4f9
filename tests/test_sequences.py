"""Runs of convolutions in one call: the same bits as one by one; what is a run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import image, network, randomize
from torch import nn
from torchvision.models import mobilenet_v2

from mnet_kernels import models
from mnet_kernels.runs.forwards import Sequenced, Whole
from mnet_kernels.swap import swap
from mnet_kernels.swap.exchange import record_of

conv_sequence = torch.ops.mnet_kernels.conv_sequence.default


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def runs(fast):
    return {
        path: [(run.start, run.stop, len(run.stages)) for run in found]
        for path, found in record_of(fast, "runs").plan.runs.items()
    }


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the operator."""
    made = []

    class Counting:
        def __call__(self, *args):
            made.append(args)
            return conv_sequence(*args)

    monkeypatch.setattr("mnet_kernels.runs.runner._conv_sequence", Counting())
    return made


def one_by_one(fast, x):
    """The result without runs, from a copy: the modules called in turn."""
    fast = copy.deepcopy(fast)
    for module in fast.modules():
        if isinstance(module.__dict__.get("forward"), Sequenced | Whole):
            del module.__dict__["forward"]
    with torch.no_grad():
        return fast(x)


def unit(inputs, outputs, kernel=1, groups=1, act=nn.ReLU6, **options):
    conv = nn.Conv2d(inputs, outputs, kernel, groups=groups, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([act()] if act else []))


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, inputs=6, outputs=6, stride=1):
        super().__init__()
        self.conv = nn.Sequential(
            unit(inputs, 20),
            unit(20, 20, 3, 20, stride=stride, padding=1),
            unit(20, outputs, act=None),
        )
        self.adds = inputs == outputs and stride == 1

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class Tail(nn.Module):
    """A head that no run takes in."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x):
        return F.linear(torch.flatten(x, 1), self.weight)


class Net(nn.Sequential):
    """A stem, blocks with and without a sum, a head; then what is no convolution."""

    def __init__(self):
        blocks = [Inverted(), Inverted(6, 10, 2), Inverted(10, 10), Inverted(10, 10)]
        super().__init__(
            unit(3, 6, 3, stride=2, padding=1), *blocks, unit(10, 24),
            nn.AdaptiveAvgPool2d((2, 1)), Tail(48, 5),
        )  # fmt: skip


@pytest.fixture
def net():
    return randomize(Net())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@both_dtypes
def test_the_same_bits_as_one_by_one(net, calls, batch, threads, dtype):
    net = net.to(dtype)
    fast = swap(net)
    assert runs(fast) == {"": [(0, 6, 14)]}
    x = image(batch, 3, 23, 30).to(dtype)
    torch.set_num_threads(threads)  # the fixture of all tests sets it back
    with torch.no_grad():
        y = fast(x)
        features = nn.Sequential(*list(fast)[:6])(x)
        again = fast(x)
    assert len(calls) == 2
    assert torch.equal(y, one_by_one(fast, x))
    assert torch.equal(y, again)
    assert features.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        body = nn.Sequential(*list(net)[:6])
        native, exact = body(x), copy.deepcopy(body).double()(x.double())
    error, native = (features - exact).abs().max(), (native - exact).abs().max()
    assert error <= max(1.5 * native, 1e-5 * exact.abs().max())


@pytest.mark.parametrize(
    "make,found",
    [
        (lambda: models.mobilenet_v1(0.25, 10)[:-4], {"": [(0, 86, 27)]}),
        (lambda: mobilenet_v2(num_classes=10, width_mult=0.35).features, {"": [(0, 19, 52)]}),
    ],
)
@both_dtypes
def test_real_networks(make, found, calls, dtype):
    fast = swap(randomize(finish(*make())).to(dtype))
    assert runs(fast) == found
    x = image(2, 3, 64, 64).to(dtype)
    with torch.no_grad():
        y = fast(x)
    assert len(calls) == 1
    assert torch.equal(y, one_by_one(fast, x))


@settings(max_examples=30)
@given(st.data())
def test_random_sequences(data):
    """Any kernel, stride, padding, dilation, multiplier, activation; sums where shapes allow."""
    draw = data.draw
    seed = draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    channels = draw(st.integers(1, 40))
    x = image(draw(st.integers(1, 3)), channels, *draw(st.tuples(*[st.integers(5, 20)] * 2)))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 6))):
        depthwise = channels > 1 and draw(st.booleans())
        outputs = channels * draw(st.integers(1, 2)) if depthwise else draw(st.integers(1, 70))
        kernel = draw(st.sampled_from([1, 2, 3, 5]))
        options = dict(
            stride=draw(st.integers(1, 2)), padding=draw(st.integers(kernel // 2, kernel)),
            dilation=draw(st.integers(1, 2)), groups=channels if depthwise else 1,
        )  # fmt: skip
        act = draw(st.sampled_from([None, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.LeakyReLU]))
        layer = unit(channels, outputs, kernel, act=act, **options)
        try:
            with torch.no_grad():
                y = nn.Sequential(*layers, layer).eval()(x)
        except RuntimeError:  # the kernel is larger than what is left of the image
            break
        if min(y.shape[2:]) < 2:
            break
        layers.append(layer)
        channels = outputs
        if draw(st.booleans()):
            inner = unit(channels, channels, act=None)
            layers.append(network(lambda self, x: self.f(x) + x, f=inner))
    if len(layers) < 2:
        return
    if layers[0][0].groups > 1 or draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)  # else a depthwise start keeps its layout
    model = randomize(nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(2), nn.Flatten()))
    if draw(st.booleans()):
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    fast = swap(model)
    with torch.no_grad():
        y, native = fast(x), model(x)
    assert torch.equal(y, one_by_one(fast, x))
    exact = copy.deepcopy(model).double()(x.double())
    error, allowed = (y - exact).abs().max(), (native - exact).abs().max()
    rounding = 1e-6 if x.dtype == torch.float32 else 0
    assert error <= max(3 * allowed, rounding * exact.abs().max())


# ---- what is a run ----------------------------------------------------------------------------


def finish(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten())


def seen(self, x):
    y = self.a(x)
    return self.b(y) * torch.sigmoid(y)


def twice(self, x):
    y = self.a(x)
    return y + y


def used_before_the_sum(self, x):
    y = self.a(x)
    return (y + x) * torch.sigmoid(y)


def after_the_sum(self, x):
    return F.relu(self.a(x) + x)


@pytest.mark.parametrize(
    "block",
    [
        lambda: network(seen, a=unit(6, 6), b=unit(6, 6)),
        lambda: network(twice, a=unit(6, 6)),
        lambda: network(used_before_the_sum, a=unit(6, 6, act=None)),
        lambda: network(after_the_sum, a=unit(6, 6, act=None)),
        lambda: network(lambda self, x: self.a(x) + 1, a=unit(6, 6)),
        lambda: network(lambda self, x: torch.add(self.a(x), x, alpha=2), a=unit(6, 6)),
        lambda: network(lambda self, x: self.a(x) + x, a=unit(6, 6, 3, 6, padding=1)),
        lambda: unit(6, 6, 3, groups=2, padding=1),
        lambda: nn.MaxPool2d(3, 1, 1),
    ],
)
def test_anything_else_ends_a_run(block, calls):
    pair = [unit(6, 6), unit(6, 6, 3, 6, padding=1)]
    model = randomize(finish(*pair, block(), *copy.deepcopy(pair)))
    fast = swap(model)
    assert runs(fast)[""] == [(0, 2, 2), (3, 5, 2)]
    x = image(2, 6, 8, 9)
    with torch.no_grad():
        y = fast(x)
    assert len(calls) >= 2
    assert torch.equal(y, one_by_one(fast, x))
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


def test_a_layout_that_somebody_sees_is_no_run():
    """Its results may not become channels_last."""
    model = randomize(nn.Sequential(unit(6, 6), unit(6, 6)))
    assert runs(swap(model)) == {}


def test_one_convolution_is_no_run():
    assert runs(swap(randomize(finish(unit(6, 6))))) == {}


# ---- the operator itself -------------------------------------------------------------------------

ROW = [1, 8, 4, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, -1, 0]
SIZE = 32 * 8 + 32 + 32 + 16


@pytest.mark.parametrize(
    "x,stages,size,message",
    [
        (
            torch.ones(1, 8, 4),
            [ROW],
            SIZE,
            r"x: expected a float32 or bfloat16 CPU tensor .*\(1, 8, 4\)",
        ),
        (
            torch.ones(1, 8, 4, 4).double(),
            [ROW],
            SIZE,
            "x: expected a float32 or bfloat16 CPU tensor",
        ),
        (torch.ones(0, 8, 4, 4), [ROW], SIZE, "x: expected .* not empty"),
        (torch.ones(1, 9, 4, 4), [ROW], SIZE, "x: expected 8 channels, got 9"),
        (torch.ones(1, 8, 4, 4), [ROW[:-1]], SIZE, r"stages: expected an int64 .*\(n, 16\)"),
        (torch.ones(1, 8, 4, 4), [ROW, ROW], SIZE, "stages: expected 8 channels, got 4"),
        (torch.ones(1, 8, 4, 4), [ROW], SIZE - 16, "an offset that lies within the constants"),
        (torch.ones(1, 8, 4, 4), [[*ROW[:-1], -16]], SIZE, "an offset that lies within"),
        (torch.ones(1, 8, 4, 4), [[*ROW[:5], 0, *ROW[6:]]], SIZE, "positive sizes, strides"),
        (torch.ones(1, 8, 4, 4), [[*ROW[:9], -2, *ROW[10:]]], SIZE, "padding of at least 0"),
        (torch.ones(1, 8, 4, 4), [[*ROW[:13], 99, *ROW[14:]]], SIZE, "a known activation"),
        (torch.ones(1, 8, 4, 4), [[*ROW[:14], 0, 0]], SIZE, "an earlier value of the result's"),
        (torch.ones(1, 8, 4, 4), [[*ROW[:14], 5, 0]], SIZE, "an earlier value of the result's"),
        (torch.ones(1, 8, 4, 4), [[0, *ROW[1:]]], SIZE, "K a multiple of C"),
        (torch.ones(1, 8, 4, 4), [[*ROW[:3], 7, 7, *ROW[5:]]], 9999, "x: expected a padded size"),
    ],
)
def test_bad_input(x, stages, size, message):
    with pytest.raises(RuntimeError, match=f"conv_sequence: .*{message}|conv_sequence: {message}"):
        conv_sequence(x, torch.tensor(stages), torch.zeros(size))
