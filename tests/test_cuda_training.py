"""dwconv_bn_act_training on a GPU: forward and backward against float64, and what only a device can
show. The kernels' arithmetic is also proven without one: test_cuda_emulation_training.py."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from cuda_rulers import ANY, ON_A_GPU, SHAPES, both_layouts, every_dtype
from rulers import Problem, problem
from torch import Tensor, nn
from torch.library import opcheck
from training_rulers import Training, assert_forward, assert_gradients, forward, gradients

import mnet_kernels
from mnet_kernels.reference import ACTIVATIONS

pytestmark = ON_A_GPU


@pytest.fixture(autouse=True)
def _native_in_float32():
    """Not in TF32, which is no ruler."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


FAST = [((k, k), {"stride": s, "padding": k // 2}) for k in (3, 5) for s in (1, 2)]


def constants(t: Training) -> tuple:
    c = t.problem.constants
    lists = [
        list(v) if isinstance(v, tuple) else [] if v == "same" else [v]
        for v in (c.get("stride", 1), c.get("padding", 0), c.get("dilation", 1))
    ]
    return *lists, c.get("activation", "relu"), c.get("slope", 0.01), t.eps


def run(t: Training) -> tuple[Tensor, Tensor, Tensor]:
    y, z, mean, var = torch.ops.mnet_kernels.dwconv_bn_act_training(
        *t.problem.tensors, *constants(t)
    )
    assert z.numel() == 0
    return y, mean, var


def run_backward(t: Training, dy: Tensor, mean: Tensor, var: Tensor, *, data=True, sums=True):
    x, *others = t.problem.tensors
    return torch.ops.mnet_kernels.dwconv_bn_act_training_backward(
        dy, x, x.new_empty(0), *others, mean, var, *constants(t), data, sums
    )


@pytest.fixture
def force():
    """force(name): use these kernels of the backward where they can run, until the test ends."""
    from mnet_kernels import _cuda

    yield _cuda.force_backward
    _cuda.force_backward("")


def check(p: Problem, force) -> None:
    """Every kernel, twice to the same bits."""
    from mnet_kernels import _cuda

    t = Training(p)
    for variant in _cuda.backward_variants():
        force(variant)
        y, mean, var = run(t)
        assert_forward(t, y, mean, var)
        dy = torch.randn_like(y)
        found = run_backward(t, dy, mean, var)
        assert_gradients(t, dy, found)
        again = (*run(t), *run_backward(t, dy, mean, var))
        assert all(torch.equal(a, b) for a, b in zip((y, mean, var, *found), again, strict=True))


@every_dtype
@both_layouts
@pytest.mark.parametrize("kernel,constants", FAST, ids=str)
def test_edges(force, dtype, channels_last, kernel, constants):
    for shape in SHAPES[1:]:
        check(problem(
            shape, kernel, dtype=dtype, channels_last=channels_last, device="cuda",
            activation="relu6", **constants,
        ), force)  # fmt: skip


@every_dtype
@both_layouts
def test_sanitized_training(force, dtype, channels_last):
    """A choice of the edges for compute-sanitizer."""
    for (kernel, constants), shape in itertools.product(FAST, SHAPES[2:9:3]):
        check(problem(
            shape, kernel, dtype=dtype, channels_last=channels_last, device="cuda", margin=0,
            **constants,
        ), force)  # fmt: skip


@every_dtype
@both_layouts
@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_any_kernel(force, dtype, channels_last, kernel, constants):
    for multiplier in (1, 3):
        check(problem(
            (2, 5, 13, 18), kernel, multiplier=multiplier, dtype=dtype, device="cuda",
            channels_last=channels_last, affine=multiplier == 1, **constants,
        ), force)  # fmt: skip


@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(force, channels_last, activation):
    p = problem((2, 8, 9, 8), channels_last=channels_last, device="cuda", padding=1,
                activation=activation, slope=0.2)  # fmt: skip
    p.shift.mul_(4)  # reach all branches
    check(p, force)


@both_layouts
@pytest.mark.parametrize("mean", [0, 1e3])
def test_statistics_of_a_mean_far_from_zero_are_as_good_as_natives(channels_last, mean):
    x = (mean + 1e-2 * torch.randn(8, 64, 28, 28, dtype=torch.float64)).float().cuda()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    affine = torch.rand(64, device="cuda") + 0.5, torch.randn(64, device="cuda")
    weight = torch.rand(64, 1, 3, 3, device="cuda") + 0.5
    t = Training(Problem(x, weight, *affine, {"activation": "silu"}))
    y, *statistics = run(t)
    dy = torch.randn_like(y)
    ours = (y, *run_backward(t, dy, *statistics))
    native = (forward(t, *t.problem.tensors)[0], *gradients(t, dy, *t.problem.tensors))
    exact = (forward(t)[0], *gradients(t, dy))
    for mine, theirs, right in zip(ours, native, exact, strict=True):
        off, other = ((v.cpu().double() - right).norm() / right.norm() for v in (mine, theirs))
        assert off <= 1.5 * other + 5e-7


@both_layouts
def test_large_problems_and_parts(channels_last):
    """Every chunk of the sums is there; what is asked for alone does not change."""
    p = problem((16, 64, 56, 56), channels_last=channels_last, device="cuda", padding=1)
    t = Training(p)
    y, *statistics = run(t)
    assert_forward(t, y, *statistics)
    dy = torch.randn_like(y)
    whole = run_backward(t, dy, *statistics)
    assert_gradients(t, dy, whole)
    data, sums = (
        run_backward(t, dy, *statistics, data=data, sums=not data) for data in (True, False)
    )
    assert torch.equal(data[0], whole[0]) and all(g.numel() == 0 for g in data[1:])
    assert all(torch.equal(a, b) for a, b in zip(sums[1:], whole[1:], strict=True))


def test_an_empty_batch():
    t = Training(problem((0, 8, 5, 6), device="cuda", padding=1))
    y, *statistics = run(t)
    assert y.shape == (0, 8, 5, 6)
    dx, *sums = run_backward(t, torch.empty_like(y), *statistics)
    assert dx.shape == (0, 8, 5, 6)
    assert all((g == 0).all() for g in sums)


def test_in_a_cuda_graph():
    t = Training(problem((2, 32, 14, 14), device="cuda", padding=1))
    y, *statistics = run(t)
    dy = torch.randn_like(y)
    run_backward(t, dy, *statistics)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, *statistics = run(t)
        found = run_backward(t, dy, *statistics)
    for _ in range(2):
        t.problem.x.normal_(), dy.normal_()
        graph.replay()
        assert_forward(t, y, *statistics)
        assert_gradients(t, dy, found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_another_device_than_the_current_one():
    t = Training(problem((2, 32, 14, 14), device="cuda:1", padding=1))
    with torch.cuda.device(0):
        y, *statistics = run(t)
        dy = torch.randn_like(y)
        found = run_backward(t, dy, *statistics)
        assert torch.cuda.current_device() == 0
    assert_forward(t, y, *statistics)
    assert_gradients(t, dy, found)


@both_layouts
def test_opcheck(channels_last):
    p = problem((2, 8, 9, 8), channels_last=channels_last, device="cuda", stride=2, padding=1)
    t = Training(p)
    y, *statistics = run(t)
    x, *others = p.tensors
    utilities = ("test_schema", "test_faketensor")
    opcheck(
        torch.ops.mnet_kernels.dwconv_bn_act_training.default, (*p.tensors, *constants(t)),
        test_utils=utilities,
    )  # fmt: skip
    opcheck(
        torch.ops.mnet_kernels.dwconv_bn_act_training_backward.default,
        (torch.randn_like(y), x, x.new_empty(0), *others, *statistics, *constants(t), True, True),
        test_utils=utilities,
    )


# ---- the public function ----
class Block(nn.Module):
    def __init__(self, fused: bool, channels: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        if not self.fused:
            return nn.functional.relu6(bn(self.conv(x)))
        return mnet_kernels.dwconv_bn_act_training(
            x, self.conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, padding=1,
            activation="relu6", backend="cuda",
        )  # fmt: skip


@both_layouts
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_training_step_is_natives(channels_last, precision, compile):
    """Parameters and running statistics after a step, under autocast and GradScaler too."""
    native = Block(fused=False).cuda()
    ours = copy.deepcopy(native)
    ours.fused = True
    x = torch.randn(8, 16, 14, 14, device="cuda")
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    states = []
    for model in (native, ours):
        call = torch.compile(model, fullgraph=True) if compile and model.fused else model
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda", init_scale=256, enabled=precision == "float16")
        with torch.autocast("cuda", getattr(torch, precision), enabled=precision != "float32"):
            loss = call(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        states.append(model.state_dict())
    slack = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[precision]
    for name, theirs in states[0].items():
        if theirs.is_floating_point():
            torch.testing.assert_close(states[1][name], theirs, rtol=slack, atol=slack)
