"""Random dense convolutions and how the emulated kernels of conv_bn_act are asked to compute them;
reference and tolerance are rulers.py's."""

from __future__ import annotations

from dataclasses import dataclass

import rulers
import torch
from emulation import dwconv
from emulation.emulator import Answer, Emulator
from emulation.separable import MULTIPROCESSORS, SHARED_LIMIT
from torch import Tensor

from mnet_kernels import ops


@dataclass
class Conv(rulers.Problem):
    """A call of conv_bn_act."""

    def run(self, backend: str | None = None) -> Tensor:
        return ops.conv_bn_act(*self.tensors, **self.constants, backend=backend)


def conv(
    shape=(2, 16, 9, 11), outputs=24, kernel=(1, 1), *, dtype=torch.float32, affine=True,
    device="cpu", margin=1024, channels_last=True, **constants,
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
        constants,
    )  # fmt: skip


def numbers(p: Conv, multiprocessors=MULTIPROCESSORS, shared_limit=SHARED_LIMIT):
    """The call's numbers for the emulation."""
    sizes = dwconv.sizes(p, "conv_bn_act", 1)
    return sizes | {"multiprocessors": multiprocessors, "shared_limit": shared_limit}


def _inputs(p: Conv) -> dict[str, Tensor | None]:
    return dict(zip(("x", "weight", "scale", "shift"), p.tensors, strict=True))


def run(
    program: Emulator, p: Conv, variant: str = "auto", *, count: bool = False,
    offsets: dict[str, int] | None = None, **device: int,
) -> tuple[Tensor, Answer]:  # fmt: skip
    """The output, and what the program said: the variant's name and the counted traffic.

    Args:
        offsets: bytes that a tensor lies past a 256-byte boundary.
        device: multiprocessors, shared_limit.
    """
    sizes = numbers(p, **device)
    shape = [int(sizes[name]) for name in ("N", "K", "OH", "OW")]
    y = torch.empty(shape, dtype=p.x.dtype, memory_format=torch.channels_last)
    answer = program.run(
        "conv", variant, numbers=sizes, inputs=_inputs(p), outputs={"y": y}, count=count,
        offsets=offsets,
    )  # fmt: skip
    return y, answer


def able(program: Emulator, p: Conv, **device: int) -> list[str]:
    """The variants that can run this call."""
    return program.run("conv_able", numbers=numbers(p, **device), inputs=_inputs(p)).text.split()


def names(program: Emulator) -> list[str]:
    return program.run("conv_names").text.split()
