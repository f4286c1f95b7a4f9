"""A training_rulers.Training as requests to the emulated kernels of training."""

from __future__ import annotations

import torch
from emulation import dwconv
from emulation.emulator import Answer, Emulator
from torch import Tensor
from training_rulers import Training


def _numbers(t: Training) -> dict[str, float]:
    return dwconv.sizes(t.problem) | {"eps": t.eps}


def _inputs(t: Training) -> dict[str, Tensor | None]:
    p = t.problem
    return {"x": p.x, "weight": p.weight.contiguous(), "gamma": p.scale, "beta": p.shift}


def _room(program, variant, numbers, inputs, offsets) -> tuple[int, int]:
    """Floats of moments and of partials."""
    answer = program.run(
        "dwconv_training_room", variant, numbers=numbers, inputs=inputs, offsets=offsets
    )
    moments, partials = map(int, answer.text.split())
    return moments, partials


def forward(
    program: Emulator, t: Training, variant: str = "auto", *, count: bool = False, offset: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor], Answer]:
    """(y, mean, var), and what the program said: the variants' names and the counted traffic.

    Args:
        offset: bytes that x lies past a 256-byte boundary.
    """
    numbers, inputs, at = _numbers(t), _inputs(t), {"x": offset}
    shape = [int(numbers[name]) for name in ("N", "K", "OH", "OW")]
    layout = torch.channels_last if numbers["channels_last"] else torch.contiguous_format
    moments, _ = _room(program, variant, numbers, inputs, at)
    per_channel = ("mean", "var", "scale", "shift")
    outputs = {
        "y": torch.empty(shape, dtype=t.problem.x.dtype, memory_format=layout),
        "moments": torch.empty(moments), **{name: torch.empty(shape[1]) for name in per_channel},
    }  # fmt: skip
    answer = program.run(
        "dwconv_training", variant, numbers=numbers, inputs=inputs, outputs=outputs, offsets=at,
        count=count,
    )  # fmt: skip
    return (outputs["y"], outputs["mean"], outputs["var"]), answer


def backward(
    program: Emulator, t: Training, dy: Tensor, mean: Tensor, var: Tensor, variant: str = "auto",
    *, data: bool = True, sums: bool = True, count: bool = False, offset: int = 0,
) -> tuple[tuple[Tensor | None, ...], Answer]:  # fmt: skip
    """(dx, dweight, dgamma, dbeta), None where they were not asked for, and what the program said.

    Args:
        dy: the gradient of the output, in x's layout.
        data, sums: whether to compute dx; dweight, dgamma and dbeta.
        offset: bytes that x, dy, dconv and dx lie past a 256-byte boundary.
    """
    p = t.problem
    numbers, inputs = _numbers(t), _inputs(t) | {"dy": dy, "mean": mean, "var": var}
    at = dict.fromkeys(("x", "dy", "dconv", "dx"), offset)
    _, partials = _room(program, variant, numbers, inputs, at)
    k = p.weight.shape[0]
    outputs = {name: torch.empty(k) for name in ("scale", "by_conv", "constant")}
    outputs["partials"] = torch.empty(partials)
    if "one_pass" not in variant:
        outputs |= {
            "dconv": torch.empty_like(dy), "flipped": torch.empty_like(inputs["weight"])
        }  # fmt: skip
    if data:
        outputs["dx"] = torch.empty_like(p.x)
    if sums:
        outputs["dweight"] = torch.empty(p.weight.shape, dtype=p.x.dtype)
        outputs |= {"dgamma": torch.empty(k), "dbeta": torch.empty(k)}
    answer = program.run(
        "dwconv_training_backward", variant, numbers=numbers, inputs=inputs, outputs=outputs,
        offsets=at, count=count,
    )  # fmt: skip
    return tuple(map(outputs.get, ("dx", "dweight", "dgamma", "dbeta"))), answer


def able(program: Emulator, t: Training, dy: Tensor, offset: int = 0) -> list[str]:
    """The variants that can run this problem."""
    at, inputs = dict.fromkeys(("x", "dy"), offset), _inputs(t) | {"dy": dy}
    return program.run(
        "dwconv_training_able", numbers=_numbers(t), inputs=inputs, offsets=at
    ).text.split()
