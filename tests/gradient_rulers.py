"""What the tests of gradients measure with: float64 autograd of the reference, and one formula of
tolerance, carried through the backward from that of rulers.py."""

from __future__ import annotations

import torch
from rulers import KINKS, ROUNDING, SMALLEST, Problem
from torch import Tensor

from mnet_kernels import ops, reference

NAMES = ("dx", "dweight", "dscale", "dshift")


def gradients(p: Problem, dy: Tensor, backend: str | None = None) -> list[Tensor | None]:
    """Of all of the problem's tensors, by autograd."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in p.tensors]
    y = ops.dwconv_bn_act(*inputs, **p.constants, backend=backend)
    given = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(y, given, dy))
    return [None if t is None else next(found) for t in inputs]


def exact_gradients(p: Problem, dy: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """In float64 on the CPU, and the |error| that each element may have.

    z is known to its own rounding (rulers.tolerance), and with it act'(z), except at a kink beside
    which z lies. dconv is rounded to the tensors' dtype before its sums are taken; a sum has a
    rounding for every term, and one more to its dtype.
    """

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().cpu().double()

    x, weight, scale, shift = map(wide, p.tensors)
    dy = wide(dy)
    constants = dict(p.constants)
    activation, slope = constants.pop("activation", "relu"), constants.pop("slope", 0.01)

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        q = Problem(x, weight, None, None, constants | {"activation": "identity"})
        return q.run("native")

    def sums(t: Tensor) -> Tensor:
        return t.sum((0, 2, 3))

    def linear(dconv: Tensor) -> tuple[Tensor, Tensor]:
        """What reaches |x| and |weight|."""
        inputs = [x.abs().requires_grad_(), weight.abs().requires_grad_()]
        return torch.autograd.grad(conv(*inputs), inputs, dconv)

    each = (-1, 1, 1)
    factor = (torch.ones(1, dtype=x.dtype) if scale is None else scale).view(each)
    offset = (torch.zeros(1, dtype=x.dtype) if shift is None else shift).view(each)
    exact = gradients(Problem(x, weight, scale, shift, p.constants), dy, "native")
    c = conv(x, weight)
    z = (c * factor + offset).requires_grad_()
    (dz,) = torch.autograd.grad(reference.ACTIVATIONS[activation](z, slope), z, dy)

    step = ROUNDING[torch.float32]
    to_dtype, smallest = ROUNDING[p.x.dtype], SMALLEST[p.x.dtype]
    taps = weight[0].numel()
    conv_error = (taps + 8) * step * conv(x.abs(), weight.abs())
    z_error = conv_error * factor.abs() + (taps + 8) * step * offset.abs()
    dz_error = dy.abs() * (z_error + 16 * step)
    for kink in KINKS.get(activation, ()):
        dz_error = dz_error + dy.abs() * ((z - kink).abs() <= z_error)
    dconv = (dz * factor).abs()
    dconv_error = dz_error * factor.abs() + to_dtype * dconv + smallest

    pixels = dy.numel() // dy.shape[1]
    multiplier = weight.shape[0] // x.shape[1]
    dx, dweight = linear(dconv)
    dx_error, dweight_error = linear(dconv_error)
    errors = [
        dx_error + (taps * multiplier + 8) * step * dx,
        dweight_error + (pixels + 8) * step * dweight,
        sums(dz_error * c.abs() + dz.abs() * conv_error + (pixels + 8) * step * (dz * c).abs()),
        sums(dz_error + (pixels + 8) * step * dz.abs()),
    ]
    allowed = [
        None if g is None else e + ROUNDING[t.dtype] * (g.abs() + e) + SMALLEST[t.dtype]
        for g, e, t in zip(exact, errors, p.tensors, strict=True)
    ]
    return exact, allowed


def assert_gradients(p: Problem, dy: Tensor, found) -> None:
    """Each of `found` that is not None."""
    for name, mine, right, allowed, t in zip(
        NAMES, found, *exact_gradients(p, dy), p.tensors, strict=True
    ):
        if mine is None or right is None:
            continue
        assert mine.dtype == t.dtype and mine.shape == t.shape, name
        wrong = ~((mine.cpu().double() - right).abs() <= allowed)  # NaN is wrong
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off, the first at "
            f"{wrong.nonzero()[0].tolist()}: {mine.cpu()[wrong][0]} instead of {right[wrong][0]}"
        )
