"""Depthwise + 1x1 pairs of swapped networks in one pass on Triton, in its interpreter
(test_triton.py runs this file)."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import rulers
import torch
from test_pairs import ways
from test_sequences import Net, image, one_by_one, randomize, unit
from torch import nn

from mnet_kernels import SeparableConv, models
from mnet_kernels.runs import one_pass, pairs, stage_by_stage
from mnet_kernels.swap import explain, swap
from mnet_kernels.timing import Spread

pytestmark = pytest.mark.skipif(rulers.BACKEND is None, reason="runs in Triton's interpreter")


@pytest.fixture
def calls(monkeypatch):
    """The inputs of every call in one pass."""
    seen = []

    def spy(x, *args, **kwargs):
        seen.append(tuple(x.shape))
        return real(x, *args, **kwargs)

    real = one_pass.separable_conv
    monkeypatch.setattr(one_pass, "separable_conv", spy)
    return seen


@pytest.mark.parametrize("channels_last", [False, True])
def test_forced_either_way_gives_the_same_result(calls, channels_last):
    net, x = randomize(Net()), image(2, 3, 20, 18)
    if not channels_last:
        x = x.contiguous()
    results = []
    with torch.no_grad():
        for forced in (True, False):
            fast = swap(net, backend="triton", pairs=forced)
            assert ways(fast) == []  # nothing to tell before the first call
            results.append(fast(x))
            assert ways(fast) == [forced] * 4
            torch.testing.assert_close(results[-1], one_by_one(fast, x))
    assert len(calls) == 4 and len(set(calls)) > 1
    torch.testing.assert_close(*results)


def test_mobilenet_with_its_head_by_the_cost_model(calls):
    model = randomize(models.mobilenet_v1(0.125, 6)).eval()
    fast, x = swap(model, backend="triton"), image(1, 3, 32, 32)
    with torch.no_grad():
        y = fast(x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 13 == sum(ways(fast))  # one image: every launch that is saved counts
    text = " ".join(str(explain(fast)).split())
    assert "in one pass (estimated " in text and " µs apart)" in text


def test_what_is_done_to_a_network_is_honoured(calls):
    fast, x = swap(randomize(Net()), backend="triton", pairs=True), image(1, 3, 12, 12)

    def check(expected):
        calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(fast(x), one_by_one(fast, x))
        assert len(calls) == expected

    check(4)
    with torch.no_grad():
        for p in fast.parameters():
            p.mul_(0.9)
        fast[1].conv[1][1].running_mean.add_(1)
    check(4)
    fast[3].conv[1][0].fusion.pair = False
    check(3)
    assert "3.conv.1.0 + 3.conv.2.0: one after the other (measured or set)" in str(explain(fast))
    fast[2].conv[2][0].stride = (2, 1)
    check(2)
    fast[2].conv[2][0].stride = (1, 1)
    hook = fast[4].conv.register_forward_hook(lambda module, args, y: y + 1)
    check(0)
    hook.remove()
    fast[1].conv[1][1].train()
    fast[1].conv[1][0].fusion.batch_statistics = False
    check(3)


def test_gradients_and_autocast_go_one_by_one(calls):
    fast, x = swap(randomize(Net()), backend="triton", pairs=True), image(1, 3, 12, 12)
    with torch.enable_grad():
        fast(x.requires_grad_()).sum().backward()
    assert x.grad is not None and not calls
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        fast(x)
    assert not calls and not any(ways(fast))


def test_gradients_of_direct_children_too(calls):
    """A run whose modules have no children of their own."""
    layers = [m for inner in (unit(6, 8), unit(8, 8, 3, groups=8, padding=1), unit(8, 8))
              for m in inner]  # fmt: skip
    net = randomize(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    fast, x = swap(net, backend="triton", pairs=True), image(1, 6, 6, 6)
    with torch.enable_grad():
        fast(x).sum().backward()
    assert not calls
    with torch.no_grad():
        fast(x)
    assert len(calls) == 1


def test_a_separable_conv_asks_no_cost_model(monkeypatch, calls):
    monkeypatch.setattr(stage_by_stage, "separable_seconds", lambda *args, **kwargs: (2.0, 1.0))
    block = randomize(SeparableConv(6, 8, backend="triton")).eval()
    with torch.no_grad():
        block(image(1, 6, 6, 6))
    assert len(calls) == 1


def test_what_is_no_pair():
    """Slopes that differ, a 1x1 with a stride."""

    def block(slope=0.2, stride=1):
        return nn.Sequential(
            unit(8, 8), unit(8, 8, 3, groups=8, act=lambda: nn.LeakyReLU(0.2), padding=1),
            unit(8, 8, act=lambda: nn.LeakyReLU(slope), stride=stride),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip

    for net, count in ((block(), 1), (block(slope=0.3), 0), (block(stride=2), 0)):
        fast, x = swap(randomize(net), backend="triton", pairs=True), image(1, 8, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
        assert len(ways(fast)) == count


def test_measured(monkeypatch):
    """swap does so with example_inputs, where the interpreter is left for native at every site."""
    fast, x = swap(randomize(Net()), backend="triton"), image(1, 3, 12, 12)
    with torch.no_grad():
        fast(x)
        for faster in ("one pass", "apart"):
            monkeypatch.setattr(pairs, "interleave", partial(taking, faster))
            for runner in pairs.runners(fast):
                pairs.measure(runner)
            fast(x)
            assert ways(fast) == [faster == "one pass"] * 4
            assert "(measured or set)" in str(explain(fast))


def taking(faster, calls, **_):
    """Instead of a measurement: both are called, and one is said to be the faster."""
    for call in calls.values():
        call()
    return {name: Spread((1.0 if name == faster else 2.0,) * 3) for name in calls}


def test_copies_have_decisions_of_their_own():
    fast, x = swap(randomize(Net()), backend="triton", pairs=True), image(1, 3, 12, 12)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        fast(x)
    assert ways(fast) == [True] * 4 and ways(other) == []
    assert all(r.modules[0] is not s.modules[0]
               for r, s in zip(pairs.runners(fast), pairs.runners(other), strict=True))  # fmt: skip
