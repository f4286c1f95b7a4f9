"""Whole networks on a GPU (the stage "networks" of `make gpu`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import gpu_timing
import torch
from gpu_timing import DTYPES, Layer, Row
from peers import LAST, compiled
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mnet_kernels import backends, models, swap
from mnet_kernels.compare import tolerance
from mnet_kernels.registration import may_use_tf32
from mnet_kernels.subjects import randomise_batchnorm

SIZE = 224


def networks() -> dict[str, Callable[[], nn.Module]]:
    """V2 is torchvision's, or timm's where that is not there."""
    found: dict[str, Callable[[], nn.Module]] = {"mobilenet_v1": models.mobilenet_v1}
    try:
        import torchvision

        found["mobilenet_v2"] = torchvision.models.mobilenet_v2
    except (ImportError, RuntimeError) as error:
        try:
            import timm

            found["mobilenet_v2"] = partial(timm.create_model, "mobilenetv2_100")
        except (ImportError, RuntimeError) as other:
            print(f"mobilenet_v2 is left out: {error}; {other}")
    return found


def network_row(name: str, batch: int, dtype: str, modes: tuple[str, ...]) -> Row:
    """Images per second and peak memory of swap, eager and torch.compile, as calls and graphs."""
    torch.manual_seed(1)
    model = networks()[name]().eval()
    randomise_batchnorm(model, torch.randn(4, 3, SIZE, SIZE), 0)
    model = model.to(gpu_timing.DEVICE, DTYPES[dtype])
    x = torch.randn(batch, 3, SIZE, SIZE, device=gpu_timing.DEVICE).to(DTYPES[dtype])
    last, model_last = x.to(memory_format=LAST), copy.deepcopy(model).to(memory_format=LAST)
    exact = copy.deepcopy(model).double()(x[:2].double())
    ways: dict[str, tuple[nn.Module | Layer, Tensor]] = {
        "ours channels_last": (swap(model_last), last),
        "ours contiguous": (swap(model), x),
        "eager channels_last": (model_last, last),
        "eager contiguous": (model, x),
    }
    if backends.why_not("triton", device=gpu_timing.DEVICE) is None:
        ways["ours channels_last, triton"] = swap(model_last, backend="triton"), last
    for mode in modes:
        torch._dynamo.reset()
        options = (
            None if mode == "compile" else "max-autotune-no-cudagraphs"
        )  # graphs are made here
        run = compiled(model_last, last, options)
        if run is not None:
            ways[f"{mode} channels_last"] = run, last
    if modes and find_spec("torch_tensorrt") is not None:  # a backend of torch.compile by itself
        run = compiled(model_last, last, backend="tensorrt")
        if run is not None:
            ways["TensorRT channels_last"] = run, last

    graphs, calls, memory = {}, {}, {}
    errors: dict[str, float | None] = {}
    for way, (call, given) in ways.items():
        try:
            call(given), call(given)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            y = call(given)
            peak = torch.cuda.max_memory_allocated() - before
            off = (y[:2].double() - exact).abs().max().item() / exact.abs().max().item()
            replay, _ = gpu_timing.graph_of(call, [given])
        except torch.AcceleratorError:
            raise
        except Exception as error:  # the other ways still count
            print(f"{name}, {way}: {type(error).__name__}: {error}")
            if way.startswith("ours"):
                errors[way] = None
            continue
        errors[way] = off if math.isfinite(off) else None  # JSON has no others
        memory[way], graphs[way], calls[way] = peak, replay, partial(call, given)
    plain = gpu_timing.device_times(calls, 1, rounds=7, lead=False)
    replayed = gpu_timing.device_times(graphs, 1, rounds=7)
    native = max(off or 0.0 for way, off in errors.items() if way.startswith("eager"))
    depth = sum(isinstance(m, (_ConvNd, nn.Linear)) for m in model.modules())
    # TF32 has float16's mantissa.
    rounded = "float16" if dtype == "float32" and may_use_tf32() else dtype
    allowed = tolerance(native, depth, rounded)
    return {
        "model": name, "batch": batch, "dtype": dtype, "error": errors, "peak_bytes": memory,
        "ours_correct": all(
            off is not None and off <= allowed
            for way, off in errors.items() if way.startswith("ours")
        ),
        "images_per_s": {n: batch / s.median for n, s in plain.items()},
        "images_per_s_graph": {n: batch / s.median for n, s in replayed.items()},
        "ms": {n: s.summary(1e-3) for n, s in plain.items()},
        "ms_graph": {n: s.summary(1e-3) for n, s in replayed.items()},
    }  # fmt: skip


def plan() -> list[tuple[Any, ...]]:
    """(function, its arguments), the rows that matter most first: what the project's goals speak
    of."""
    names, one = list(networks()), ("compile",)
    rows = [(n, batch, "bfloat16", one) for n in names for batch in (256, 1)]
    rows += [(n, 256, "float32", one) for n in names]
    rows += [(n, 256, "bfloat16", ("compile", "max-autotune")) for n in names]  # one peer more
    rows += [(n, batch, "float32", one) for batch in (1, 32) for n in names]
    rows += [(n, 32, "bfloat16", one) for n in names]
    return [(network_row, *row) for row in rows]
