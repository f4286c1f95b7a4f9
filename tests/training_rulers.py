"""What the tests of training measure with: random problems, and float64 autograd of the reference
as the truth, with the tolerance of rulers.py carried through the batch statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import rulers
import torch
from rulers import KINKS, ROUNDING, SMALLEST
from torch import Tensor

from mnet_kernels import dwconv_bn_act_training

NAMES = ("x", "weight", "gamma", "beta")


@dataclass
class Problem:
    """A call of dwconv_bn_act_training with the gradient of its output."""

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

    def wide(self) -> Problem:
        """The same in float64."""
        tensors = (*self.tensors, self.running_mean, self.running_var, self.dy)
        return Problem(*(None if t is None else t.double() for t in tensors), self.constants)


@dataclass
class Outcome:
    y: Tensor
    running_mean: Tensor
    running_var: Tensor
    gradients: dict[str, Tensor]


def problem(
    shape=(2, 16, 9, 11), kernel=(3, 3), *, affine=True, mean=0.0, std=1.0, **kwargs
) -> Problem:
    """As rulers.problem; mean and std of x."""
    p = rulers.problem(shape, kernel, affine=affine, **kwargs)
    p.x.mul_(std).add_(mean)
    outputs, dtype = p.weight.shape[0], p.x.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y = rulers.Problem(*p.tensors, p.constants).run("native")
    dy = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    if kwargs.get("channels_last"):
        dy = dy.to(memory_format=torch.channels_last)
    running = torch.randn(outputs, dtype=wide), torch.rand(outputs, dtype=wide) + 0.5
    return Problem(*p.tensors, *running, dy, p.constants)


def run(p: Problem, backend: str | None = None, wanted=NAMES) -> Outcome:
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(name in wanted)
        for name, t in zip(NAMES, p.tensors, strict=True)
        if t is not None
    }
    running = p.running_mean.clone(), p.running_var.clone()
    y = dwconv_bn_act_training(
        *(leaves.get(name) for name in NAMES), *running, momentum=0.3, eps=1e-3, **p.constants,
        backend=backend or rulers.BACKEND,
    )  # fmt: skip
    given = [name for name in NAMES if name in leaves and name in wanted]
    found = torch.autograd.grad(y, [leaves[name] for name in given], p.dy)
    return Outcome(y.detach(), *running, dict(zip(given, found, strict=True)))


def errors_allowed(p: Problem, exact: Outcome) -> dict[str, Tensor]:
    """Absolute bounds, element by element, for y, the running statistics and the gradients.

    The convolution has one rounding a tap of its magnitude, which its statistics and all that
    follows inherit; a sum over pixels adds one rounding for every two-level step, bounded by
    twice the root of its length. At a kink both derivatives are right. Results are rounded once.
    """
    step = ROUNDING[torch.float64 if p.x.dtype == torch.float64 else torch.float32]
    w = p.wide()
    constants = {k: v for k, v in p.constants.items() if k not in ("activation", "slope")}
    activation = p.constants.get("activation", "relu")

    def conv_of(x, weight):
        linear = constants | {"activation": "identity"}
        return rulers.Problem(x, weight, None, None, linear).run("native")

    def pixels(t):
        return t.sum((0, 2, 3), keepdim=True)

    conv = conv_of(w.x, w.weight)
    taps = w.weight[0].numel()
    count = conv.numel() // conv.shape[1]
    sum_step = step * (16 + 2 * count**0.5)
    conv_error = (taps + 2) * step * conv_of(w.x.abs(), w.weight.abs())
    mean = pixels(conv) / count
    centred = conv - mean
    var = pixels(centred**2) / count
    inverse = (var + 1e-3) ** -0.5
    one = torch.ones(conv.shape[1], dtype=torch.float64)
    gamma = (one if w.gamma is None else w.gamma).view(1, -1, 1, 1)
    beta = (one * 0 if w.beta is None else w.beta).view(1, -1, 1, 1)

    mean_error = pixels(conv_error) / count + sum_step * pixels(centred.abs()) / count
    mean_error = mean_error + step * mean.abs()
    centred_error = conv_error + mean_error + step * conv.abs()
    var_error = pixels(2 * centred.abs() * centred_error + centred_error**2) / count
    var_error = var_error + sum_step * var
    hat = centred * inverse
    relative = 0.5 * inverse**2 * var_error + 4 * step  # of inverse
    hat_error = centred_error * inverse + hat.abs() * relative
    z = hat * gamma + beta
    # z is computed as conv * scale + (beta - mean * scale).
    z_error = hat_error * gamma.abs()
    z_error = z_error + 8 * step * (
        (conv.abs() + mean.abs()) * (inverse * gamma).abs() + beta.abs()
    )

    slope = 1.5
    bounds = {"y": slope * z_error + 8 * step * exact.y.abs()}
    bounds["running_mean"] = (mean_error + step * (mean.abs() + 4)).flatten()
    unbiased = count / (count - 1)
    bounds["running_var"] = ((var_error + step * (var + 4)) * unbiased).flatten()

    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in KINKS.get(activation, ()):
        near |= (z - kink).abs() <= z_error
    dz = w.dy.abs() * slope
    dz_error = dz * (z_error + 16 * step + near)
    dbeta_error = pixels(dz_error) + sum_step * pixels(dz)
    dgamma_error = pixels(dz_error * hat.abs() + dz * hat_error) + sum_step * pixels(dz * hat.abs())
    scale = (gamma * inverse).abs()
    inner = dz + pixels(dz) / count + hat.abs() * pixels(dz * hat.abs()) / count
    inner_error = (
        dz_error
        + dbeta_error / count
        + (hat.abs() * dgamma_error + hat_error * pixels(dz * hat.abs())) / count
    )
    dconv = scale * inner
    dconv_error = scale * inner_error + dconv * (relative + 8 * step)
    dconv_error = dconv_error + ROUNDING[p.x.dtype] * dconv + SMALLEST[p.x.dtype]
    leaves = [w.x.abs().requires_grad_(), w.weight.abs().requires_grad_()]
    magnitudes = conv_of(*leaves)
    multiplier = w.weight.shape[0] // w.x.shape[1]
    x_source = dconv_error + (taps * multiplier + 8) * step * dconv
    weight_source = dconv_error + sum_step * dconv
    (bounds["x"],) = torch.autograd.grad(magnitudes, leaves[:1], x_source, retain_graph=True)
    (bounds["weight"],) = torch.autograd.grad(magnitudes, leaves[1:], weight_source)
    bounds["gamma"], bounds["beta"] = dgamma_error.flatten(), dbeta_error.flatten()
    return bounds


def assert_correct(p: Problem, ours: Outcome) -> None:
    exact = run(p.wide(), "native", tuple(ours.gradients))
    bounds = errors_allowed(p, exact)
    rows = [("y", ours.y, exact.y, p.x.dtype)]
    rows += [
        (name, getattr(ours, name), getattr(exact, name), p.running_mean.dtype)
        for name in ("running_mean", "running_var")
    ]
    types = {name: t.dtype for name, t in zip(NAMES, p.tensors, strict=True) if t is not None}
    rows += [(name, g, exact.gradients[name], types[name]) for name, g in ours.gradients.items()]
    for name, mine, right, dtype in rows:
        assert mine.dtype == dtype and mine.shape == right.shape, name
        allowed = bounds[name] + ROUNDING[dtype] * (right.abs() + bounds[name]) + SMALLEST[dtype]
        wrong = ~((mine.double() - right).abs() <= allowed)  # NaN is wrong
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off, the first at "
            f"{wrong.nonzero()[0].tolist()}: {mine[wrong][0]} instead of {right[wrong][0]}, "
            f"allowed {allowed[wrong][0]}"
        )
