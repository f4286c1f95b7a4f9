"""Depthwise layers on a GPU (the stage "layers" of `make gpu`): dwconv_bn_act, every kernel and
both layouts, beside plain PyTorch."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from functools import partial
from typing import Any

import gpu_timing
import torch
from gpu_errors import allowed
from gpu_timing import DTYPES, LAYOUTS, Layer, Race, Row, beside, engine, inputs_for, judge
from peers import compiled
from shapes import shapes
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mnet_kernels import _cuda, backends, ops
from mnet_kernels.nn.fold import fold
from mnet_kernels.timing import ratio

#: Models and layouts of which the seconds of Triton's first call are known.
_told: set[tuple[str, str]] = set()


def layer_ways(conv: nn.Conv2d, bn: nn.BatchNorm2d, layout: str) -> dict[str, Layer]:
    """conv + bn + ReLU6 in plain PyTorch, without torch.compile."""
    conv = copy.deepcopy(conv).to(memory_format=LAYOUTS[layout])
    folded = fuse_conv_bn_eval(conv, bn).to(memory_format=LAYOUTS[layout])
    return {
        "eager": lambda x: nn.functional.relu6(bn(conv(x))),
        "folded": lambda x: nn.functional.relu6(folded(x), inplace=True),
    }


def compile_ways(
    module: nn.Sequential, x: Tensor, layout: str, modes: tuple[str, ...]
) -> dict[str, Layer]:
    module = copy.deepcopy(module).to(memory_format=LAYOUTS[layout])
    ways = {}
    for mode in modes:
        torch._dynamo.reset()
        run = compiled(module, x, None if mode == "compile" else "max-autotune-no-cudagraphs")
        if run is not None:
            ways[mode] = run
    return ways


def first_call_seconds(call: Layer, x: Tensor) -> float:
    """What a call takes that has to compile and tune. Triton's cache on disk starts empty, the one
    in memory keeps what an earlier row of the same layer and layout compiled."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = empty
        try:
            torch.cuda.synchronize()
            start = time.perf_counter()
            call(x)
            torch.cuda.synchronize()
            return time.perf_counter() - start
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def layer_row(
    model: str, shape: tuple[int, ...], batch: int, dtype: str, modes: tuple[str, ...]
) -> Row:
    """Ours (every kernel, both layouts) and every peer, on one layer."""
    channels, height, width, kernel, stride, count = shape
    torch.manual_seed(1)
    conv = nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
    )  # fmt: skip
    bn = nn.BatchNorm2d(channels)
    with torch.no_grad():
        bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
        bn.weight.uniform_(0.5, 2), bn.bias.normal_()
    module = nn.Sequential(conv, bn, nn.ReLU6()).eval().to(gpu_timing.DEVICE, DTYPES[dtype])
    scale, shift = fold(DTYPES[dtype], None, bn)
    first = torch.randn(batch, channels, height, width, device=gpu_timing.DEVICE).to(DTYPES[dtype])
    some = slice(None, None, max(1, batch - 1))  # the first image and the last
    wide, seen = copy.deepcopy(module).double(), first[some].double()
    exact, room = wide(seen), allowed(wide, seen, DTYPES[dtype])
    nbytes = first.nbytes + batch * exact[0].numel() * first.element_size()
    number = inputs_for(nbytes)
    race = Race(judge(exact, lambda name: room, some))
    facts, first_call = {}, {}

    for layout, memory_format in LAYOUTS.items():
        inputs = [first.to(memory_format=memory_format)]
        inputs += [inputs[0].clone() for _ in range(number - 1)]

        def ours(x: Tensor, backend: str = "cuda") -> Tensor:
            return ops.dwconv_bn_act(
                x, conv.weight, scale, shift, stride=stride, padding=kernel // 2,
                activation="relu6", backend=backend,
            )  # fmt: skip

        chosen = _cuda.facts_of_call(
            list(first.shape), dtype, layout == "channels_last", list(conv.weight.shape), [stride],
            [kernel // 2],
        )  # fmt: skip
        told = ("variant", "blocks", "threads", "shared_bytes", "registers", "blocks_per_sm")
        facts[layout] = {name: getattr(chosen, name) for name in told}
        race.add(f"ours {layout}", ours, inputs)
        for variant in chosen.able:
            _cuda.force_variant(variant)
            try:
                race.add(f"ours {layout}, {variant}", ours, inputs, called=False)
            finally:
                _cuda.force_variant("")
        if backends.why_not("triton", device=gpu_timing.DEVICE) is None:

            def triton(x: Tensor, layout: str = layout, ours: Any = ours) -> Tensor:
                if (model, layout) not in _told:  # it costs what Triton has kept on disk
                    _told.add((model, layout))
                    call = partial(ours, backend="triton")
                    first_call[layout] = first_call_seconds(call, x)
                return ours(x, "triton")

            race.add(f"ours {layout}, triton", triton, inputs)
        for name in ("cudnn", "native"):
            with engine(name):
                for way, call in layer_ways(conv, bn, layout).items():
                    race.add(f"{way} {name} {layout}", call, inputs, called=name == "cudnn")
        with engine("cudnn"):
            for way, call in compile_ways(module, inputs[0], layout, modes).items():
                race.add(f"{way} {layout}", call, inputs)
        del inputs

    times, told_of = race.run(nbytes, number, called=batch <= 32)
    row = {
        "model": model, "shape": list(shape[:5]), "count": count, "batch": batch, "dtype": dtype,
        "cold": gpu_timing.is_cold(nbytes), "kernel": facts, "triton_first_call_s": first_call,
    } | told_of  # fmt: skip
    peers = [n for n in times if not n.startswith("ours") and n != "copy"]
    eager = min((n for n in peers if "eager" in n), key=lambda n: times[n].median)
    of_compile = [n for n in peers if n.startswith(("compile", "max-autotune"))]
    for layout in LAYOUTS:
        for key in (layout, f"{layout}, triton"):
            name = f"ours {key}"
            if name not in times:
                continue
            row[key] = beside(times, name, row["best_peer"]) | {
                "gb_per_s": nbytes / times[name].median / 1e9,
                "against_eager": ratio(times[eager], times[name]).summary(),
            }
            if of_compile:
                fastest = min(of_compile, key=lambda n: times[n].median)
                row[key]["against_compile"] = ratio(times[fastest], times[name]).summary()
    return row


def call_once(shape: list[int], batch: int, dtype: str, layout: str) -> None:
    """One call of ours, for a profiler to look at."""
    channels, height, width, kernel, stride = shape
    device = gpu_timing.DEVICE
    x = torch.randn(batch, channels, height, width, device=device).to(DTYPES[dtype])
    weight = torch.randn(channels, 1, kernel, kernel, device=device).to(DTYPES[dtype])
    scale = torch.rand(channels, device=device)
    ops.dwconv_bn_act(
        x.to(memory_format=LAYOUTS[layout]), weight, scale, scale, stride=stride,
        padding=kernel // 2, activation="relu6", backend="cuda",
    )  # fmt: skip
    if x.is_cuda:
        torch.cuda.synchronize()


def plan() -> list[tuple[Any, ...]]:
    """(function, its arguments), the rows that matter most first; peers that take long to compile
    come when all of V1 is known without."""
    v1 = [("mobilenet_v1", s) for s in shapes("mobilenet_v1")]
    v3 = [("mobilenet_v3_large", s) for s in shapes("mobilenet_v3_large")]
    one, both = ("compile",), ("compile", "max-autotune")
    rows = [(*s, 256, "bfloat16", one) for s in v1]
    rows += [(*s, 1, "bfloat16", one) for s in v1]
    rows += [(*s, 256, "float32", one) for s in v1]
    rows += [(*s, 256, "bfloat16", one) for s in v3]
    rows += [(*s, 256, "bfloat16", both) for s in v1]  # again, with one peer more
    rows += [(*s, 32, "bfloat16", one) for s in v1]
    rows += [(*s, batch, "float32", one) for batch in (1, 32) for s in v1]
    rows += [(*s, batch, "bfloat16", one) for batch in (1, 32) for s in v3]
    rows += [(*s, batch, "float32", one) for batch in (256, 32, 1) for s in v3]
    rows += [(*s, batch, "float16", one) for batch in (256, 32, 1) for s in v1 + v3]
    return [(layer_row, *row) for row in rows]
