"""A rulers.Problem and the gradient of its output as a request to the emulated backward kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from emulation import dwconv
from emulation.emulator import Answer, Emulator
from rulers import Problem
from torch import Tensor


@dataclass
class Gradients:
    """Of x, weight, scale and shift; None where they were not asked for."""

    dx: Tensor | None
    dweight: Tensor | None
    dscale: Tensor | None
    dshift: Tensor | None

    def __iter__(self):
        return iter((self.dx, self.dweight, self.dscale, self.dshift))


def _inputs(p: Problem, dy: Tensor) -> dict[str, Tensor | None]:
    return {
        "x": p.x, "weight": p.weight.contiguous(), "scale": p.scale, "shift": p.shift, "dy": dy
    }  # fmt: skip


def run(
    program: Emulator, p: Problem, dy: Tensor, variant: str = "auto", *, data: bool = True,
    sums: bool = True, count: bool = False, offset: int = 0,
) -> tuple[Gradients, Answer]:  # fmt: skip
    """The gradients, and what the program said: the variants' names and the counted traffic.

    Args:
        dy: the gradient of the output, in x's layout.
        data, sums: whether to compute dx; dweight, dscale and dshift.
        offset: bytes that x, dy, dconv and dx lie past a 256-byte boundary.
    """
    numbers, inputs = dwconv.sizes(p), _inputs(p, dy)
    at = dict.fromkeys(("x", "dy", "dconv", "dx"), offset)
    k, _, kh, kw = p.weight.shape
    outputs = {"flipped": torch.empty_like(inputs["weight"])}
    if "one_pass" not in variant and (data or variant.split(",")[0] in ("general", "auto")):
        outputs["dconv"] = torch.empty_like(dy)
    if data:
        outputs["dx"] = torch.empty_like(p.x)
    if sums:
        answer = program.run(
            "dwconv_backward_chunks", variant, numbers=numbers, inputs=inputs, offsets=at
        )
        chunks = int(answer.text)
        outputs["partials"] = torch.empty(chunks, kh * kw + 2, k)
        outputs["dweight"] = torch.empty(k, 1, kh, kw, dtype=p.x.dtype)
        outputs |= {"dscale": torch.empty(k), "dshift": torch.empty(k)}
    answer = program.run(
        "dwconv_backward", variant, numbers=numbers, inputs=inputs, outputs=outputs,
        offsets=at, count=count,
    )  # fmt: skip
    return Gradients(*map(outputs.get, ("dx", "dweight", "dscale", "dshift"))), answer


def able(program: Emulator, p: Problem, dy: Tensor, offset: int = 0) -> list[str]:
    """The variants that can run this problem."""
    at = dict.fromkeys(("x", "dy"), offset)
    inputs, numbers = _inputs(p, dy), dwconv.sizes(p)
    return program.run(
        "dwconv_backward_able", numbers=numbers, inputs=inputs, offsets=at
    ).text.split()


def chosen(program: Emulator, p: Problem) -> str:
    """The variants that this problem takes where its memory is aligned; tensors may be meta's."""
    return program.run(
        "dwconv_backward_choose", numbers=dwconv.sizes(p),
        scratch=dict.fromkeys(("x", "weight", "dy", "dconv", "dx"), 16),
    ).text  # fmt: skip


def one_pass(program: Emulator, p: Problem) -> tuple[int, ...]:
    """Threads and shared bytes of a block, blocks, bytes on their way to each."""
    answer = program.run("dwconv_backward_one_pass", numbers=dwconv.sizes(p))
    return tuple(map(int, answer.text.split()))


def names(program: Emulator) -> list[str]:
    return program.run("dwconv_backward_names").text.split()
