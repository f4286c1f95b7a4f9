"""Plain 1x1 convolutions of one pixel run as matrix products; everything else as before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mnet_kernels import restore, swap
from mnet_kernels.nn import PixelConv2d


@pytest.fixture
def calls(monkeypatch):
    """Which of F.linear and F.conv2d ran, in order."""
    ran = []
    for name in ("linear", "conv2d"):
        function = getattr(F, name)
        monkeypatch.setattr(
            F, name, lambda *a, name=name, function=function: ran.append(name) or function(*a)
        )
    return ran


def pixel_conv(conv: nn.Conv2d) -> nn.Module:
    return swap(nn.ModuleList([conv]))[0]


def run(module, x, dy):
    leaves = [x.detach().clone().requires_grad_(), *module.parameters()]
    return torch.autograd.grad(module(leaves[0]), leaves, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_no_less_accurate_than_native(calls, dtype, layout, bias):
    conv = nn.Conv2d(211, 37, 1, bias=bias, dtype=dtype).to(memory_format=layout)
    x, dy = torch.randn(5, 211, 1, 1).to(dtype), torch.randn(5, 37, 1, 1).to(dtype)
    exact_conv = copy.deepcopy(conv).double()
    exact = exact_conv(x.double()), *run(exact_conv, x.double(), dy.double())
    native = conv(x), *run(conv, x, dy)
    ours = pixel_conv(conv)
    calls.clear()
    got = ours(x), *run(ours, x, dy)
    assert calls == ["linear"] * 2
    for right, theirs, mine in zip(exact, native, got, strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        off, allowed = ((t.double() - right).abs().max() for t in (mine, theirs))
        assert off <= 1.5 * allowed + 1e-6 * right.abs().max()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 6, 1, 2),
        torch.randn(2, 6, 3, 3),
        torch.randn(1, 6, 1, 1),
        torch.randn(0, 6, 1, 1),
        torch.randn(6, 1, 1),
        torch.randn(2, 6, 1, 1, dtype=torch.float64),
    ],
    ids=lambda x: str(tuple(x.shape)),
)
def test_other_inputs_are_conv2ds(calls, x):
    conv = nn.Conv2d(6, 4, 1).to(x.dtype)
    ours = pixel_conv(conv)
    assert torch.equal(ours(x), conv(x)) and calls == ["conv2d"] * 2


def test_errors_are_conv2ds():
    ours = pixel_conv(nn.Conv2d(6, 4, 1))
    with pytest.raises(RuntimeError, match=r"expected input.* to have 6 channels, but got 5"):
        ours(torch.randn(2, 5, 1, 1))
    with pytest.raises(RuntimeError, match="should be the same"):
        ours(torch.randn(2, 6, 1, 1).bfloat16())


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 6, 3),
        nn.Conv2d(6, 6, 1, groups=2),
        nn.Conv2d(6, 6, 1, padding=1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1)),
        nn.Conv1d(6, 6, 1),
    ],
    ids=lambda c: type(c).__name__,
)
def test_others_keep_their_class(conv):
    assert not isinstance(pixel_conv(conv), PixelConv2d)


@pytest.mark.parametrize("conv", [nn.Conv2d(6, 4, 1, stride=2), nn.Conv2d(6, 4, 1, padding="same")])
def test_strides_and_named_padding(calls, conv):
    x = torch.randn(3, 6, 1, 1)
    torch.testing.assert_close(pixel_conv(conv)(x), conv(x))
    assert calls == ["linear", "conv2d"]


def test_backend_native_leaves_them():
    assert type(swap(nn.ModuleList([nn.Conv2d(6, 4, 1)]), "native")[0]) is nn.Conv2d


def test_autocast(calls):
    conv = nn.Conv2d(64, 8, 1)
    x = torch.randn(4, 64, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = pixel_conv(conv)(x)
        assert y.dtype == torch.bfloat16 and calls == ["linear"]
        torch.testing.assert_close(y, conv(x), rtol=2e-2, atol=1e-2)


def squeeze_and_excite():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid(),
    )  # fmt: skip


def test_in_a_model_in_training(calls):
    model = squeeze_and_excite().train()
    fast = swap(copy.deepcopy(model))
    x = torch.randn(4, 3, 9, 9)
    fast(x).sum().backward()
    assert calls.count("linear") == 2
    model(x).sum().backward()
    for (name, ours), theirs in zip(fast.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert type(pickle.loads(pickle.dumps(fast))[3]) is PixelConv2d
    assert type(restore(fast)[3]) is nn.Conv2d


def test_compiled_and_exported():
    fast = swap(squeeze_and_excite().eval())
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        y = fast(x)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(fast, (x,)).module()
    for other in (compiled, exported):
        torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-5)
