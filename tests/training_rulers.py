"""What the tests of training measure with: float64 autograd of convolution, batch norm and
activation, and one formula of tolerance, derived from the dtype's rounding.

Rounding errors are followed from the convolution (as in rulers.py) through statistics, activation
and backward. Those of different elements are independent: what adds many of them up has the root
of the sum of their squares. Those of a channel's statistics are shared by all its elements: a sum
over them is off by the error times the sum of what it is multiplied by, signs included. A sum's own
roundings are in proportion to its partial sums, not to the sum of its terms' magnitudes. So what is
allowed of a gradient over 100,000 pixels is a hundred thousandth of its usual size. A result may be
off by SIGMAS times what comes out. At a kink both derivatives are right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import rulers
import torch
import torch.nn.functional as F
from rulers import KINKS, ROUNDING, SMALLEST, Problem
from torch import Tensor

from mnet_kernels import dwconv_bn_act_training, reference

NAMES = ("x", "weight", "gamma", "beta")
SIGMAS = 6
#: Terms of the longest run that is summed one by one; the sums of runs are added up.
RUN = 1024
#: The largest second derivative of the activations that are no straight lines.
CURVATURE = {"silu": 0.5, "hardswish": 1 / 3}


def depthwise(p: Problem, x: Tensor, weight: Tensor) -> Tensor:
    linear = p.constants | {"activation": "identity"}
    return Problem(x, weight, None, None, linear).run("native")


@dataclass
class Training:
    """A call: the problem's scale and shift are gamma and beta. What is right is computed once,
    for all that is held against it."""

    problem: Problem
    eps: float = 1e-5
    #: (problem, x, weight) to the convolution.
    convolve: Callable[[Problem, Tensor, Tensor], Tensor] = depthwise

    @cached_property
    def errors(self) -> _Errors:
        return _Errors(self)

    def right_gradients(self, dy: Tensor) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """In float64, and how far off ours may be."""
        if self._right is None or self._right[0] is not dy:
            self._right = dy, gradients(self, dy), self.errors.backward(_wide(dy))
        return self._right[1:]

    _right: tuple | None = field(default=None, init=False, repr=False, compare=False)


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().cpu().double()


def _activated(t: Training, z: Tensor) -> Tensor:
    activate = reference.ACTIVATIONS[t.problem.constants.get("activation", "relu")]
    return activate(z, t.problem.constants.get("slope", 0.01))


def forward(t: Training, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, biased var, z) of plain PyTorch on these x, weight, gamma and beta, in their
    dtypes, by default in float64 on the CPU."""
    x, weight, gamma, beta = tensors or map(_wide, t.problem.tensors)
    conv = t.convolve(t.problem, x, weight)
    var, mean = torch.var_mean(conv.detach().double(), (0, 2, 3), correction=0)
    z = F.batch_norm(conv, None, None, gamma, beta, True, 0, t.eps)
    return _activated(t, z), mean, var, z


def gradients(t: Training, dy: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Of plain PyTorch for these x, weight, gamma and beta, by default in float64 on the CPU."""
    if not tensors:
        tensors, dy = tuple(map(_wide, t.problem.tensors)), dy.cpu().double()
    inputs = [None if v is None else v.detach().requires_grad_() for v in tensors]
    y = forward(t, *inputs)[0]
    found = iter(torch.autograd.grad(y, [v for v in inputs if v is not None], dy))
    return [None if v is None else next(found) for v in inputs]


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def _sums(values: Tensor) -> Tensor:
    return values.sum((0, 2, 3))


class _Errors:
    """The standard errors of what is computed along the way: ``_i``, independent from element to
    element, ``_s``, shared by a channel."""

    def __init__(self, t: Training) -> None:
        self.t = t
        p = t.problem
        self.step = u = ROUNDING[torch.float64 if p.x.dtype == torch.float64 else torch.float32]
        self.x, self.weight, gamma, beta = map(_wide, p.tensors)
        self.conv = conv = t.convolve(p, self.x, self.weight)
        self.y, self.mean, self.var, self.z = forward(t)
        self.pixels = n = conv.numel() // conv.shape[1]
        taps = self.weight[0].numel()
        gamma = torch.ones_like(self.mean) if gamma is None else gamma
        beta = torch.zeros_like(self.mean) if beta is None else beta

        conv_i = (taps + 2) ** 0.5 * u * t.convolve(p, self.x.abs(), self.weight.abs())
        centred = conv - _each(self.mean)
        # Summed is the distance from a pivot that is a standard deviation from the mean at most.
        std = self.var.sqrt()
        self.mean_s = _sums(conv_i**2).sqrt() / n + u * self.mean.abs()
        self.mean_s = self.mean_s + self.of_sum(2 * n * self.var, n * std) / n
        self.var_s = 2 * _sums((centred * conv_i) ** 2).sqrt() / n + _sums(conv_i**2) / n
        squares = 2 * (centred**2 + _each(self.var))
        self.var_s = (
            self.var_s + self.mean_s**2 + self.of_sum(_sums(squares**2), _sums(squares)) / n
        )
        self.inverse = inverse = (self.var + t.eps).rsqrt()
        self.relative = self.var_s / (self.var + t.eps) / 2 + 4 * u  # of 1 / std
        self.scale = _each(gamma * inverse)
        self.hat = centred * _each(inverse)
        self.hat_i = conv_i * _each(inverse) + 2 * u * self.hat.abs()
        self.hat_s = _each(self.mean_s * inverse) + self.hat.abs() * _each(self.relative)
        # z is computed as conv * scale + (beta - mean * scale).
        weight = _each(gamma.abs())
        self.z_i = weight * self.hat_i + 2 * u * (self.scale * conv).abs()
        #: What is shared: all of a channel by the one, in proportion to hat by the other.
        self.z_moved = (gamma * inverse).abs() * (self.mean_s + 2 * u * self.mean.abs())
        self.z_moved = self.z_moved + 2 * u * beta.abs()
        self.z_stretched = gamma.abs() * self.relative
        self.z_s = _each(self.z_moved) + self.hat.abs() * _each(self.z_stretched)

    def of_sum(self, squares: Tensor, total: Tensor) -> Tensor:
        """Of a sum over pixels, from the sum of its terms' squares and the sum itself: the root of
        the sum of squares of its partial sums, in steps. In a run, and from run to run, they walk
        at random, and climb by what the terms have in common."""
        n, m = self.pixels, min(self.pixels, RUN)
        walks, climbs = (m + n / m) / 2, (n / m + m**2 / n) / 3
        return self.step * ((walks * squares + climbs * total**2).sqrt() + 2 * total.abs())

    def forward(self) -> dict[str, Tensor]:
        inner = 1.5 * (self.z_i + self.z_s) + 8 * self.step * self.y.abs()  # |act'| is at most 1.5
        return {"y": SIGMAS * inner, "mean": SIGMAS * self.mean_s, "var": SIGMAS * self.var_s}

    def backward(self, dy: Tensor) -> dict[str, Tensor]:
        p, u, n = self.t.problem, self.step, self.pixels
        z = self.z.detach().requires_grad_()
        activation = p.constants.get("activation", "relu")
        curved, near, bent = (
            CURVATURE.get(activation, 0),
            torch.zeros_like(dy),
            torch.zeros_like(dy),
        )
        (dz,) = torch.autograd.grad(_activated(self.t, z), z, dy, create_graph=curved > 0)
        if curved:
            (bent,) = torch.autograd.grad(dz.sum(), z)
            dz = dz.detach()
        for kink in KINKS.get(activation, ()):
            near[(self.z - kink).abs() <= SIGMAS * (self.z_i + self.z_s)] = 1
        signed, hat, dy = dz, self.hat.abs(), dy.abs()
        dz_i = curved * dy * self.z_i + (8 if curved else 2) * u * dy
        dz_s, dz_near = curved * dy * self.z_s, 1.5 * dy * near
        dbeta, dgamma = _sums(dz), _sums(dz * self.hat)
        dz = dz.abs()

        def of_sum(i: Tensor, terms: Tensor, total: Tensor) -> Tensor:
            return _sums(i**2).sqrt() + self.of_sum(_sums(terms**2), total)

        def by_z(add_up: Callable[[Tensor], Tensor], each: Callable[[Tensor], Tensor]) -> Tensor:
            """What z's shared error makes of a sum."""
            moved = add_up(bent).abs() * each(self.z_moved)
            return moved + add_up(bent * self.hat).abs() * each(self.z_stretched)

        def same(values: Tensor) -> Tensor:
            return values

        dbeta_s, dbeta_near = of_sum(dz_i, dz, dbeta) + by_z(_sums, same), _sums(dz_near)
        dgamma_i, dgamma_near = dz_i * hat + dz * self.hat_i, _sums(dz_near * hat)
        dgamma_s = of_sum(dgamma_i, dz * hat, dgamma)
        dgamma_s = dgamma_s + by_z(lambda t: _sums(t * self.hat), same)
        mean_s = self.mean_s * self.inverse  # of hat, besides its relative error
        dgamma_s = dgamma_s + dbeta.abs() * mean_s + dgamma.abs() * self.relative
        terms = dz + (_each(dbeta.abs()) + hat * _each(dgamma.abs())) / n
        inner_i = dz_i + self.hat_i * _each(dgamma.abs()) / n + 4 * u * terms
        inner_s = dz_s + (_each(dbeta_s) + hat * _each(dgamma_s)) / n
        inner_s = inner_s + self.hat_s * _each(dgamma.abs()) / n
        inner_near = dz_near + (_each(dbeta_near) + hat * _each(dgamma_near)) / n
        scale, dtype = self.scale.abs(), p.x.dtype
        dconv_i = scale * inner_i
        if dtype not in (torch.float32, torch.float64):  # may be rounded before its sums are taken
            dconv_i = dconv_i + ROUNDING[dtype] * scale * terms + SMALLEST[dtype]
        dconv_s = scale * (inner_s + terms * _each(self.relative))

        def reaching(x: Tensor, weight: Tensor, dconv: Tensor) -> tuple[Tensor, Tensor]:
            inputs = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
            return torch.autograd.grad(self.t.convolve(p, *inputs), inputs, dconv)

        squares = reaching(self.x**2, self.weight**2, dconv_i**2)
        shared = reaching(self.x.abs(), self.weight.abs(), dconv_s)[0]
        beside = reaching(self.x.abs(), self.weight.abs(), scale * inner_near)
        magnitudes = reaching(self.x.abs(), self.weight.abs(), scale * terms)[0]
        rounding = (self.weight.numel() // self.x.shape[1] + 8) ** 0.5 * u
        dx = SIGMAS * (squares[0].sqrt() + shared + rounding * magnitudes) + beside[0]

        def to_weight(x: Tensor, dconv: Tensor) -> Tensor:
            return reaching(x, self.weight, dconv)[1]

        def each(values: Tensor) -> Tensor:
            return values.view(-1, 1, 1, 1)

        dconv = self.scale * (signed - (_each(dbeta) + self.hat * _each(dgamma)) / n)
        exact = to_weight(self.x, dconv)
        shared = to_weight(self.x, self.scale.expand_as(dz)).abs() * each(
            (dbeta_s + 2 * u * dbeta.abs() + dgamma.abs() * mean_s) / n
        )
        shared = shared + to_weight(self.x, self.scale * self.hat).abs() * each(
            (dgamma_s + dgamma.abs() * (self.relative + 2 * u)) / n
        )
        shared = shared + exact.abs() * each(self.relative)
        shared = shared + by_z(lambda t: to_weight(self.x, self.scale * t), each)
        rounded = self.of_sum(to_weight(self.x**2, dconv**2), exact)
        dweight = SIGMAS * (squares[1].sqrt() + shared + rounded) + beside[1]
        return {
            "x": dx,
            "weight": dweight,
            "gamma": SIGMAS * dgamma_s + dgamma_near,
            "beta": SIGMAS * dbeta_s + dbeta_near,
        }


def _assert_within(name: str, mine: Tensor, right: Tensor, error: Tensor, dtype) -> None:
    """error: besides the rounding of the result to its dtype."""
    assert mine.dtype == dtype and mine.shape == right.shape, name
    mine = mine.detach().cpu()
    allowed = error + ROUNDING[dtype] * (right.abs() + error) + SMALLEST[dtype]
    wrong = ~((mine.double() - right).abs() <= allowed)  # NaN is wrong
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off, the first at "
        f"{wrong.nonzero()[0].tolist()}: {mine[wrong][0]} instead of {right[wrong][0]}, "
        f"allowed {allowed[wrong][0]}"
    )


def _statistics_dtype(p: Problem) -> torch.dtype:
    return torch.float64 if p.x.dtype == torch.float64 else torch.float32


def assert_forward(t: Training, y: Tensor, mean: Tensor, var: Tensor) -> None:
    e, dtype, wide = t.errors, t.problem.x.dtype, _statistics_dtype(t.problem)
    errors = e.forward()
    _assert_within("mean", mean, e.mean, errors["mean"], wide)
    _assert_within("var", var, e.var, errors["var"], wide)
    _assert_within("y", y, e.y, errors["y"], dtype)


def assert_gradients(t: Training, dy: Tensor, found) -> None:
    """Each of `found` that is not None."""
    exact, errors = t.right_gradients(dy)
    for name, mine, right, source in zip(NAMES, found, exact, t.problem.tensors, strict=True):
        if mine is not None and right is not None:
            _assert_within(name, mine, right, errors[name], source.dtype)


# ---- whole calls, with running statistics ----
EPS, MOMENTUM = 1e-3, 0.3


@dataclass
class Call:
    """A call of the public function with the gradient of its output."""

    x: Tensor
    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    dy: Tensor
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.gamma, self.beta

    @property
    def training(self) -> Training:
        return Training(Problem(*self.tensors, self.constants), EPS)

    def wide(self) -> Call:
        """The same in float64."""
        tensors = (*self.tensors, self.running_mean, self.running_var, self.dy)
        return Call(*map(_wide, tensors), self.constants)


@dataclass
class Outcome:
    y: Tensor
    running_mean: Tensor
    running_var: Tensor
    gradients: dict[str, Tensor]


def problem(
    shape=(2, 16, 9, 11), kernel=(3, 3), *, affine=True, mean=0.0, std=1.0, **kwargs
) -> Call:
    """As rulers.problem; mean and std of x."""
    p = rulers.problem(shape, kernel, affine=affine, **kwargs)
    p.x.mul_(std).add_(mean)
    outputs, wide = p.weight.shape[0], _statistics_dtype(p)
    y = p.run("native")
    dy = torch.randn(y.shape, dtype=torch.float64).to(p.x.dtype)
    if kwargs.get("channels_last"):
        dy = dy.to(memory_format=torch.channels_last)
    running = torch.randn(outputs, dtype=wide), torch.rand(outputs, dtype=wide) + 0.5
    return Call(*p.tensors, *running, dy, p.constants)


def run(p: Call, backend: str | None = None, wanted=NAMES, operator=None) -> Outcome:
    """operator: instead of dwconv_bn_act_training on that backend."""
    if operator is None:
        constants = {"backend": backend or rulers.BACKEND, **p.constants}
        operator = dwconv_bn_act_training
    else:
        constants = p.constants
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(name in wanted)
        for name, t in zip(NAMES, p.tensors, strict=True)
        if t is not None
    }
    running = p.running_mean.clone(), p.running_var.clone()
    y = operator(
        *(leaves.get(name) for name in NAMES), *running, momentum=MOMENTUM, eps=EPS, **constants
    )
    given = [name for name in NAMES if name in leaves and name in wanted]
    found = torch.autograd.grad(y, [leaves[name] for name in given], p.dy)
    return Outcome(y.detach(), *running, dict(zip(given, found, strict=True)))


def assert_correct(p: Call, ours: Outcome, training: Training | None = None) -> None:
    training = training or p.training
    e, dtype = training.errors, p.x.dtype
    errors = e.forward()
    _assert_within("y", ours.y, e.y, errors["y"], dtype)
    unbiased = e.pixels / (e.pixels - 1)
    for name, batch, error in (
        ("running_mean", e.mean, errors["mean"]),
        ("running_var", e.var * unbiased, errors["var"] * unbiased),
    ):
        before = getattr(p, name)
        right = (1 - MOMENTUM) * before.double() + MOMENTUM * batch
        terms = before.double().abs() + batch.abs()
        error = MOMENTUM * error + 4 * e.step * terms
        _assert_within(name, getattr(ours, name), right, error, before.dtype)
    found = [ours.gradients.get(name) for name in NAMES]
    assert_gradients(training, p.dy, found)
