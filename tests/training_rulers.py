"""What the tests of dwconv_bn_act_training measure with: float64 autograd of convolution, batch
norm and activation, and one formula of tolerance, carried from the convolution's rounding (as in
rulers.py) through statistics, activation and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rulers import KINKS, ROUNDING, SMALLEST, Problem
from torch import Tensor

from mnet_kernels import reference

NAMES = ("dx", "dweight", "dgamma", "dbeta")
STEP = ROUNDING[torch.float32]


@dataclass
class Training:
    """A call: the problem's scale and shift are gamma and beta."""

    problem: Problem
    eps: float = 1e-5


def convolution(p: Problem, x: Tensor, weight: Tensor) -> Tensor:
    linear = p.constants | {"activation": "identity"}
    return Problem(x, weight, None, None, linear).run("native")


def forward(t: Training, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, biased var, z) of plain PyTorch on these x, weight, gamma and beta, in their
    dtypes, by default in float64 on the CPU."""
    p = t.problem
    if not tensors:
        tensors = tuple(None if v is None else v.detach().cpu().double() for v in p.tensors)
    x, weight, gamma, beta = tensors
    conv = convolution(p, x, weight)
    var, mean = torch.var_mean(conv.detach().double(), (0, 2, 3), correction=0)
    z = F.batch_norm(conv, None, None, gamma, beta, True, 0, t.eps)
    activate = reference.ACTIVATIONS[p.constants.get("activation", "relu")]
    return activate(z, p.constants.get("slope", 0.01)), mean, var, z


def gradients(t: Training, dy: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Of plain PyTorch for these x, weight, gamma and beta, by default in float64 on the CPU."""
    if not tensors:
        tensors = tuple(None if v is None else v.detach().cpu().double() for v in t.problem.tensors)
        dy = dy.cpu().double()
    inputs = [None if v is None else v.detach().requires_grad_() for v in tensors]
    y = forward(t, *inputs)[0]
    found = iter(torch.autograd.grad(y, [v for v in inputs if v is not None], dy))
    return [None if v is None else next(found) for v in inputs]


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


class _Errors:
    """What each value along the way may be off in float32."""

    def __init__(self, t: Training):
        p = t.problem
        x, weight, gamma, beta = (
            None if v is None else v.detach().cpu().double() for v in p.tensors
        )
        self.x, self.weight = x, weight
        self.conv = conv = convolution(p, x, weight)
        self.y, mean, var, self.z = forward(t)
        self.pixels = pixels = conv.numel() // conv.shape[1]
        self.taps = weight[0].numel()
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        gamma, beta = one if gamma is None else gamma, zero if beta is None else beta

        of_conv = (self.taps + 8) * STEP * convolution(p, x.abs(), weight.abs())
        spread = (conv - _each(mean)).abs()
        sums = (pixels + 8) * STEP
        self.of_mean = (
            of_conv.mean((0, 2, 3)) + 2 * sums * spread.mean((0, 2, 3)) + 2 * STEP * mean.abs()
        )
        off = of_conv.square().mean((0, 2, 3)).sqrt() + self.of_mean
        self.of_var = off * (2 * var.sqrt() + off) + (2 * sums + 2 * STEP) * var
        by_std = (var + t.eps).rsqrt()
        self.relative = self.of_var / (var + t.eps) / 2 + 4 * STEP  # of 1 / std
        self.scale = _each(gamma * by_std)
        self.xhat = (conv - _each(mean)) * _each(by_std)
        self.of_xhat = (of_conv + _each(self.of_mean)) * _each(by_std)
        self.of_xhat = self.of_xhat + self.xhat.abs() * _each(self.relative)
        terms = _each(beta.abs()) + self.scale.abs() * (conv.abs() + _each(mean.abs()))
        self.of_z = _each(gamma.abs()) * self.of_xhat + 4 * STEP * terms
        self.mean, self.var = mean, var


def _assert_within(name: str, mine: Tensor, right: Tensor, allowed: Tensor) -> None:
    assert mine.shape == right.shape, name
    mine = mine.detach().cpu()
    wrong = ~((mine.double() - right).abs() <= allowed)  # NaN is wrong
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off, the first at "
        f"{wrong.nonzero()[0].tolist()}: {mine[wrong][0]} instead of {right[wrong][0]}"
    )


def assert_forward(t: Training, y: Tensor, mean: Tensor, var: Tensor) -> None:
    e, dtype = _Errors(t), t.problem.x.dtype
    assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
    inner = 1.5 * e.of_z + 16 * STEP * e.y.abs()  # |act'| is at most 1.5
    _assert_within("mean", mean, e.mean, e.of_mean)
    _assert_within("var", var, e.var, e.of_var)
    _assert_within("y", y, e.y, ROUNDING[dtype] * (e.y.abs() + inner) + inner + SMALLEST[dtype])


def assert_gradients(t: Training, dy: Tensor, found) -> None:
    """Each of `found` that is not None."""
    p, e, dtype = t.problem, _Errors(t), t.problem.x.dtype
    dy = dy.detach().cpu().double()
    exact = gradients(t, dy)
    activation, slope = p.constants.get("activation", "relu"), p.constants.get("slope", 0.01)
    z = e.z.requires_grad_()
    (dz,) = torch.autograd.grad(reference.ACTIVATIONS[activation](z, slope), z, dy)
    z = z.detach()

    def sums(values: Tensor) -> Tensor:
        return values.sum((0, 2, 3))

    def linear(dconv: Tensor) -> tuple[Tensor, Tensor]:
        """What reaches |x| and |weight|."""
        inputs = [e.x.abs().requires_grad_(), e.weight.abs().requires_grad_()]
        return torch.autograd.grad(convolution(p, *inputs), inputs, dconv)

    steps = (e.pixels + 8) * STEP
    of_dz = dy.abs() * (e.of_z + 16 * STEP)
    for kink in KINKS.get(activation, ()):
        of_dz = of_dz + dy.abs() * ((z - kink).abs() <= e.of_z)
    dbeta, dgamma = sums(dz), sums(dz * e.xhat)
    of_dbeta = sums(of_dz + steps * dz.abs())
    of_dgamma = sums(of_dz * e.xhat.abs() + dz.abs() * e.of_xhat + steps * (dz * e.xhat).abs())
    xhat, m = e.xhat.abs(), e.pixels
    each = dz.abs() + (_each(dbeta.abs()) + xhat * _each(dgamma.abs())) / m
    of_dconv = of_dz + _each(of_dbeta) / m
    of_dconv = of_dconv + (xhat * _each(of_dgamma) + e.of_xhat * _each(dgamma.abs())) / m
    of_dconv = e.scale.abs() * (of_dconv + each * (_each(e.relative) + 8 * STEP))
    dconv = e.scale.abs() * each
    of_dconv = of_dconv + ROUNDING[dtype] * dconv + SMALLEST[dtype]
    terms = e.taps * (e.weight.shape[0] // e.x.shape[1]) + 8
    dx, dweight = linear(dconv)
    of_dx, of_dweight = linear(of_dconv)
    errors = (of_dx + terms * STEP * dx, of_dweight + steps * dweight, of_dgamma, of_dbeta)
    for name, mine, right, error, source in zip(
        NAMES, found, exact, errors, p.tensors, strict=True
    ):
        if mine is None or right is None:
            continue
        assert mine.dtype == source.dtype, name
        allowed = error + ROUNDING[mine.dtype] * (right.abs() + error) + SMALLEST[mine.dtype]
        _assert_within(name, mine, right, allowed)
