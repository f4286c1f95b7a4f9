"""A row of `make gpu` for an operator that fuses several modules (gpu_separable.py, gpu_conv.py):
ours, each of its kernels, and plain PyTorch; timed as gpu_measure times layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_measure import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    MOST_INPUTS,
    ROTATED_BYTES,
    TOLERANCE,
    Layer,
    device_times,
    engine,
    graph_of,
)
from peers import compiled
from torch import Tensor, nn

from mnet_kernels.data import randomise_batchnorm
from mnet_kernels.registration import may_use_tf32
from mnet_kernels.timing import ratio

#: channels, height, width, kernel, stride, outputs, times in the network.
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        name: of the table's first column.
        module: what a shape stands for, in plain PyTorch.
        ours: ways of ours by name, "ours" the operator itself, which "ours, triton" may be absent
            from without being wrong.
        native: plain PyTorch without torch.compile.
        facts: of a call (shape, batch, dtype); force: makes the operator take a kernel by name.
    """

    name: str
    module: Callable[[Shape], nn.Sequential]
    ours: Callable[[nn.Sequential, torch.dtype], dict[str, Layer]]
    native: Callable[[nn.Sequential], dict[str, Layer]]
    facts: Callable[[Shape, int, str], Any]
    force: Callable[[str], None]


def row(
    subject: Subject, shape: Shape, batch: int, dtype: str, modes: tuple[str, ...]
) -> dict[str, Any]:
    """Ours and every peer on one shape."""
    channels, height, width, *_, count = shape
    torch.manual_seed(1)
    wide = subject.module(shape).eval()
    randomise_batchnorm(wide, torch.randn(2, channels, height, width), 0)
    module = copy.deepcopy(wide).to(DEVICE, DTYPES[dtype])
    first = torch.randn(batch, channels, height, width, device=DEVICE).to(DTYPES[dtype])
    some = slice(None, None, max(1, batch - 1))  # the first image and the last
    exact = copy.deepcopy(module).double()(first[some].double())
    nbytes = first.nbytes + batch * exact[0].numel() * first.element_size()
    number = min(MOST_INPUTS, max(2, -(-ROTATED_BYTES // nbytes)))
    facts = subject.facts(shape, batch, dtype)

    # Peers multiply as cuDNN's flag says, and so do ours.
    tolerance = 2e-3 if dtype == "float32" and may_use_tf32() else TOLERANCE[dtype]

    graphs: dict[str, Callable[[], object]] = {}
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}

    def add(name: str, way: Layer, inputs: list[Tensor], kept: bool = True) -> None:
        replay, y = graph_of(way, inputs)
        replay()
        errors[name] = ((y[some].double() - exact).abs().max() / exact.abs().max()).item()
        if errors[name] <= (tolerance if name.startswith("ours") else 5e-2):
            graphs[name] = replay
            if kept:
                calls[name] = partial(way, inputs[0])

    for layout, memory_format in LAYOUTS.items():
        inputs = [first.to(memory_format=memory_format)]
        inputs += [inputs[0].clone() for _ in range(number - 1)]
        laid_out = copy.deepcopy(module).to(memory_format=memory_format)
        with engine("cudnn"):
            for name, way in subject.native(laid_out).items():
                add(f"{name} {layout}", way, inputs)
            if layout == "contiguous":
                continue
            for name, way in subject.ours(laid_out, DTYPES[dtype]).items():
                try:
                    add(name, way, inputs)
                except Exception as error:
                    if name != "ours, triton":  # without which the others still count
                        raise
                    errors[name] = float("inf")
                    print(f"{name}: {type(error).__name__}: {error}")
            for mode in modes:
                torch._dynamo.reset()
                run = compiled(
                    laid_out, inputs[0],
                    None if mode == "compile" else "max-autotune-no-cudagraphs",
                )  # fmt: skip
                if run is not None:
                    add(mode, run, inputs)
        one_pass = subject.ours(laid_out, DTYPES[dtype])["ours"]
        for variant in facts.able:
            subject.force(variant)
            try:
                add(f"ours, {variant}", one_pass, inputs, kept=False)
            finally:
                subject.force("")

    half = [torch.empty(nbytes // 2, dtype=torch.uint8, device=DEVICE) for _ in range(number)]
    graphs["copy"], _ = graph_of(torch.clone, half)
    with engine("cudnn"):
        times = device_times(graphs, number)
        plain = device_times(calls, 1, lead=False) if batch <= 32 else {}
    peers = [n for n in times if not n.startswith("ours") and n != "copy"]
    best = min(peers, key=lambda name: times[name].median)
    told = ("variant", "able", "blocks", "threads", "shared_bytes", "registers", "blocks_per_sm")
    # Of the last convolution, which has nearly all of them.
    depth = [m for m in module if isinstance(m, nn.Conv2d)][-1].weight[0].numel()
    result: dict[str, Any] = {
        "shape": list(shape[:6]), "count": count, "batch": batch, "dtype": dtype, "bytes": nbytes,
        "multiply_adds": batch * exact[0].numel() * depth, "best_peer": best,
        "kernel": {name: getattr(facts, name) for name in told},
        "us": {n: s.summary(1e-6) for n, s in times.items()},
        "call_us": {n: s.summary(1e-6) for n, s in plain.items()}, "error": errors,
        "ours_correct": all(n in graphs for n in errors if n.startswith("ours")),
    }  # fmt: skip
    if "ours" in times:
        result["fraction_of_copy"] = times["copy"].median / times["ours"].median
        result["against_best_peer"] = ratio(times[best], times["ours"]).summary()
        if "ours in two passes" in times:
            result["against_two_passes"] = ratio(
                times["ours in two passes"], times["ours"]
            ).summary()
    return result | {"table": cells(subject.name, result)}


def cells(subject: str, told: dict[str, Any]) -> dict[str, str]:
    """A row as gpu.py prints it: column to cell, losses marked."""
    channels, height, _, *others = told["shape"]
    shape = ", ".join(map(str, (channels, height, *others)))
    medians = {name: f"{spread['median']:.1f}" for name, spread in told["us"].items()}
    result = {
        f"{subject}: C, H, kernel, stride, K": shape,
        "batch": str(told["batch"]), "dtype": told["dtype"], "best peer": told["best_peer"],
        "µs": medians[told["best_peer"]],
        "ours in two passes": medians.get("ours in two passes", "WRONG or not there"),
        "ours, triton": medians.get("ours, triton", "WRONG or not there"),
        "ours": medians.get("ours", "WRONG"),
        "of copy": f"{told['fraction_of_copy']:.0%}" if "fraction_of_copy" in told else "-",
    }  # fmt: skip
    for name in ("against_best_peer", "against_two_passes"):
        speedup = told[name]["median"] if name in told else 0
        lost = " (we lose)" if speedup < 1 else ""
        result[name.replace("_", " ")] = f"{speedup:.2f}x{lost}" if name in told else "-"
    return result
