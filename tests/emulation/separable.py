"""Random separable blocks, their float64 reference and its tolerance, and how the emulated kernels
are asked to compute them."""

from __future__ import annotations

from dataclasses import dataclass

import rulers
import torch
import torch.nn.functional as F
from emulation import dwconv
from emulation.emulator import MULTIPROCESSORS, SHARED_LIMIT, Answer, Emulator
from rulers import ROUNDING, SMALLEST, TF32_ROUNDING, Problem
from torch import Tensor

from mnet_kernels.reference import ACTIVATIONS


@dataclass
class Separable:
    """A call of separable_conv: its depthwise half, and the rest."""

    depthwise: Problem
    pw_weight: Tensor
    pw_scale: Tensor | None
    pw_shift: Tensor | None
    residual: Tensor | None = None
    pw_activation: str = "relu"
    tf32: bool = False  # whether factors of the product may be rounded to TF32

    @property
    def slope(self) -> float:
        return self.depthwise.constants.get("slope", 0.01)

    def reference(self) -> tuple[Tensor, Tensor]:
        """The result in float64, and the error allowed of each element: that of the depthwise half
        (rulers.tolerance, which ends with its rounding) goes through the product, then come for
        TF32 one rounding of each factor, one a term of its sum and of the epilogue, and one to the
        dtype."""
        middle, magnitude = rulers.reference(self.depthwise)
        middle_error = rulers.tolerance(self.depthwise, middle, magnitude)
        weight = self.pw_weight.cpu().double()
        each = (1, -1, 1, 1)
        scale = 1 if self.pw_scale is None else self.pw_scale.cpu().double().view(each)
        shift = 0 if self.pw_shift is None else self.pw_shift.cpu().double().view(each)
        residual = 0 if self.residual is None else self.residual.cpu().double()

        z = F.conv2d(middle, weight) * scale + shift
        exact = ACTIVATIONS[self.pw_activation](z, self.slope) + residual
        terms = F.conv2d(middle.abs() + middle_error, weight.abs()) * abs(scale) + abs(shift)
        error = F.conv2d(middle_error, weight.abs()) * abs(scale)
        if self.tf32:
            error = error + ((1 + TF32_ROUNDING) ** 2 - 1) * terms
        error = error + (weight.shape[1] + 8) * ROUNDING[torch.float32] * terms
        error = 1.5 * error + 8 * ROUNDING[torch.float32] * (exact.abs() + abs(residual))
        dtype = self.pw_weight.dtype
        return exact, error + ROUNDING[dtype] * (exact.abs() + error) + SMALLEST[dtype]

    def assert_correct(self, y: Tensor) -> None:
        exact, allowed = self.reference()
        assert y.shape == exact.shape
        assert y.dtype == self.pw_weight.dtype
        wrong = ~((y.cpu().double() - exact).abs() <= allowed)  # NaN is wrong
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {wrong.numel()} elements are off, the first at "
            f"{wrong.nonzero()[0].tolist()}: {y.cpu()[wrong][0]} instead of {exact[wrong][0]}"
        )


def separable(
    shape=(2, 16, 9, 11), outputs=24, kernel=(3, 3), *, multiplier=1, dtype=torch.float32,
    affine=True, residual=False, dw_activation="relu", pw_activation="relu", device="cpu",
    margin=1024, channels_last=True, tf32=False, **constants,
) -> Separable:  # fmt: skip
    """Random tensors for a call, x as in rulers.problem."""
    p = rulers.problem(
        shape, kernel, multiplier=multiplier, dtype=dtype, channels_last=channels_last,
        affine=affine, device=device, margin=margin, activation=dw_activation, **constants,
    )  # fmt: skip
    middle = shape[1] * multiplier
    oh, ow = p.run("native").shape[2:] if residual else (0, 0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(device, dtype)

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    more = random(shape[0], outputs, oh, ow).to(memory_format=memory_format) if residual else None
    return Separable(
        p, random(outputs, middle, 1, 1) / middle**0.5,
        (torch.rand(outputs) + 0.5).to(device) if affine else None,
        torch.randn(outputs).to(device) if affine else None,
        more, pw_activation, tf32,
    )  # fmt: skip


def numbers(s: Separable, multiprocessors=MULTIPROCESSORS, shared_limit=SHARED_LIMIT):
    """The call's numbers for the emulation."""
    sizes = dwconv.sizes(s.depthwise)
    sizes["middle"], sizes["K"] = sizes["K"], s.pw_weight.shape[0]
    sizes["dw_activation"] = sizes.pop("activation")
    sizes["pw_activation"] = list(ACTIVATIONS).index(s.pw_activation)
    sizes |= {"multiprocessors": multiprocessors, "shared_limit": shared_limit}
    return sizes | {"tf32": int(s.tf32)}


def _inputs(s: Separable) -> dict[str, Tensor | None]:
    x, weight, scale, shift = s.depthwise.tensors
    return {
        "x": x, "dw_weight": weight, "dw_scale": scale, "dw_shift": shift,
        "pw_weight": s.pw_weight, "pw_scale": s.pw_scale, "pw_shift": s.pw_shift,
        "residual": s.residual,
    }  # fmt: skip


def run(
    program: Emulator, s: Separable, variant: str = "auto", *, count: bool = False,
    offsets: dict[str, int] | None = None, **device: int,
) -> tuple[Tensor, Answer]:  # fmt: skip
    """See Emulator.convolve; ``device``: multiprocessors, shared_limit."""
    return program.convolve("separable", variant, numbers(s, **device), _inputs(s), count, offsets)


def able(program: Emulator, s: Separable, **device: int) -> list[str]:
    """The variants that can run this call."""
    return program.run(
        "separable_able", numbers=numbers(s, **device), inputs=_inputs(s)
    ).text.split()


def names(program: Emulator) -> list[str]:
    return program.run("separable_names").text.split()
