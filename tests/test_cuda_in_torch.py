"""The CUDA backend inside torch, on a GPU: opcheck, autocast, torch.compile, swapped networks."""

from __future__ import annotations

import copy

import pytest
import torch
from cuda_rulers import ON_A_GPU, both_layouts
from rulers import Problem, problem
from torch import nn
from torch.library import opcheck

from mnet_kernels import explain, models, ops, swap

pytestmark = ON_A_GPU


def arguments(p: Problem) -> tuple:
    c = p.constants
    return (
        *p.tensors, c.get("stride", 1), c.get("padding", 0), c.get("dilation", 1),
        c.get("activation", "relu"), c.get("slope", 0.01),
    )  # fmt: skip


@both_layouts
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(channels_last, requires_grad):
    p = problem(
        (2, 8, 9, 8), channels_last=channels_last, device="cuda", stride=2,
        padding=(0, 0, 1, 1), activation="relu6",
    )  # fmt: skip
    if requires_grad:
        for t in p.tensors:
            t.requires_grad_()
    opcheck(torch.ops.mnet_kernels.dwconv_bn_act.default, arguments(p))


def test_autocast():
    p = problem((2, 8, 9, 9), device="cuda", padding=1)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = p.run()
    rounded = Problem(p.x.bfloat16(), p.weight.bfloat16(), p.scale, p.shift, p.constants)
    assert torch.equal(y, rounded.run("cuda"))


@both_layouts
def test_compile_fullgraph_with_a_dynamic_batch(channels_last):
    pytest.importorskip("triton")
    weight = torch.randn(8, 1, 3, 3, device="cuda")
    scale, shift = torch.rand(8, device="cuda"), torch.randn(8, device="cuda")

    def model(x):
        y = ops.dwconv_bn_act(x * 2, weight, scale, shift, stride=2, padding=1, activation="relu6")
        return y.mean((2, 3))

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for batch, size in [(2, 12), (5, 12), (3, 9)]:
        x = torch.randn(batch, 8, size, size, device="cuda").to(memory_format=layout)
        torch.testing.assert_close(compiled(x), model(x))


# ---- swap ----
def network() -> nn.Module:
    torch.manual_seed(3)
    model = models.mobilenet_v1(0.25, 10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.8, 1.2)
    return model


@pytest.mark.parametrize("pairs", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_layouts
def test_swapped_network(dtype, channels_last, pairs):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = network().to("cuda", dtype, memory_format=layout)
    fast = swap(model, pairs=pairs)
    ways = [row.backend for row in explain(fast).rows if row.pattern.startswith("conv_dw")]
    assert ways == ["cuda"] * 13
    x = torch.randn(3, 3, 64, 64, device="cuda").to(dtype).to(memory_format=layout)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double())
        ours, native = ((m(x).double() - exact).abs().max() for m in (fast, model))
    slack = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype] * exact.abs().max()
    assert ours <= max(2 * native, slack)
    if pairs is False:  # the stem and the 1x1 convolutions, in one kernel or folded
        reasons = [row.reason for row in explain(fast).rows if row.pattern.startswith("conv_pw")]
        assert len(reasons) >= 13 and all(" in one kernel, " in reason for reason in reasons)
    if pairs is not None:
        assert str(explain(fast)).count("in one pass (measured or set)") == 13 * pairs


@pytest.mark.parametrize("pairs", [True, False])
def test_no_stale_folds(pairs):
    """A step of training changes statistics without a version; weights change in place."""
    model = network().cuda()
    fast = swap(model, pairs=pairs)
    x = torch.randn(4, 3, 64, 64, device="cuda")

    def same():
        with torch.no_grad():
            torch.testing.assert_close(fast.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-3)

    same()
    with torch.no_grad():
        fast.train()(x + 1)
    same()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    same()
    model.load_state_dict(network().state_dict())
    same()


@pytest.mark.parametrize("pairs", [True, False])
def test_a_captured_network_outlives_a_change_of_weights(pairs):
    model = network().cuda()
    fast = swap(model, pairs=pairs)
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        fast(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fast(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
        expected = fast(x)  # folds anew, in the memory that the graph reads
    filler = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(32)]
    graph.replay()
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    del filler
