"""The separable blocks of MobileNet V1 on a GPU (the stage "separable" of `make gpu`): one pass
(every kernel of separable_conv) beside our own two passes and plain PyTorch; timed as gpu_measure
times layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_measure import (
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
from peers import LAST, compiled
from shapes import shapes
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mnet_kernels import _cuda, backends, ops
from mnet_kernels.data import randomise_batchnorm
from mnet_kernels.fold import fold
from mnet_kernels.timing import ratio

_separable_conv = torch.ops.mnet_kernels.separable_conv.default


def block(channels: int, kernel: int, stride: int, outputs: int) -> nn.Sequential:
    """Depthwise + BatchNorm + ReLU6, pointwise + BatchNorm + ReLU6."""
    depthwise = nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
    )
    pointwise = nn.Conv2d(channels, outputs, 1, bias=False)
    return nn.Sequential(
        depthwise, nn.BatchNorm2d(channels), nn.ReLU6(),
        pointwise, nn.BatchNorm2d(outputs), nn.ReLU6(),
    )  # fmt: skip


def ours(module: nn.Sequential, dtype: torch.dtype) -> dict[str, Layer]:
    """The block in one pass, and in two: dwconv_bn_act, then PyTorch's convolution (folded); in one
    pass on Triton too."""
    conv_dw, bn_dw, _, conv_pw, bn_pw, _ = module
    dw_affine, pw_affine = fold(dtype, None, bn_dw), fold(dtype, None, bn_pw)
    stride, padding = conv_dw.stride[0], conv_dw.padding[0]
    folded = fuse_conv_bn_eval(conv_pw, bn_pw).to(memory_format=LAST)

    def one_pass(x: Tensor) -> Tensor:
        return _separable_conv(
            x, conv_dw.weight, *dw_affine, conv_pw.weight, *pw_affine, None, [stride], [padding],
            [1], "relu6", "relu6", 0.0,
        )  # fmt: skip

    def triton(x: Tensor) -> Tensor:
        from mnet_kernels.triton.operators import separable_conv

        return separable_conv(
            x, conv_dw.weight, *dw_affine, conv_pw.weight, *pw_affine, None, [stride],
            [padding] * 4, [1], "relu6", "relu6", 0.0,
        )  # fmt: skip

    def two_passes(x: Tensor) -> Tensor:
        middle = ops.dwconv_bn_act(
            x, conv_dw.weight, *dw_affine, stride=stride, padding=padding, activation="relu6",
            backend="cuda",
        )  # fmt: skip
        return F.relu6(folded(middle), inplace=True)

    ways: dict[str, Layer] = {"ours": one_pass, "ours in two passes": two_passes}
    if backends.why_not("triton", device="cuda", dtype=dtype) is None:
        ways["ours, triton"] = triton
    return ways


def native(module: nn.Sequential) -> dict[str, Layer]:
    """Plain PyTorch without torch.compile."""
    conv_dw, bn_dw, _, conv_pw, bn_pw, _ = module
    folded_dw, folded_pw = fuse_conv_bn_eval(conv_dw, bn_dw), fuse_conv_bn_eval(conv_pw, bn_pw)
    folded = nn.Sequential(folded_dw, nn.ReLU6(inplace=True), folded_pw, nn.ReLU6(inplace=True))
    return {"eager": module, "folded": folded.to(memory_format=LAST)}


def row(shape: tuple[int, ...], batch: int, dtype: str, modes: tuple[str, ...]) -> dict[str, Any]:
    """Ours and every peer on one block."""
    channels, height, width, kernel, stride, outputs, count = shape
    torch.manual_seed(1)
    wide = block(channels, kernel, stride, outputs).eval()
    randomise_batchnorm(wide, torch.randn(2, channels, height, width), 0)
    module = copy.deepcopy(wide).to("cuda", DTYPES[dtype])
    first = torch.randn(batch, channels, height, width, device="cuda").to(DTYPES[dtype])
    some = slice(None, None, max(1, batch - 1))  # the first image and the last
    exact = copy.deepcopy(module).double()(first[some].double())
    nbytes = first.nbytes + batch * exact[0].numel() * first.element_size()
    number = min(MOST_INPUTS, max(2, -(-ROTATED_BYTES // nbytes)))
    facts = _cuda.facts_of_separable_call(
        list(first.shape), dtype, [channels, 1, kernel, kernel], outputs, [stride], [kernel // 2]
    )

    graphs: dict[str, Callable[[], object]] = {}
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}

    def add(name: str, way: Layer, inputs: list[Tensor], kept: bool = True) -> None:
        replay, y = graph_of(way, inputs)
        replay()
        errors[name] = ((y[some].double() - exact).abs().max() / exact.abs().max()).item()
        if errors[name] <= (TOLERANCE[dtype] if name.startswith("ours") else 5e-2):
            graphs[name] = replay
            if kept:
                calls[name] = partial(way, inputs[0])

    for layout, memory_format in LAYOUTS.items():
        inputs = [first.to(memory_format=memory_format)]
        inputs += [inputs[0].clone() for _ in range(number - 1)]
        laid_out = copy.deepcopy(module).to(memory_format=memory_format)
        with engine("cudnn"):
            for name, way in native(laid_out).items():
                add(f"{name} {layout}", way, inputs)
            if layout == "contiguous":
                continue
            for name, way in ours(laid_out, DTYPES[dtype]).items():
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
        one_pass = ours(laid_out, DTYPES[dtype])["ours"]
        for variant in facts.able:
            _cuda.force_separable_variant(variant)
            try:
                add(f"ours, {variant}", one_pass, inputs, kept=False)
            finally:
                _cuda.force_separable_variant("")

    half = [torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda") for _ in range(number)]
    graphs["copy"], _ = graph_of(torch.clone, half)
    with engine("cudnn"):
        times = device_times(graphs, number)
        plain = device_times(calls, 1, lead=False) if batch <= 32 else {}
    peers = [n for n in times if not n.startswith("ours") and n != "copy"]
    best = min(peers, key=lambda name: times[name].median)
    told = ("variant", "blocks", "threads", "shared_bytes", "registers", "blocks_per_sm")
    result: dict[str, Any] = {
        "shape": list(shape[:6]), "count": count, "batch": batch, "dtype": dtype, "bytes": nbytes,
        "multiply_adds": batch * exact[0].numel() * channels, "best_peer": best,
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
    return result | {"table": cells(result)}


def plan() -> list[tuple[Any, ...]]:
    """Arguments of `row`, the rows that matter most first."""
    blocks, both = shapes("mobilenet_v1_blocks"), ("compile", "max-autotune")
    rows = [(s, 256, "bfloat16", both) for s in blocks]
    rows += [(s, batch, "bfloat16", ("compile",)) for batch in (1, 32) for s in blocks]
    rows += [(s, batch, "float32", ()) for batch in (256, 1, 32) for s in blocks]
    return rows + [(s, batch, "float16", ()) for batch in (256, 1, 32) for s in blocks]


def cells(told: dict[str, Any]) -> dict[str, str]:
    """A row as gpu.py prints it: column to cell, losses marked."""
    channels, height, _, _, stride, outputs = told["shape"]
    medians = {name: f"{spread['median']:.1f}" for name, spread in told["us"].items()}
    result = {
        "block: C, H, stride, K": f"{channels}, {height}, {stride}, {outputs}",
        "batch": str(told["batch"]), "dtype": told["dtype"], "best peer": told["best_peer"],
        "µs": medians[told["best_peer"]],
        "ours in two passes": medians.get("ours in two passes", "WRONG"),
        "ours, triton": medians.get("ours, triton", "WRONG or not there"),
        "ours": medians.get("ours", "WRONG"),
        "of copy": f"{told['fraction_of_copy']:.0%}" if "fraction_of_copy" in told else "-",
    }  # fmt: skip
    for name in ("against_best_peer", "against_two_passes"):
        speedup = told[name]["median"] if name in told else 0
        lost = " (we lose)" if speedup < 1 else ""
        result[name.replace("_", " ")] = f"{speedup:.2f}x{lost}" if name in told else "-"
    return result
