"""Gradients of the backends with a backward of their own, against float64."""

from __future__ import annotations

import pytest
import rulers
import torch
from rulers import DTYPES, Problem, assert_gradients_correct, problem

from mnet_kernels.reference import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def gradients(p: Problem, dy: torch.Tensor, names=("x", "weight", "scale", "shift")):
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format)
        for name, t in zip(("x", "weight", "scale", "shift"), p.tensors, strict=True)
        if t is not None
    }
    wanted = [leaves[name].requires_grad_() for name in names if name in leaves]
    y = Problem(*(leaves.get(n) for n in ("x", "weight", "scale", "shift")), p.constants).run()
    found = torch.autograd.grad(y, wanted, dy)
    return dict(zip([name for name in names if name in leaves], found, strict=True))


def check(p: Problem, **choice) -> None:
    dy = torch.randn(p.run("native").shape, dtype=torch.float64).to(p.x.dtype)
    assert_gradients_correct(p, dy, gradients(p, dy, **choice))


@every_dtype
@both_layouts
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (6, 16), (13, 5)], ids=str)
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 2)])
def test_fast_paths(dtype, channels_last, size, kernel, stride):
    check(
        problem(
            (2, 5, *size), (kernel, kernel), dtype=dtype, channels_last=channels_last,
            stride=stride, padding=kernel // 2, activation="relu6",
        )
    )  # fmt: skip


@both_layouts
@pytest.mark.parametrize(
    "kernel,constants",
    [
        ((1, 1), {"stride": 2}),
        ((2, 3), {"padding": (1, 2)}),
        ((4, 4), {"stride": 4}),
        ((3, 3), {"stride": (1, 2), "padding": (2, 0)}),
        ((3, 5), {"dilation": (3, 2), "padding": (3, 4), "stride": (2, 3)}),
        ((3, 3), {"padding": (3, 0, 1, 2)}),
        ((5, 5), {"stride": 2, "padding": "same"}),
        ((1, 11), {"padding": (0, 5)}),
        ((8, 8), {"padding": 4, "stride": (1, 3)}),
        ((2, 2), {"stride": 5, "padding": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_any_kernel_stride_dilation_padding(channels_last, kernel, constants, multiplier):
    p = problem(
        (1, 3, 9, 8), kernel, multiplier=multiplier, channels_last=channels_last, **constants
    )
    check(p)


@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(channels_last, activation):
    p = problem(
        (1, 5, 4, 6), channels_last=channels_last, padding=1, activation=activation, slope=0.2
    )
    p.shift *= 4  # reach all branches
    check(p)


@both_layouts
def test_many_chunks_of_pixels(channels_last):
    """More partial sums than one, the last of them of fewer tiles."""
    check(problem((7, 2, 16, 16), channels_last=channels_last, padding=1))


@both_layouts
def test_the_same_call_gives_the_same_bits(channels_last):
    p = problem((5, 2, 12, 16), channels_last=channels_last, padding=1, activation="silu")
    dy = torch.randn(5, 2, 12, 16)
    first, second = gradients(p, dy), gradients(p, dy)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("names", [("x",), ("weight",), ("scale",), ("shift", "x")], ids=str)
def test_only_what_is_needed(names):
    check(problem((1, 3, 5, 6), channels_last=True), names=names)


def test_without_scale_and_shift():
    check(problem((1, 3, 5, 6), affine=False))


@both_layouts
@pytest.mark.parametrize("choice", range(3))
def test_inf_outside_of_every_output_stays_there(monkeypatch, channels_last, choice):
    """The last row and column lie inside a patch, but no output reads them."""
    if rulers.BACKEND == "triton":
        from mnet_kernels.triton import launch

        monkeypatch.setattr(launch, "interpreted_choice", choice)
    p = problem((1, 4 * choice + 3, 6, 8), channels_last=channels_last, stride=2)
    p.x[:, :, -1] = float("inf")
    p.x[:, :, :, -1] = float("nan")
    found = gradients(p, torch.randn(1, 4 * choice + 3, 2, 3))
    assert all(t.isfinite().all() for t in found.values())


@both_layouts
def test_empty_batch(channels_last):
    p = problem((0, 4, 5, 6), channels_last=channels_last, padding=1)
    found = gradients(p, torch.randn(0, 4, 5, 6))
    assert found["x"].shape == (0, 4, 5, 6)
    assert all(not found[name].any() for name in ("weight", "scale", "shift"))


def test_strides_of_the_incoming_gradient():
    p = problem((2, 3, 5, 6), channels_last=True, padding=1)
    wide = torch.randn(2, 5, 6, 6)
    for dy in (wide[:, :3, :, :6][:, :, :5], torch.randn(1).expand(2, 3, 5, 6)):
        assert_gradients_correct(p, dy, gradients(p, dy))


def test_gradients_of_gradients_are_natives():
    p = problem((1, 2, 4, 5), padding=1, activation="silu")
    results = []
    for backend in (None, "native"):
        leaves = [t.detach().clone().requires_grad_() for t in p.tensors]
        y = Problem(*leaves, p.constants).run(backend)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, native in zip(*results, strict=True):
        torch.testing.assert_close(ours, native, rtol=0, atol=1e-5 * native.abs().max().item())
