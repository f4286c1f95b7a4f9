"""A rulers.Problem as a request to the emulated forward kernels."""

from __future__ import annotations

import torch
from emulation.emulator import Answer, Emulator
from rulers import Problem
from torch import Tensor

from mnet_kernels.reference import ACTIVATIONS

#: In the order of csrc/problem.h's DType.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def sizes(p: Problem, op: str = "dwconv_bn_act", groups: int = 0) -> dict[str, float]:
    """The call's numbers, by the checks that every backend shares; groups: 0 for depthwise."""

    def pair(value) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    c = {"stride": 1, "padding": 0, "dilation": 1, "activation": "relu", "slope": 0.01}
    c |= p.constants
    padding = () if c["padding"] == "same" else c["padding"]
    constants = (c["stride"], padding, c["dilation"], groups, c["activation"], c["slope"])
    oh, ow, top, left, _, _ = torch.ops.mnet_kernels.check_conv(op, *p.tensors, *constants)
    (n, channels, h, w), (k, _, kh, kw) = p.x.shape, p.weight.shape
    (sh, sw), (dh, dw) = pair(c["stride"]), pair(c["dilation"])
    return {
        "N": n, "C": channels, "H": h, "W": w, "K": k, "OH": oh, "OW": ow, "KH": kh, "KW": kw,
        "SH": sh, "SW": sw, "DH": dh, "DW": dw, "top": top, "left": left, "slope": c["slope"],
        "activation": list(ACTIVATIONS).index(c["activation"]), "dtype": DTYPES.index(p.x.dtype),
        "channels_last": int(not p.x.is_contiguous()),
    }  # fmt: skip


def run(
    program: Emulator, p: Problem, variant: str = "auto", *, count: bool = False, offset: int = 0
) -> tuple[Tensor, Answer]:
    """The output, and what the program said: the variant's name and the counted traffic.

    Args:
        offset: bytes that x lies past a 256-byte boundary.
    """
    numbers = sizes(p)
    shape = [int(numbers[name]) for name in ("N", "K", "OH", "OW")]
    layout = torch.channels_last if numbers["channels_last"] else torch.contiguous_format
    y = torch.empty(shape, dtype=p.x.dtype, memory_format=layout)
    inputs = {"x": p.x, "weight": p.weight.contiguous(), "scale": p.scale, "shift": p.shift}
    answer = program.run(
        "dwconv", variant, numbers=numbers, inputs=inputs, outputs={"y": y},
        offsets={"x": offset}, count=count,
    )  # fmt: skip
    return y, answer


def able(program: Emulator, p: Problem, offset: int = 0) -> list[str]:
    """The variants that can run this problem."""
    inputs = {"x": p.x, "weight": p.weight.contiguous()}
    answer = program.run("dwconv_able", numbers=sizes(p), inputs=inputs, offsets={"x": offset})
    return answer.text.split()


def names(program: Emulator) -> list[str]:
    return program.run("dwconv_names").text.split()
