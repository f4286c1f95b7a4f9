"""swap on small networks built to hit one rule each: which convolutions are fused."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import (
    ACTS,
    assert_same,
    dw_bn,
    fused,
    hooked,
    image,
    network,
    randomize,
    reasons,
)
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from mnet_kernels.swap import swap


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2, 8], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("name", ACTS)
def test_conv_norm_act(name, groups, layout):
    model = randomize(dw_bn(act=copy.deepcopy(ACTS[name]), groups=groups, stride=2, bias=True))
    fast = swap(model)
    (fusion,) = fused(fast).values()
    assert fusion.norm is fast[1]
    assert fusion.activation == name
    if name == "leaky_relu":
        assert fusion.slope == pytest.approx(0.2)
    assert_same(model, fast, image(2, 8, 9, 11).to(memory_format=layout))


@pytest.mark.parametrize(
    "activate",
    [
        lambda x: F.relu(x),
        lambda x: F.relu(x, inplace=True),
        lambda x: torch.relu(x),
        lambda x: x.relu(),
        lambda x: x.relu_(),
        lambda x: F.relu6(x),
        lambda x: F.hardtanh(x, 0.0, 6.0),
        lambda x: x.clamp(0, 6),
        lambda x: torch.clamp(x, min=0, max=6),
        lambda x: F.hardswish(x),
        lambda x: F.silu(x),
        lambda x: F.leaky_relu(x, 0.3),
    ],
)
def test_functional_activation(activate):
    model = network(lambda self, x: activate(self.block(x)), block=dw_bn())
    fast = swap(model)
    (fusion,) = fused(fast).values()
    assert fusion.activation != "identity"
    assert_same(model, fast, image(2, 8, 9, 11))


@pytest.mark.parametrize("activate", [torch.tanh, F.gelu, lambda x: F.elu(x), torch.abs])
def test_unknown_activation_stays(activate):
    model = network(lambda self, x: activate(self.block(x)), block=dw_bn())
    fast = swap(model)
    assert [fusion.activation for fusion in fused(fast).values()] == ["identity"]
    assert_same(model, fast, image(2, 8, 9, 11))


PADDINGS = {
    "int": ({"padding": 2}, None, (0, 0, 0, 0)),
    "pair": ({"padding": (0, 2)}, None, (0, 0, 0, 0)),
    "same": ({"padding": "same", "kernel_size": 4, "stride": 1}, None, (0, 0, 0, 0)),
    "valid": ({"padding": "valid"}, None, (0, 0, 0, 0)),
    "module": ({"padding": 0}, nn.ZeroPad2d((0, 1, 2, 3)), (2, 0, 3, 1)),
    "both": ({"padding": 1}, nn.ZeroPad2d((0, 1, 0, 1)), (0, 0, 1, 1)),
    "function": ({"padding": 0}, lambda x: F.pad(x, [1, 0, 3, 2]), (3, 1, 2, 0)),
    "nonzero": ({"padding": 0}, nn.ConstantPad2d(1, 0.5), (0, 0, 0, 0)),
    "crop": ({"padding": 1}, nn.ZeroPad2d((0, -1, 0, 1)), (0, 0, 0, 0)),
    "reflect": ({"padding": 0}, nn.ReflectionPad2d(1), (0, 0, 0, 0)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("name", PADDINGS)
def test_padding(name, groups):
    options, pad, expected = PADDINGS[name]
    block = dw_bn(act=nn.ReLU(), groups=groups, **{"stride": 2, **options})
    if isinstance(pad, nn.Module):
        model = randomize(nn.Sequential(copy.deepcopy(pad), block))
    elif pad is not None:
        model = network(lambda self, x: self.block(pad(x)), block=block)
    else:
        model = randomize(block)
    fast = swap(model)
    (fusion,) = fused(fast).values()
    assert fusion.pad == expected
    assert_same(model, fast, image(2, 8, 9, 11))


class OwnHardswish(nn.Module):
    def forward(self, x):
        return x * (x + 3).clamp(0, 6) / 6


def test_activation_module_of_ones_own():
    model = randomize(nn.Sequential(dw_bn(act=OwnHardswish()), dw_bn(act=OwnHardswish())))
    fast = swap(model)
    assert [f.act for f in fused(fast).values()] == [fast[0][2], fast[1][2]]
    assert [f.activation for f in fused(fast).values()] == ["hardswish"] * 2
    assert_same(model, fast, image(2, 8, 5, 5))


def test_identity_between_is_passed_over():
    model = randomize(nn.Sequential(*dw_bn(), nn.Identity(), nn.Dropout(0.0), nn.ReLU()))
    fast = swap(model)
    (fusion,) = fused(fast).values()
    assert fusion.activation == "relu"
    assert_same(model, fast, image(2, 8, 5, 5))


def test_depthwise_alone_and_with_activation():
    conv = nn.Conv2d(8, 16, 7, padding=3, groups=8)
    model = randomize(
        nn.Sequential(conv, nn.GroupNorm(2, 16), copy.deepcopy(dw_bn(16)[0]), ACTS["silu"])
    )
    fast = swap(model)
    assert [f.activation for f in fused(fast).values()] == ["identity", "silu"]
    assert_same(model, fast, image(2, 8, 9, 9))


def test_dense_without_norm_is_left_alone():
    fast = swap(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 1), nn.Conv2d(1, 4, 3))
    )
    assert not fused(fast)
    assert reasons(fast) == {
        "0": "no normalisation follows",
        "2": "a Conv1d: only Conv2d is fused",
        "3": "no normalisation follows",
    }


@pytest.mark.parametrize("model", [nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3)])
def test_a_convolution_by_itself(model):
    fast = swap(model)
    assert len(fused(fast)) == (model.groups == 8)
    assert_same(model, fast, image(2, 8, 9, 9))


# --- what must not be fused -----------------------------------------------------------------


def alone(**options):
    return nn.Conv2d(8, 8, 1, **options)


class OddConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


def old_weight_norm(conv):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated
        return weight_norm(conv)


class OddNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 1.5


NOT_FUSED = {
    "used twice": (
        lambda self, x: self.norm(y := self.conv(x)) + y,
        {"conv": alone(), "norm": nn.BatchNorm2d(8)},
        "its result is used 2 times",
    ),
    "two norms": (
        lambda self, x: self.norm(self.conv(x)) + self.other(self.conv(x)),
        {"conv": alone(), "norm": nn.BatchNorm2d(8), "other": nn.BatchNorm2d(8)},
        "its calls are followed by different things",
    ),
    "shared norm": (
        lambda self, x: self.norm(self.norm(self.conv(x))),
        {"conv": alone(), "norm": nn.BatchNorm2d(8)},
        "norm norm is also used elsewhere",
    ),
    "no statistics": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": alone(), "norm": nn.BatchNorm2d(8, track_running_stats=False)},
        "the norm keeps no running statistics",
    ),
    "odd conv": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": OddConv(8, 8, 1), "norm": nn.BatchNorm2d(8)},
        "its class OddConv changes what Conv2d does",
    ),
    "odd norm": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": alone(), "norm": OddNorm(8)},
        "the norm computes something other than BatchNorm and a known activation",
    ),
    "circular": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "norm": nn.BatchNorm2d(8)},
        "padding_mode is 'circular'",
    ),
    "hooked conv": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": hooked(alone()), "norm": nn.BatchNorm2d(8)},
        "Conv2d has hooks",
    ),
    "hooked norm": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": alone(), "norm": hooked(nn.BatchNorm2d(8))},
        "BatchNorm2d has hooks",
    ),
    "hook between": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": hooked(nn.Sequential(alone())), "norm": nn.BatchNorm2d(8)},
        "a hook would see what passes between",
    ),
    "old weight norm": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": old_weight_norm(alone()), "norm": nn.BatchNorm2d(8)},
        "Conv2d has hooks",
    ),
    "new weight norm": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": parametrizations.weight_norm(alone()), "norm": nn.BatchNorm2d(8)},
        "its class ParametrizedConv2d changes what Conv2d does",
    ),
    "training differs": (
        lambda self, x: self.norm(self.conv(x) * 2 if self.training else self.conv(x)),
        {"conv": alone(), "norm": nn.BatchNorm2d(8)},
        "used differently in training and in eval mode",
    ),
    "returned": (
        lambda self, x: (y := self.conv(x), self.norm(y)),
        {"conv": alone(), "norm": nn.BatchNorm2d(8)},
        "its result is used 2 times",
    ),
    "uncalled": (
        lambda self, x: F.conv2d(x, self.conv.weight),
        {"conv": alone(), "norm": nn.BatchNorm2d(8)},
        "not called in eval mode",
    ),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_not_fused(name):
    forward, children, reason = NOT_FUSED[name]
    model = network(forward, **children)
    fast = swap(model)
    assert not fused(fast)
    assert reason in reasons(fast).values()
    x = image(2, 8, 6, 6)
    for training in (False, True):  # and answers as before, in both modes
        model.train(training)
        fast.train(training)
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)
