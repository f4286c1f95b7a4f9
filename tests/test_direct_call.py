"""Calls that go past torch's dispatcher: when they do, and that nobody can tell by the result."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from rulers import problem
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mnet_kernels import _C, ops

#: Before, torch has no way from a Python tensor to the stable ABI's and back.
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14), reason="needs torch 2.14"
)
CALLED = "mnet_kernels::dwconv_bn_act"


class Listener(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(func.name())
        return func(*args, **(kwargs or {}))


class FunctionListener(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.heard.append(getattr(func, "name", str)())
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def arguments(**changed):
    p = problem((2, 16, 9, 8))
    named = dict(zip(("x", "weight", "scale", "shift"), p.tensors, strict=True)) | {
        "stride": 1, "padding": 1, "dilation": 1, "activation": "relu", "slope": 0.01,
    }  # fmt: skip
    return tuple((named | changed).values())


def direct(**changed):
    return _C.dwconv_bn_act_direct(*arguments(**changed))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"stride": [2], "padding": (1, 2), "dilation": (1, 2)},
        {"stride": (2, 1), "padding": [0, 1, 2, 1], "activation": "leaky_relu", "slope": 0.3},
        {"padding": (), "activation": "hardswish"},
    ],
    ids=str,
)
def test_the_same_as_by_the_dispatcher(constants, affine):
    without = {} if affine else {"scale": None, "shift": None}
    args = arguments(**constants, **without)
    expected = torch.ops.mnet_kernels.dwconv_bn_act.default(*args)
    y = _C.dwconv_bn_act_direct(*args)
    assert type(y) is torch.Tensor and not y.requires_grad
    assert y.stride() == expected.stride() and torch.equal(y, expected)


def test_parameters_where_no_gradient_is_recorded():
    weight = nn.Parameter(torch.randn(16, 1, 3, 3))
    assert direct(weight=weight) is None
    with torch.no_grad():
        assert not direct(weight=weight).requires_grad
    with torch.inference_mode():
        assert direct(weight=weight).is_inference()


@pytest.mark.parametrize(
    "context",
    [
        Listener, FunctionListener, FakeTensorMode, forward_ad.dual_level,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.profiler.profile,
    ],
)  # fmt: skip
def test_whoever_takes_part_in_calls_is_asked(context):
    args = arguments()
    with context():
        assert _C.dwconv_bn_act_direct(*args) is None
    assert _C.dwconv_bn_act_direct(*args) is not None


def test_transforms_and_tracing_are_asked():
    seen = []
    others = arguments()[1:]

    def call(x):
        seen.append(_C.dwconv_bn_act_direct(x, *others))
        return x + 1

    torch.vmap(call)(torch.randn(2, 2, 16, 9, 8))
    torch.func.grad(lambda x: call(x).sum())(torch.randn(2, 16, 9, 8))
    with contextlib.suppress(DeprecationWarning):
        torch.jit.trace(call, (torch.randn(2, 16, 9, 8),), check_trace=False)
    assert seen == [None] * 3


def test_listeners_hear_the_call():
    args = dict(zip(("x", "weight", "scale", "shift"), arguments()[:4], strict=True))
    for listener in (Listener(), FunctionListener()):
        with listener:
            ops.dwconv_bn_act(**args)
        assert any(name.startswith(CALLED) for name in listener.heard)
    with torch.profiler.profile() as profile:
        ops.dwconv_bn_act(**args)
    assert CALLED in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.randn(2, 16, 9, 8).as_subclass(Subclass)},
        {"x": torch.randn(2, 16, 9, 8, requires_grad=True)},
        {"x": torch._neg_view(torch.randn(2, 16, 9, 8))},
        {"x": torch.randn(2, 16, 9, 8, device="meta")},
        {"x": torch.randn(2, 16, 9, 8).to_sparse()},
        {"x": torch.zeros(2, 16, 9, 8, dtype=torch.int64)},
        {"x": torch.randn(2, 16, 9)},
        {"x": [1.0]},
        {"x": None},
        {"weight": None},
        {"weight": torch.randn(16, 1, 3, 3).bfloat16()},
        {"scale": torch.ones(16, requires_grad=True)},
        {"shift": 1.0},
        {"stride": True},
        {"stride": 0},
        {"stride": (1, 1, 1)},
        {"stride": 2**70},
        {"padding": "same"},
        {"padding": (1, 1, 1, 1, 1)},
        {"padding": -1},
        {"dilation": 1.0},
        {"activation": "gelu"},
        {"activation": b"relu"},
        {"activation": "relu\udc80"},
        {"slope": float("nan")},
        {"slope": 1},
    ],
    ids=str,
)
def test_everything_else_is_left_to_the_dispatcher(changed):
    assert direct(**changed) is None


def test_wrong_numbers_of_arguments():
    assert _C.dwconv_bn_act_direct() is None
    assert _C.dwconv_bn_act_direct(*arguments(), 1) is None


def test_negative_views():
    x, weight, scale, shift, *_ = arguments()
    y = ops.dwconv_bn_act(torch._neg_view(x), weight, scale, shift, padding=1)
    assert torch.equal(y, ops.dwconv_bn_act(-x, weight, scale, shift, padding=1))


def test_nothing_is_kept():
    """Neither references to Python objects nor memory."""
    import gc
    import sys
    import weakref

    args = arguments()
    before = [sys.getrefcount(a) for a in args]
    for _ in range(100):
        y = _C.dwconv_bn_act_direct(*args)
    assert [sys.getrefcount(a) for a in args] == before
    assert sys.getrefcount(y) == 2
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None
