"""How far off ours may be on a GPU, an element: derived of its roundings, so that a right kernel
passes and a wrong tap, channel or pixel does not.

Against float64 on the same inputs, act(scale * sum(t) + shift) of K products t = x * w is off by

- n = K + 8 roundings of the accumulator, the affine and the activation's few steps: at most
  n * u(float32) * (|scale| * sum|t| + |shift|), as tests/rulers.py has it; where n is large, at
  most 8 * sqrt(n) * u(float32) (*) of the partial sums, |sum(t)| + 8 * sqrt(sum t**2) (*);
- what x itself is off by, times |w| and |scale|;
- the rounding of factors before they are multiplied: both of a dense convolution's to TF32 where it
  may be (u = 2**-11), x where it is what a convolution before stored. For each, the errors of the
  terms are independent and within u * |t| of their mean, which is 0 where to the nearest is rounded
  and u * t where the rest is cut off: no further off that mean than 8 * u * sqrt(sum t**2) (*);
- u(dtype) of the result, which is stored.

(*) By Hoeffding's inequality, but for one output in 10**13: in 10**7 outputs a wrong verdict in a
million rows.

Activations are taken to have a slope of at most 1, as ReLU6 has.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT32, TF32 = 2.0**-24, 2.0**-11
_DEVIATIONS = 8
#: Of peers, relative to the largest result: what is further off is not the same thing.
PEERS = 5e-2


@torch.no_grad()
def allowed(module: nn.Sequential, x: Tensor, dtype: torch.dtype, tf32: bool = False) -> Tensor:
    """|error| allowed of each element of ``module(x)``.

    Args:
        module: convolution, BatchNorm, activation, once or several times; float64, in eval mode.
        x: float64, of values that dtype has.
        dtype: of ours.
        tf32: dense convolutions may round their factors to TF32.
    """
    unit = torch.finfo(dtype).eps / 2
    bound, stored = torch.zeros_like(x), 0.0
    layers = iter(module)
    for conv, bn, activation in zip(layers, layers, layers, strict=True):
        assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        shift = (bn.bias - bn.running_mean * scale)[:, None, None]
        scale = scale[:, None, None]

        def product(x: Tensor, weight: Tensor, conv: nn.Conv2d = conv) -> Tensor:
            return F.conv2d(x, weight, None, conv.stride, conv.padding, 1, conv.groups)

        weight = conv.weight
        z = product(x, weight) * scale
        terms = product(x.abs(), weight.abs()) * scale.abs() + shift.abs()
        squares = product(x.square(), weight.square()).sqrt() * scale.abs()
        steps = weight[0].numel() + 8
        partial = z.abs() + _DEVIATIONS * squares + shift.abs()
        units = [stored] + ([TF32, TF32] if tf32 and conv.groups == 1 else [])
        bound = (
            product(bound, weight.abs()) * scale.abs()
            + FLOAT32 * torch.minimum(steps * terms, _DEVIATIONS * math.sqrt(steps) * partial)
            + sum(units) * z.abs()
            + _DEVIATIONS * math.hypot(*units) * squares
        )
        x, stored = activation(z + shift), unit
    return bound + unit * (x.abs() + bound)
