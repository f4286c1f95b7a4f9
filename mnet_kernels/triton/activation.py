"""The activations and their derivatives; the names of mnet_kernels/reference.py."""

import triton
import triton.language as tl


@triton.jit
def activate(ACTIVATION: tl.constexpr, z, slope):
    """act(z). Comparisons are written so that NaN passes through, as torch's own let it."""
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "relu6":
        return tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        return tl.where(z < 0, z * slope, z)
    elif ACTIVATION == "hardswish":
        gate = z + 3
        return z * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) / 6
    elif ACTIVATION == "silu":
        return z / (1 + tl.exp(-z))
    elif ACTIVATION == "hardsigmoid":
        gate = z + 3
        return tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) / 6
    else:
        tl.static_assert(ACTIVATION == "identity")
        return z


@triton.jit
def activation_gradient(ACTIVATION: tl.constexpr, dy, z, slope):
    """dy * act'(z); at the kinks as torch's own derivatives."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, dy)
    elif ACTIVATION == "relu6":
        return tl.where((z <= 0) | (z >= 6), 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, dy, dy * slope)
    elif ACTIVATION == "hardswish":
        return tl.where(z <= -3, 0.0, tl.where(z < 3, dy * (z / 3 + 0.5), dy))
    elif ACTIVATION == "silu":
        sigmoid = 1 / (1 + tl.exp(-z))
        return dy * sigmoid * (1 + z * (1 - sigmoid))
    elif ACTIVATION == "hardsigmoid":
        return tl.where((z > -3) & (z < 3), dy / 6, 0.0)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return dy
