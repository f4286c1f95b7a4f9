"""What the tests measure with: random problems, the float64 reference, one formula of tolerance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mnet_kernels import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Half a unit in the last place, relative.
ROUNDING = {
    torch.float64: 2.0**-53, torch.float32: 2.0**-24,
    torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8,
}  # fmt: skip
#: Of a factor rounded to TF32, which keeps 10 bits of mantissa.
TF32_ROUNDING = 2.0**-11
#: Half of the smallest number: below the normal range rounding is absolute.
SMALLEST = {
    torch.float64: 0.0, torch.float32: 2.0**-150,
    torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134,
}  # fmt: skip


#: What Problem.run and the operator tests use: None for the automatic choice (the cpu backend).
BACKEND: str | None = None


def use_triton_interpreter() -> None:
    """Sends the operator tests to the Triton backend."""
    global BACKEND, DTYPES
    import triton_interpreter

    BACKEND = "triton"
    DTYPES = tuple(d for d in DTYPES if d != torch.float64)
    triton_interpreter.mend()


@dataclass
class Problem:
    """A call of dwconv_bn_act: its tensors, and its constants as keywords."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.scale, self.shift

    def run(self, backend: str | None = None) -> Tensor:
        return ops.dwconv_bn_act(*self.tensors, **self.constants, backend=backend or BACKEND)


def problem(
    shape=(2, 16, 9, 11), kernel=(3, 3), *, multiplier=1, dtype=torch.float32,
    channels_last=False, affine=True, device="cpu", margin=1024, **constants,
) -> Problem:  # fmt: skip
    """Random tensors for a call; x lies inside a larger buffer of NaN, so that a read past
    either end of it shows (``margin`` elements; 0 where a tool watches the buffer's ends)."""
    outputs = shape[1] * multiplier
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(shape, dtype=torch.float64).to(dtype)
    if channels_last:
        values = values.to(memory_format=torch.channels_last)
    buffer = torch.full((values.numel() + 2 * margin,), float("nan"), dtype=dtype, device=device)
    x = buffer.as_strided(shape, values.stride(), margin)
    x.copy_(values)
    return Problem(
        x,
        torch.randn(outputs, 1, *kernel, dtype=torch.float64).to(device, dtype),
        (torch.rand(outputs, dtype=wide) + 0.5).to(device) if affine else None,
        torch.randn(outputs, dtype=wide).to(device) if affine else None,
        constants,
    )


def reference(p: Problem) -> tuple[Tensor, Tensor]:
    """The call in float64 on the CPU and on the same (already rounded) inputs, and the sum of the
    absolute values of all terms, which is what rounding errors of the sum are relative to."""

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.cpu().double()

    def absolute(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.cpu().double().abs()

    exact = type(p)(*map(wide, p.tensors), p.constants).run("native")
    linear = p.constants | {"activation": "identity"}
    return exact, type(p)(*map(absolute, p.tensors), linear).run("native")


def tolerance(p: Problem, exact: Tensor, magnitude: Tensor) -> Tensor:
    """|error| allowed, an element: one rounding of the result to its dtype, and before it, in the
    accumulator, one rounding for every tap, scale, shift and each of the activation's few steps.
    An activation with a constant of its own (hardsigmoid(0) is 0.5) rounds that too."""
    taps = p.weight[0].numel()
    accumulator = ROUNDING[torch.float64 if p.x.dtype == torch.float64 else torch.float32]
    inner = (taps + 8) * accumulator * torch.maximum(magnitude, exact.abs())
    return ROUNDING[p.x.dtype] * (exact.abs() + inner) + inner + SMALLEST[p.x.dtype]


def assert_correct(p: Problem, y: Tensor) -> None:
    assert y.device == p.x.device
    y = y.cpu()
    exact, magnitude = reference(p)
    assert y.shape == exact.shape
    assert y.dtype == p.x.dtype
    error = (y.double() - exact).abs()
    allowed = tolerance(p, exact, magnitude)
    wrong = ~(error <= allowed)  # NaN is wrong
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} elements are off, the first at "
        f"{wrong.nonzero()[0].tolist()}: {y[wrong][0]} instead of {exact[wrong][0]}"
    )


#: Where an activation's derivative jumps.
KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3),
         "hardsigmoid": (-3, 3)}  # fmt: skip


def assert_gradients_correct(p: Problem, dy: Tensor, gradients: dict[str, Tensor]) -> None:
    """The named gradients of a fused backward (one rounding of dconv = dy * act'(z) * scale to the
    tensors' dtype, sums in the accumulator) against float64 autograd of the reference.

    The bound follows the errors: that of z reaches dconv through act'', of at most 1, and dconv's
    reaches a gradient as dconv itself does. On a kink both derivatives are right.
    """
    x, weight, scale, shift = (
        t.detach().double().requires_grad_() if t is not None else None for t in p.tensors
    )
    named = {"x": x, "weight": weight, "scale": scale, "shift": shift}
    wanted = [named[name] for name in gradients]
    y = Problem(x, weight, scale, shift, p.constants).run("native")
    exact = dict(zip(gradients, torch.autograd.grad(y, wanted, dy.double()), strict=True))

    linear = p.constants | {"activation": "identity"}
    accumulator = ROUNDING[torch.float64 if p.x.dtype == torch.float64 else torch.float32]
    taps = weight.shape[2] * weight.shape[3]
    with torch.no_grad():
        _, magnitude = reference(p)
        conv = Problem(x, weight, None, None, linear).run("native")
        conv_magnitude = Problem(x.abs(), weight.abs(), None, None, linear).run("native")
        z = Problem(x, weight, scale, shift, linear).run("native")
        z_error = (taps + 8) * accumulator * magnitude
        near = torch.zeros_like(z, dtype=torch.bool)
        for kink in KINKS.get(p.constants.get("activation", "relu"), ()):
            near |= (z - kink).abs() <= z_error
        dz = dy.double().abs() * 1.5  # |act'| is at most 1.5
        dz_error = dz * ((taps + 8) * accumulator + z_error + near)
        by = 1 if scale is None else scale.abs().view(-1, 1, 1)
        dconv_error = dz_error * by + ROUNDING[p.x.dtype] * dz * by + SMALLEST[p.x.dtype]
    ax, aw = x.detach().abs().requires_grad_(), weight.detach().abs().requires_grad_()
    magnitudes = Problem(ax, aw, None, None, linear).run("native")

    def through(t: Tensor, source: Tensor) -> Tensor:
        return torch.autograd.grad(magnitudes, t, source, retain_graph=True)[0]

    def over_pixels(source: Tensor, terms: Tensor) -> Tensor:
        return (source + pixels * accumulator * terms).sum((0, 2, 3))

    pixels = z.shape[0] * z.shape[2] * z.shape[3] + 8
    terms = taps * (weight.shape[0] // x.shape[1]) + 8
    bounds = {
        "x": through(ax, dconv_error + terms * accumulator * dz * by),
        "weight": through(aw, dconv_error + pixels * accumulator * dz * by),
        "scale": over_pixels(
            dz_error * conv.abs() + dz * (taps + 8) * accumulator * conv_magnitude, dz * conv.abs()
        ),
        "shift": over_pixels(dz_error, dz),
    }
    for name, ours in gradients.items():
        assert ours.shape == exact[name].shape
        assert ours.dtype == dict(zip(named, p.tensors, strict=True))[name].dtype
        allowed = (
            bounds[name] + ROUNDING[ours.dtype] * (exact[name].abs() + bounds[name])
            + SMALLEST[ours.dtype]
        )  # fmt: skip
        error = (ours.double() - exact[name]).abs()
        wrong = ~(error <= allowed)
        assert not wrong.any(), (
            f"d{name}: {int(wrong.sum())} of {wrong.numel()} elements are off, the first at "
            f"{wrong.nonzero()[0].tolist()}: {ours[wrong][0]} instead of {exact[name][wrong][0]}"
        )
