"""Dense convolutions of swapped networks in one kernel on Triton, in its interpreter
(test_triton.py runs this file)."""

from __future__ import annotations

import copy
import json

import pytest
import rulers
import torch
from test_sequences import image, randomize, unit
from torch import nn

from mnet_kernels import backends, ops
from mnet_kernels.nn import FusedConv2d, dense
from mnet_kernels.swap import decisions, explain, swap

pytestmark = pytest.mark.skipif(rulers.BACKEND is None, reason="runs in Triton's interpreter")


class Two(nn.Sequential):
    """A stem and a 1x1 convolution, whose results' layout nobody sees."""

    def __init__(self, act=nn.ReLU6):
        super().__init__(
            unit(3, 6, 3, stride=2, padding=1, act=act), unit(6, 10, act=act),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """Input shapes and layouts of the calls that went in one kernel."""
    seen = []

    def spy(name):
        operator = real(name)
        if name != "conv_bn_act":
            return operator

        def called(x, *args):
            seen.append((tuple(x.shape), x.is_contiguous(memory_format=torch.channels_last)))
            return operator(x, *args)

        return called

    real = backends.triton_operator
    monkeypatch.setattr(backends, "triton_operator", spy)
    return seen


def told(fast):
    return [(row.backend, row.reason) for row in explain(fast).rows]


def test_a_swapped_network_and_what_is_told_of_it(calls):
    net, x = randomize(Two()), image(2, 3, 11, 9).contiguous()
    fast = swap(net, backend="triton")
    assert told(fast) == [("triton", "or folded, as the cost model says of an input")] * 2
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert calls == [((2, 3, 11, 9), True), ((2, 6, 6, 5), True)]
    for backend, reason in told(fast):
        assert backend == "triton"
        assert reason.startswith("estimated ") and reason.endswith(" µs folded")
    assert "_decision" not in copy.deepcopy(fast)[0][0].__dict__


def test_whose_layout_is_seen_keeps_it(calls):
    net, x = randomize(unit(3, 6, 3)), image(2, 3, 7, 7).contiguous()
    with torch.no_grad():
        y = swap(net, backend="triton")(x)
        torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-5)
    assert y.is_contiguous() and calls == [((2, 3, 7, 7), False)]


def test_nothing_is_gained_without_an_activation(calls):
    net, x = randomize(Two(act=None)), image(1, 3, 8, 8)
    fast = swap(net, backend="triton")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert not calls and [backend for backend, _ in told(fast)] == ["folded"] * 2


def test_gradients_and_recordings_go_another_way(calls):
    fast, x = swap(randomize(Two()), backend="triton"), image(1, 3, 8, 8)
    with torch.no_grad():
        expected = fast(x)
        assert len(calls) == 2
        traced = torch.jit.trace(fast, x, check_trace=False)
        torch.testing.assert_close(traced(x), expected)
    y = fast(x.requires_grad_())
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert x.grad is not None and len(calls) == 2
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16
    assert len(calls) == 4


def test_changes_are_honoured(calls):
    net = randomize(Two())
    fast, x = swap(net, backend="triton"), image(1, 3, 8, 8)
    with torch.no_grad():
        fast(x)
        for p in net.parameters():
            p.mul_(0.9)
        net[1][1].running_mean.add_(1)
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
        net[1][1].running_var = net[1][1].running_var * 2
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == 6


def test_preferences_are_kept(calls, tmp_path):
    net, x = randomize(Two()), image(1, 3, 8, 8)
    fast, path = swap(net, backend="triton"), tmp_path / "decisions.json"
    fast[0][0].fusion.preferred = "folded"
    explain(fast).save(path)
    fast = swap(net, backend="triton", decisions=path)
    with torch.no_grad():
        fast(x)
    assert calls == [((1, 6, 4, 4), True)]
    assert told(fast)[0] == ("folded", "measured faster than the usual backend")
    content = json.loads(path.read_text())
    content["0.0"]["backend"] = "fold"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"'0.0': \"backend\": expected .* folded, got 'fold'"):
        swap(net, backend="triton", decisions=path)


class OnAGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("faster", ["triton", "folded", "native"])
def test_measured(monkeypatch, calls, faster):
    """The ways of a site on a GPU, whichever the cost model would take."""
    monkeypatch.setattr(decisions, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    raced = []

    def race(ways, x):
        raced.append(list(ways))
        for way in ways.values():
            way(x)
        return {name: 1.0 if name == faster else 2.0 for name in ways}

    monkeypatch.setattr(decisions, "_race", race)
    net, x = randomize(Two()), image(1, 3, 8, 8)
    fast = swap(net)
    modules = {name: m for name, m in fast.named_modules() if isinstance(m, FusedConv2d)}
    monkeypatch.setattr(dense, "decide", lambda conv, x: conv.fusion.preferred or "folded")
    decisions.measure(fast, modules, (x.as_subclass(OnAGpu),), False)
    assert raced == [["native", "folded", "triton"]] * 2
    for module in modules.values():
        if faster == "native":
            assert module.fusion.declined == "left native: measured 0.50x"
        else:
            assert module.fusion.preferred == (None if faster == "folded" else "triton")


def test_the_function_by_itself(calls):
    x, weight = image(2, 3, 7, 7), torch.randn(5, 3, 3, 3)
    scale, shift = torch.rand(5) + 0.5, torch.randn(5)
    constants = {"stride": 2, "padding": "same", "activation": "hardswish"}
    expected = ops.conv_bn_act(x, weight, scale, shift, **constants, backend="native")
    y = ops.conv_bn_act(x, weight, scale, shift, **constants, backend="triton")
    torch.testing.assert_close(y, expected)
    assert len(calls) == 1
    weight.requires_grad_()
    ops.conv_bn_act(x, weight, scale, shift, **constants, backend="triton").sum().backward()
    assert weight.grad is not None and len(calls) == 1
    with pytest.raises(RuntimeError, match=r"^conv_bn_act: scale: expected"):
        ops.conv_bn_act(x, weight.detach(), scale[1:], shift, backend="triton")
