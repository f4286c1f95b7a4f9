"""dwconv_bn_act_training on Triton, forward and backward, in its interpreter (test_triton.py runs
this file) against float64."""

from __future__ import annotations

import pytest
import rulers
import torch
import torch.nn.functional as F
from rulers import problem
from torch.library import opcheck
from training_rulers import Training, assert_forward, assert_gradients, forward

from mnet_kernels.reference import ACTIVATIONS
from mnet_kernels.registration import pair

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(rulers.BACKEND is None, reason="runs in Triton's interpreter"),
]
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


def constants_of(t: Training) -> tuple:
    c = {"stride": 1, "padding": 0, "dilation": 1, "activation": "relu", "slope": 0.01}
    c |= t.problem.constants
    padding = {int: lambda p: (p,) * 4, str: lambda p: ()}.get(
        type(c["padding"]), lambda p: (*p, *p)[:4]
    )
    return (
        pair(c["stride"]), padding(c["padding"]), pair(c["dilation"]), c["activation"],
        c["slope"], t.eps,
    )  # fmt: skip


def operator(t: Training, tensors=None):
    from mnet_kernels.triton.operators import dwconv_bn_act_training

    return dwconv_bn_act_training(*(tensors or t.problem.tensors), *constants_of(t))


def check(p, eps=1e-5) -> None:
    t = Training(p, eps)
    leaves = [
        None if v is None else v.detach().clone(memory_format=torch.preserve_format)
        for v in p.tensors
    ]
    given = [v.requires_grad_() for v in leaves if v is not None]
    y, mean, var = operator(t, leaves)
    assert_forward(t, y, mean, var)
    assert not mean.requires_grad
    assert y.is_contiguous() or not p.x.is_contiguous()
    dy = torch.randn(y.shape, dtype=torch.float64).to(y)
    found = iter(torch.autograd.grad(y, given, dy))
    assert_gradients(t, dy, [None if v is None else next(found) for v in leaves])


@both_layouts
@pytest.mark.parametrize("dtype", rulers.DTYPES, ids=str)
@pytest.mark.parametrize("stride,size", [(1, (7, 7)), (2, (6, 8))])
def test_fast_paths(channels_last, dtype, stride, size):
    p = problem(
        (3, 9, *size), dtype=dtype, channels_last=channels_last, stride=stride, padding=1,
        activation="relu6",
    )  # fmt: skip
    check(p)


@both_layouts
@pytest.mark.parametrize(
    "kernel,constants",
    [
        ((2, 3), {"padding": (1, 0, 0, 2), "multiplier": 2}),
        ((3, 5), {"dilation": (2, 1), "padding": (2, 2, 2, 2), "stride": (1, 2)}),
        ((5, 5), {"stride": 2, "padding": "same"}),
        ((8, 8), {"padding": 4, "stride": (2, 3)}),
    ],
    ids=str,
)
def test_any_kernel_stride_dilation_padding(channels_last, kernel, constants):
    check(problem((2, 3, 7, 6), kernel, channels_last=channels_last, **constants))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    p = problem((2, 5, 4, 5), channels_last=True, padding=1, activation=activation)
    p.scale.mul_(3)  # reach all branches
    check(p)


def test_without_gamma_and_beta():
    check(problem((2, 3, 4, 5), affine=False), eps=1e-3)


@both_layouts
def test_many_chunks_of_pixels(channels_last):
    """More partial statistics than one, the last of fewer tiles, and the same bits again. With ten
    taps, from where the weights are kept out of registers."""
    p = problem((7, 2, 16, 16), (2, 5), channels_last=channels_last, padding=(1, 2))
    check(p)
    assert all(map(torch.equal, operator(Training(p)), operator(Training(p))))


@both_layouts
def test_a_large_mean_costs_nothing(channels_last):
    """Mean 1000, deviation 0.01: never less accurate than native, whose rounded mean costs both the
    same at least."""
    p = problem((4, 4, 16, 16), (1, 1), channels_last=channels_last, activation="identity")
    p.x.mul_(0.01).add_(1000)
    p.weight.fill_(1)
    t = Training(p)
    y, mean, var = operator(t)
    exact_y, exact_mean, exact_var, _ = forward(t)
    running = torch.zeros(4), torch.zeros(4)
    conv = F.conv2d(p.x, p.weight, groups=4)
    native_y = F.batch_norm(conv, *running, p.scale, p.shift, True, 1.0, t.eps)
    native_var = running[1] * (1023 / 1024)

    def error(ours, exact):
        return (ours.double() - exact).abs().max()

    assert error(mean, exact_mean) <= max(error(running[0], exact_mean), 2.0**-15)
    assert error(var, exact_var) <= error(native_var, exact_var)
    assert error(y, exact_y) <= error(native_y, exact_y)
    assert (error(var, exact_var) / exact_var.min()) < 1e-5


@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 3)], ids=str)
def test_only_what_is_needed(wanted):
    p = problem((2, 3, 5, 4), channels_last=True)
    t = Training(p)
    leaves = [v.detach().clone() for v in p.tensors]
    for i in wanted:
        leaves[i].requires_grad_()
    y, *_ = operator(t, leaves)
    dy = torch.randn_like(y)
    found = iter(torch.autograd.grad(y, [leaves[i] for i in wanted], dy))
    assert_gradients(t, dy, [next(found) if i in wanted else None for i in range(4)])


def test_gradients_of_gradients_are_natives():
    t = Training(problem((2, 2, 4, 5), padding=1, activation="silu"))
    results = []
    for call in (lambda leaves: operator(t, leaves)[0], lambda leaves: forward(t, *leaves)[0]):
        leaves = [v.detach().clone().requires_grad_() for v in t.problem.tensors]
        first = torch.autograd.grad(call(leaves).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, native in zip(*results, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-5 * native.abs().max().item())


def test_empty_batch():
    t = Training(problem((0, 4, 5, 6), padding=1))
    leaves = [v.detach().clone().requires_grad_() for v in t.problem.tensors]
    y, mean, var = operator(t, leaves)
    assert y.shape == (0, 4, 5, 6)
    assert not mean.any() and not var.any()
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), leaves))


def test_opcheck():
    t = Training(problem((2, 3, 5, 4), channels_last=True, multiplier=2, activation="silu"))
    y, mean, var = operator(t)
    ops = torch.ops.mnet_kernels
    call = (torch.randn_like(y), *t.problem.tensors, mean, var, *constants_of(t), True, True)
    opcheck(ops.dwconv_bn_act_training_triton_backward.default, call)
    for v in t.problem.tensors:
        v.requires_grad_()
    opcheck(ops.dwconv_bn_act_training_triton.default, (*t.problem.tensors, *constants_of(t)))


def test_autocast_convolves_in_the_autocast_dtype():
    p = problem((2, 3, 5, 6), padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, mean, _ = operator(Training(p))
    q = rulers.Problem(p.x.bfloat16(), p.weight.bfloat16(), p.scale, p.shift, p.constants)
    assert mean.dtype == torch.float32
    assert torch.equal(y, operator(Training(q))[0])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(1, 3, 3, 3)}, "x: expected more than one value a channel in training"),
        ({"gamma": torch.zeros(4)}, r"gamma: expected shape \(3,\) of float32, got shape \(4,\)"),
        ({"beta": torch.zeros(3).double()}, "beta: expected .* got shape .* of float64"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, "weight: expected"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    call = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(3, 1, 3, 3), "gamma": None,
            "beta": None} | change  # fmt: skip
    t = Training(rulers.Problem(*call.values()))
    with pytest.raises(RuntimeError, match=f"dwconv_bn_act_training: {message}"):
        operator(t)
