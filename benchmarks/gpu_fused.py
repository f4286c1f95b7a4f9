"""A row of `make gpu` for an operator that fuses several modules (gpu_separable.py, gpu_conv.py):
ours, each of its kernels, and plain PyTorch; timed as gpu_timing.py says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gpu_timing
import torch
from gpu_errors import allowed
from gpu_timing import DTYPES, LAYOUTS, Layer, Race, Row, beside, engine, inputs_for, judge
from peers import compiled
from torch import Tensor, nn

from mnet_kernels.registration import may_use_tf32
from mnet_kernels.subjects import randomise_batchnorm
from mnet_kernels.timing import ratio

#: channels, height, width, kernel, stride, outputs, times in the network.
Shape = tuple[int, ...]
#: A way of ours, of float32.
WITHOUT_TF32 = "ours, without TF32"


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        name: of the table's first column.
        module: what a shape stands for, in plain PyTorch.
        ours: ways of ours by name, "ours" the operator itself; "ours, triton" need not be there.
        native: plain PyTorch without torch.compile.
        facts: of a call (shape, batch, dtype); force: makes the operator take a kernel by name.
    """

    name: str
    module: Callable[[Shape], nn.Sequential]
    ours: Callable[[nn.Sequential, torch.dtype], dict[str, Layer]]
    native: Callable[[nn.Sequential], dict[str, Layer]]
    facts: Callable[[Shape, int, str], Any]
    force: Callable[[str], None]


def row(subject: Subject, shape: Shape, batch: int, dtype: str, modes: tuple[str, ...]) -> Row:
    """Ours and every peer on one shape."""
    channels, height, width, *_, count = shape
    device, numbers = gpu_timing.DEVICE, DTYPES[dtype]
    torch.manual_seed(1)
    module = subject.module(shape).eval()
    randomise_batchnorm(module, torch.randn(2, channels, height, width), 0)
    module = module.to(device, numbers)
    first = torch.randn(batch, channels, height, width, device=device).to(numbers)
    some = slice(None, None, max(1, batch - 1))  # the first image and the last
    wide, seen = copy.deepcopy(module).double(), first[some].double()
    exact = wide(seen)
    nbytes = first.nbytes + batch * exact[0].numel() * first.element_size()
    number = inputs_for(nbytes)
    facts = subject.facts(shape, batch, dtype)

    # Peers multiply as cuDNN's flag says, and so do ours.
    tf32 = dtype == "float32" and may_use_tf32()
    room = {flag: allowed(wide, seen, numbers, flag) for flag in {False, tf32}}

    def room_of(name: str) -> Tensor:
        return room[tf32 and name != WITHOUT_TF32]

    race = Race(judge(exact, room_of, some))
    for layout, memory_format in LAYOUTS.items():
        inputs = [first.to(memory_format=memory_format)]
        inputs += [inputs[0].clone() for _ in range(number - 1)]
        laid_out = copy.deepcopy(module).to(memory_format=memory_format)
        with engine("cudnn"):
            for name, way in subject.native(laid_out).items():
                race.add(f"{name} {layout}", way, inputs)
            if layout == "contiguous":
                continue
            ways = subject.ours(laid_out, numbers)
            for name, way in ways.items():
                race.add(name, way, inputs)
            for mode in modes:
                torch._dynamo.reset()
                run = compiled(
                    laid_out, inputs[0],
                    None if mode == "compile" else "max-autotune-no-cudagraphs",
                )  # fmt: skip
                if run is not None:
                    race.add(mode, run, inputs)
        for variant in facts.able:
            subject.force(variant)
            try:
                race.add(f"ours, {variant}", ways["ours"], inputs, called=False)
            finally:
                subject.force("")

    times, told_of = race.run(nbytes, number, called=batch <= 32)
    told = ("variant", "able", "blocks", "threads", "shared_bytes", "registers", "blocks_per_sm")
    # Of the last convolution, which has nearly all of them.
    depth = [m for m in module if isinstance(m, nn.Conv2d)][-1].weight[0].numel()
    result = {
        "shape": list(shape[:6]), "count": count, "batch": batch, "dtype": dtype,
        "multiply_adds": batch * exact[0].numel() * depth,
        "kernel": {name: getattr(facts, name) for name in told},
    } | told_of  # fmt: skip
    if "ours" in times:
        result |= beside(times, "ours", told_of["best_peer"])
        if "ours in two passes" in times:
            apart = ratio(times["ours in two passes"], times["ours"])
            result["against_two_passes"] = apart.summary()
    return result | {"table": cells(subject.name, result)}


def cells(subject: str, told: Row) -> dict[str, str]:
    """A row as gpu.py prints it: column to cell, losses marked."""
    channels, height, _, *others = told["shape"]
    shape = ", ".join(map(str, (channels, height, *others)))
    medians = {name: f"{spread['median']:.1f}" for name, spread in told["us"].items()}

    def time_of(way: str) -> str:
        return medians.get(way, "WRONG" if way in told["error"] else "-")

    result = {
        f"{subject}: C, H, kernel, stride, K": shape,
        "batch": str(told["batch"]), "dtype": told["dtype"], "best peer": told["best_peer"],
        "µs": medians[told["best_peer"]],
        **{way: time_of(way) for way in ("ours in two passes", "ours, triton", "ours")},
        "of copy": f"{told['fraction_of_copy']:.0%}" if "fraction_of_copy" in told else "-",
    }  # fmt: skip
    for name in ("against_best_peer", "against_two_passes"):
        speedup = told[name]["median"] if name in told else 0
        lost = " (we lose)" if speedup < 1 else ""
        result[name.replace("_", " ")] = f"{speedup:.2f}x{lost}" if name in told else "-"
    return result
