"""Swapped models in training mode: a depthwise site is one operator for convolution, BatchNorm with
the batch's statistics and activation, and nobody can tell but by the time and memory it takes."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import ACTS, dw_bn, image, network, randomize, reasons
from torch import nn

from mnet_kernels.nn import DepthwiseConvBNAct, training
from mnet_kernels.swap import explain, sites, swap


@pytest.fixture
def calls(monkeypatch):
    """One entry a call of the operator of training."""
    found = []
    operator = training.dwconv_bn_act_training

    def counted(*args, **kwargs):
        found.append(args)
        return operator(*args, **kwargs)

    monkeypatch.setattr(training, "dwconv_bn_act_training", counted)
    return found


def both(model):
    """The model and its swapped copy, which shares nothing, in training mode and float64."""
    model = randomize(model).double()
    return model.train(), swap(copy.deepcopy(model)).train()


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def learn(model, x, call=None):
    """The output, with all gradients added to what is there; the input's gradient."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x) if call is None else call(model, x)
    # Sums of y or of its square alone would give BatchNorm's input next to no gradient.
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), x.grad


def assert_alike(native, fast, x, call=None, steps=2, tolerance=1e-9):
    """Outputs, gradients, parameters and buffers over some steps of SGD."""
    native_sgd, fast_sgd = (torch.optim.SGD(m.parameters(), 0.1) for m in (native, fast))
    for _ in range(steps):
        expected, found = learn(native, x, call), learn(fast, x, call)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        wanted, got = ({name: p.grad for name, p in m.named_parameters()} for m in (native, fast))
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
        for optimizer in (native_sgd, fast_sgd):
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(
            fast.state_dict(), native.state_dict(), rtol=tolerance, atol=tolerance
        )
        x = x.flip(0) * 1.5 + 0.25


def batch(*shape):
    return image(*shape or (3, 8, 7, 6)).double()


# --- the norm's settings --------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_activations(act, calls):
    native, fast = both(dw_bn(act=copy.deepcopy(ACTS[act]), stride=2))
    # PyTorch's own derivative of hardsigmoid has a sixth in float32, also in float64.
    assert_alike(native, fast, batch(), tolerance=1e-6 if act == "hardsigmoid" else 1e-9)
    assert len(calls) == 2
    assert not any("training mode" in reason for reason in reasons(fast).values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_padding(layout, calls):
    model = network(
        lambda self, x: self.norm(self.conv(F.pad(x, (0, 1, 0, 1)))).relu(),
        conv=nn.Conv2d(8, 16, (3, 2), (2, 1), (1, 0), groups=8, bias=True),
        norm=nn.BatchNorm2d(16),
    )
    native, fast = both(model.to(memory_format=layout))
    x = batch().to(memory_format=layout)
    assert_alike(native, fast, x)
    assert len(calls) == 2
    assert fast(x).is_contiguous(memory_format=layout)


NORMS = {
    "eps and momentum": {"eps": 0.1, "momentum": 0.7},
    "cumulative average": {"momentum": None},
    "no momentum": {"momentum": 0.0},
    "no running statistics": {"track_running_stats": False},
    "not affine": {"affine": False},
    "neither": {"affine": False, "track_running_stats": False},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_settings_of_the_norm(name, bias, calls):
    model = dw_bn(bias=bias, act=nn.ReLU6())
    model[1] = nn.BatchNorm2d(8, **NORMS[name])
    native, fast = both(model)
    assert_alike(native, fast, batch(), steps=3)
    assert len(calls) == 3
    evaluated = [m.eval()(batch()) for m in (native, fast)]
    torch.testing.assert_close(*evaluated)
    # Without running statistics the batch's are used in eval mode too.
    assert len(calls) == 3 + ("running" in name or name == "neither")


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.5},
        {"momentum": None},
        {"eps": 0.3},
        {"track_running_stats": False},
        {"num_batches_tracked": None},
    ],
    ids=str,
)
def test_settings_are_read_at_every_call(change, calls):
    native, fast = both(dw_bn(act=nn.ReLU()))
    assert_alike(native, fast, batch())
    for model in (native, fast):
        for name, value in change.items():
            setattr(model[1], name, value)
    assert_alike(native, fast, batch())
    assert len(calls) == 4


def test_a_bias_cancels_out(calls):
    native, fast = both(dw_bn(bias=True))
    learn(fast, batch()), learn(native, batch())
    assert fast[0].bias.grad.abs().max() == 0
    assert native[0].bias.grad.abs().max() < 1e-12
    assert len(calls) == 1


def test_modes_are_honoured(calls):
    native, fast = both(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn(act=nn.Hardswish())))
    for step, modes in enumerate([(True, True), (False, True), (True, False), (False, False)]):
        for model in (native, fast):
            for norm, mode in zip(norms(model), modes, strict=True):
                norm.train(mode)
        calls.clear()
        assert_alike(native, fast, batch(), steps=1)
        assert len(calls) == sum(modes), step
    for model in (native, fast):
        model.eval()
    torch.testing.assert_close(fast(batch()), native(batch()))
    counters = [[int(n.num_batches_tracked) for n in norms(m)] for m in (native, fast)]
    assert counters == [[2, 2], [2, 2]]


def test_frozen_parameters_get_no_gradient(calls):
    native, fast = both(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn()))
    for model in (native, fast):
        model[0].requires_grad_(False)
        model[1][1].weight.requires_grad_(False)
    expected, found = learn(native, batch()), learn(fast, batch())
    torch.testing.assert_close(found, expected)
    for p, q in zip(native.parameters(), fast.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad)


# --- kinds of norm --------------------------------------------------------------------------


def with_norm(norm):
    model = dw_bn()
    model[1] = norm
    return model


def test_timm_norm_with_its_activation(calls):
    layers = pytest.importorskip("timm.layers")
    native, fast = both(with_norm(layers.BatchNormAct2d(8, act_layer=nn.SiLU)))
    assert_alike(native, fast, batch())
    assert len(calls) == 2


def test_frozen_norm_class_has_no_batch_statistics(calls):
    native, fast = both(with_norm(torchvision.ops.FrozenBatchNorm2d(8)))
    assert_alike(native, fast, batch())
    assert not calls and next(iter(sites(fast)))[1].why_native("cpu", torch.float64) is None


class Clamped(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.running_var = self.running_var.clamp(min=0.9)
        return y


class Shared(nn.BatchNorm2d):
    def forward(self, x):
        if self.training and torch.distributed.is_initialized():
            raise NotImplementedError
        return super().forward(x)


NATIVE = {
    "synchronised": (
        lambda: nn.SyncBatchNorm(8), "SyncBatchNorm shares its statistics between processes"
    ),
    "trains otherwise": (lambda: Clamped(8), "the norm does not train as nn.BatchNorm2d does"),
    "talks": (lambda: Shared(8), "the norm's forward talks to other processes"),
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_norms_that_train_themselves(name, calls):
    make, reason = NATIVE[name]
    native, fast = both(with_norm(make()))
    assert reasons(fast) == {"0": f"{reason}: native in training mode"}
    (row,) = explain(fast.eval()).rows
    assert (row.backend, row.reason, row.training) == ("cpu", "", "native")
    assert row.why_native_training == f"{reason}: native in training mode"
    assert_alike(native, fast.train(), batch())
    assert not calls


def test_the_norm_of_a_layer_of_ours_may_be_exchanged(calls):
    layer = DepthwiseConvBNAct(8, activation="relu6").double()
    assert_alike(Native(copy.deepcopy(layer)), layer, batch())
    assert len(calls) == 2
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    layer(batch())
    assert "SyncBatchNorm" in layer.conv.why_native("cpu", torch.float64)
    assert layer.bn.num_batches_tracked == 3 and len(calls) == 2


class Native(nn.Module):
    """A layer of ours, module by module."""

    def __init__(self, layer):
        super().__init__()
        self.conv, self.bn = layer.conv, layer.bn

    def forward(self, x):
        return self.conv.forward_native(x)


def test_a_swapped_layer_of_ours_has_its_own_mode(calls):
    model = nn.Sequential(DepthwiseConvBNAct(8)).double()
    fast = swap(model)
    model.eval(), fast.train()
    model(batch())
    assert not calls and model[0].bn.num_batches_tracked == 0
    fast(batch())
    assert len(calls) == 1 and fast[0].bn.num_batches_tracked == 1
