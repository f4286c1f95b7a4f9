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
#: Half of the smallest number: below the normal range rounding is absolute.
SMALLEST = {
    torch.float64: 0.0, torch.float32: 2.0**-150,
    torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134,
}  # fmt: skip


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
        return ops.dwconv_bn_act(*self.tensors, **self.constants, backend=backend)


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

    exact = Problem(*map(wide, p.tensors), p.constants).run("native")
    linear = p.constants | {"activation": "identity"}
    return exact, Problem(*map(absolute, p.tensors), linear).run("native")


def tolerance(p: Problem, exact: Tensor, magnitude: Tensor) -> Tensor:
    """|error| allowed, an element: one rounding of the result to its dtype, and before it, in the
    accumulator, one rounding for every tap, scale, shift and each of the activation's few steps."""
    taps = p.weight.shape[2] * p.weight.shape[3]
    accumulator = ROUNDING[torch.float64 if p.x.dtype == torch.float64 else torch.float32]
    inner = (taps + 8) * accumulator * magnitude
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
