"""Convolutions of a class of their own that pad as TensorFlow does, as timm's Conv2dSame."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, image, randomize, reasons
from torch import nn

from mnet_kernels.reference import same_padding
from mnet_kernels.swap import explain, restore, sites, swap


class Same(nn.Conv2d):
    """Whatever the size is."""

    def forward(self, x):
        top, left, bottom, right = self.edges(x)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def edges(self, x):
        return same_padding(x.shape[2:], self.kernel_size, self.stride, self.dilation)


class AtTheTop(Same):
    """The odd pixel on the other side."""

    def edges(self, x):
        top, left, bottom, right = super().edges(x)
        return bottom, right, top, left


class Scaled(Same):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class Noisy(Same):
    def forward(self, x):
        return super().forward(F.dropout(x, 1e-6, True))


class Small(Same):
    """Right at some sizes."""

    def edges(self, x):
        return super().edges(x) if min(x.shape[2:]) < 4 else (0, 0, 0, 0)


def network(cls, act=nn.ReLU6, **options):
    """A stem, a depthwise and a 1x1 convolution; what they give is not seen from outside."""
    dw = cls(6, 6, 3, stride=2, groups=6, bias=False, **options)
    return randomize(nn.Sequential(
        nn.Sequential(cls(3, 6, 3, stride=2), nn.BatchNorm2d(6), act()),
        nn.Sequential(dw, nn.BatchNorm2d(6), act()),
        nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), act()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ))  # fmt: skip


@pytest.mark.parametrize("size", [(16, 16), (17, 13), (9, 22)])
@pytest.mark.parametrize("options", [{}, {"dilation": 2}])
def test_swapped_and_given_back(size, options):
    model, x = network(Same, **options), image(2, 3, *size)
    fast = swap(model)
    assert [row.backend for row in explain(fast).rows] == ["cpu"] * 3
    assert "3 layers in one call" in str(explain(fast))
    assert [module.fusion.pad for _, module in sites(fast)][:2] == ["same", "same"]
    assert_same(model, fast, x)
    assert_same(model.double(), swap(model), x.double())
    assert restore(fast) is model and type(model[1][0]) is Same
    assert fast.state_dict().keys() == model.state_dict().keys()


def test_in_training():
    model = network(Same)
    fast, x = swap(copy.deepcopy(model)), image(4, 3, 17, 18)
    for net in (model.double(), fast.double()):
        net.train()(x.double()).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("cls", [AtTheTop, Scaled, Noisy, Small])
def test_others_are_left_alone(cls):
    fast = swap(network(cls))
    assert reasons(fast)["1.0"].endswith(" changes what Conv2d does")
    assert [path for path, _ in sites(fast)] == ["2.0"]


def test_one_that_only_looks_like_it_at_its_own_padding():
    model = network(Same)
    model[1][0].padding = (1, 1)  # which its forward does not read
    assert "1.0" in reasons(swap(model)) and "changes" in reasons(swap(model))["1.0"]


def test_a_pad_before_it_stays():
    model, x = network(Same), image(2, 3, 15, 12)
    model[1].insert(0, nn.ZeroPad2d(1))
    fast = swap(model)
    assert [module.fusion.pad for _, module in sites(fast)][:2] == ["same", "same"]
    assert_same(model, fast, x)


def test_timms_networks():
    timm = pytest.importorskip("timm")
    model = randomize(timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=10))
    fast = swap(model)
    assert "the model: 36 layers in one call each" in str(explain(fast))
    assert_same(model, fast, image(2, 3, 65, 70), depth=36)
