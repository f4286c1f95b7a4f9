"""The gradients of dwconv_bn_act on a GPU, against float64 and native."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_rulers import ANY, FAST, ON_A_GPU, SHAPES, both_layouts, every_dtype
from gradient_rulers import assert_gradients, gradients
from rulers import Problem, problem
from torch.library import opcheck

from mnet_kernels import ops
from mnet_kernels.reference import ACTIVATIONS

pytestmark = ON_A_GPU

#: |error| / |gradient| in the norm: twice what the emulated kernels have on such problems.
SLACK = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def check_gradients(p: Problem) -> None:
    """Of every kernel, twice to the same bits."""
    from mnet_kernels import _cuda

    dy = torch.randn_like(p.run("cuda"))
    for variant in _cuda.backward_variants():
        _cuda.force_backward(variant)
        try:
            found, again = (gradients(p, dy, "cuda") for _ in range(2))
        finally:
            _cuda.force_backward("")
        assert_gradients(p, dy, found)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, again, strict=True))


@every_dtype
@both_layouts
@pytest.mark.parametrize("kernel,constants", FAST, ids=str)
def test_gradients_at_edges(dtype, channels_last, kernel, constants):
    for shape in SHAPES:
        check_gradients(problem(
            shape, kernel, dtype=dtype, channels_last=channels_last, device="cuda",
            activation="relu6", **constants,
        ))  # fmt: skip


@every_dtype
@both_layouts
def test_sanitized_gradients(dtype, channels_last):
    """A choice of the edges for compute-sanitizer."""
    for (kernel, constants), shape in itertools.product(FAST, SHAPES[2:9:3]):
        check_gradients(problem(
            shape, kernel, dtype=dtype, channels_last=channels_last, device="cuda", margin=0,
            **constants,
        ))  # fmt: skip


@every_dtype
@both_layouts
@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_gradients_of_any_kernel(dtype, channels_last, kernel, constants, multiplier):
    check_gradients(problem(
        (2, 5, 13, 18), kernel, multiplier=multiplier, dtype=dtype, device="cuda",
        channels_last=channels_last, affine=multiplier == 1, **constants,
    ))  # fmt: skip


@both_layouts
@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 2)])
def test_gradients_are_natives(channels_last, dtype, activation, kernel, stride):
    p = problem(
        (2, 16, 13, 13), (kernel, kernel), dtype=dtype, channels_last=channels_last,
        device="cuda", padding="same", stride=stride, activation=activation,
    )  # fmt: skip
    dy = torch.randn_like(p.run("cuda"))
    ours = gradients(p, dy, "cuda")
    wide = Problem(*(t.detach().cpu().double() for t in p.tensors), p.constants)
    exact = gradients(wide, dy.cpu().double(), "native")
    for mine, right, source in zip(ours, exact, p.tensors, strict=True):
        assert mine.dtype == source.dtype
        error = (mine.cpu().double() - right).norm() / right.norm()
        assert error <= SLACK[dtype], error


@both_layouts
def test_gradients_of_large_problems_and_of_parts(channels_last):
    """Every chunk of the sums is there; each tensor's gradient also comes alone."""
    p = problem((16, 64, 56, 56), channels_last=channels_last, device="cuda", padding=1)
    check_gradients(p)
    dy = torch.randn_like(p.run("cuda"))
    whole = gradients(p, dy, "cuda")
    for i, right in enumerate(whole):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(p.tensors)]
        Problem(*alone, p.constants).run("cuda").backward(dy)
        assert torch.equal(alone[i].grad, right)


def test_gradients_of_an_empty_batch_are_zero():
    p = problem((0, 8, 5, 6), device="cuda", padding=1)
    dx, *sums = gradients(p, torch.empty(0, 8, 5, 6, device="cuda"), "cuda")
    assert dx.shape == p.x.shape
    assert all((t == 0).all() for t in sums)


def test_second_derivatives_are_natives():
    p = problem((1, 4, 5, 6), device="cuda", padding=1, activation="silu")
    inputs = [t.requires_grad_() for t in p.tensors]
    second = []
    for backend in ("cuda", "native"):
        y = ops.dwconv_bn_act(*inputs, **p.constants, backend=backend)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_backward_in_a_cuda_graph():
    p = problem((2, 32, 14, 14), device="cuda", padding=1)
    dy = torch.randn_like(p.run("cuda"))
    constants = ([1, 1], [1, 1], [1, 1], "relu", 0.0, True, True)
    call = torch.ops.mnet_kernels.dwconv_bn_act_backward
    call(dy, *p.tensors, *constants)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(dy, *p.tensors, *constants)
    for _ in range(2):
        dy.normal_()
        graph.replay()
        assert_gradients(p, dy, found)


@pytest.mark.parametrize("change,sentence", [
    ({"dy": torch.randn(2, 4, 8, 7)}, r"dy: expected the output's shape \(2, 4, 8, 8\), got"),
    ({"dy": torch.randn(2, 4, 8, 8).double()}, "dy: expected x's dtype float32, got float64"),
    ({"weight": torch.randn(5, 1, 3, 3)}, "weight: expected shape"),
    ({"scale": torch.ones(3)}, "scale: expected shape"),
])  # fmt: skip
def test_bad_input_of_the_backward(change, sentence):
    tensors = {
        "dy": torch.randn(2, 4, 8, 8), "x": torch.randn(2, 4, 8, 8),
        "weight": torch.randn(4, 1, 3, 3), "scale": torch.ones(4), "shift": torch.ones(4),
    } | change  # fmt: skip
    with pytest.raises(RuntimeError, match="^dwconv_bn_act_backward: " + sentence):
        torch.ops.mnet_kernels.dwconv_bn_act_backward(
            *(t.cuda() for t in tensors.values()), 1, 1, 1, "relu", 0.0, True, True
        )


@both_layouts
def test_opcheck_of_the_backward(channels_last):
    p = problem((2, 8, 9, 8), channels_last=channels_last, device="cuda", stride=2, padding=1)
    dy = torch.randn_like(p.run("cuda"))
    opcheck(
        torch.ops.mnet_kernels.dwconv_bn_act_backward.default,
        (dy, *p.tensors, [2], [1], [1], "relu6", 0.0, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )
