"""Random dense convolutions and how the emulated kernels of conv_bn_act are asked to compute them;
reference and tolerance are rulers.py's."""

from __future__ import annotations

from dataclasses import dataclass

import rulers
import torch
from emulation import dwconv
from emulation.emulator import MULTIPROCESSORS, SHARED_LIMIT, Answer, Emulator
from torch import Tensor

from mnet_kernels import ops


@dataclass
class Conv(rulers.Problem):
    """A call of conv_bn_act."""

    tf32: bool = False  # whether factors may be rounded to TF32

    def run(self, backend: str | None = None) -> Tensor:
        return ops.conv_bn_act(*self.tensors, **self.constants, backend=backend)


def assert_correct(p: Conv, y: Tensor) -> None:
    """rulers.assert_correct; with TF32, one rounding more of each factor, through the affine and
    the activation, whose slope is at most 1.5."""
    if not p.tf32:
        return rulers.assert_correct(p, y)
    exact, magnitude = rulers.reference(p)
    linear = {k: v for k, v in p.constants.items() if k != "slope"} | {"activation": "identity"}
    x, weight, scale, _ = (None if t is None else t.cpu().double().abs() for t in p.tensors)
    factors = (1 + rulers.TF32_ROUNDING) ** 2 - 1
    allowed = rulers.tolerance(p, exact, magnitude)
    allowed = allowed + 1.5 * factors * Conv(x, weight, scale, None, linear).run("native")
    assert y.shape == exact.shape and y.dtype == p.x.dtype
    wrong = ~((y.cpu().double() - exact).abs() <= allowed)  # NaN is wrong
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements are off"
    return None


def conv(
    shape=(2, 16, 9, 11), outputs=24, kernel=(1, 1), *, dtype=torch.float32, affine=True,
    device="cpu", margin=1024, channels_last=True, tf32=False, **constants,
) -> Conv:  # fmt: skip
    """Random tensors for a call, x as in rulers.problem."""
    x = rulers.problem(
        shape, dtype=dtype, channels_last=channels_last, device=device, margin=margin
    ).x
    weight = torch.randn(outputs, shape[1], *kernel, dtype=torch.float64) / 2
    weight = weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
    return Conv(
        x, weight,
        (torch.rand(outputs) + 0.5).to(device) if affine else None,
        torch.randn(outputs).to(device) if affine else None,
        constants, tf32,
    )  # fmt: skip


def numbers(p: Conv, multiprocessors=MULTIPROCESSORS, shared_limit=SHARED_LIMIT):
    """The call's numbers for the emulation."""
    sizes = dwconv.sizes(p, "conv_bn_act", 1)
    sizes |= {"multiprocessors": multiprocessors, "shared_limit": shared_limit}
    return sizes | {"tf32": int(p.tf32)}


def _inputs(p: Conv) -> dict[str, Tensor | None]:
    return dict(zip(("x", "weight", "scale", "shift"), p.tensors, strict=True))


def run(
    program: Emulator, p: Conv, variant: str = "auto", *, count: bool = False,
    offsets: dict[str, int] | None = None, **device: int,
) -> tuple[Tensor, Answer]:  # fmt: skip
    """See Emulator.convolve; ``device``: multiprocessors, shared_limit."""
    return program.convolve("conv", variant, numbers(p, **device), _inputs(p), count, offsets)


def able(program: Emulator, p: Conv, **device: int) -> list[str]:
    """The variants that can run this call."""
    return program.run("conv_able", numbers=numbers(p, **device), inputs=_inputs(p)).text.split()


def names(program: Emulator) -> list[str]:
    return program.run("conv_names").text.split()
