"""What the other stages of `make gpu` run on Triton, compiled ahead on all cores (the stage
"triton"): into Triton's cache on disk, where they find it.

Every process makes all calls with small batches, on which no configuration of a kernel depends, but
starts no kernel: it compiles its share of their configurations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from zlib import crc32

import gpu_timing
import torch
from gpu_networks import SIZE, networks
from gpu_timing import DTYPES, LAYOUTS
from shapes import shapes

from mnet_kernels import swap
from mnet_kernels.triton import launch, operators

BATCH = 2
ONCE = (1, 1)


def network_calls(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    for make in networks().values():
        model = make().eval().to(gpu_timing.DEVICE, dtype, memory_format=torch.channels_last)
        x = torch.zeros(BATCH, 3, SIZE, SIZE, device=gpu_timing.DEVICE, dtype=dtype)
        x = x.to(memory_format=torch.channels_last)
        yield partial(swap(model, backend="triton"), x)


def operator_calls(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    def zeros(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, device=gpu_timing.DEVICE, dtype=kind)

    def affine(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        return zeros(channels, kind=torch.float32), zeros(channels, kind=torch.float32)

    for name in ("mobilenet_v1", "mobilenet_v3_large"):
        for c, h, w, k, s, _ in shapes(name):
            for layout in LAYOUTS.values():
                x = zeros(BATCH, c, h, w).contiguous(memory_format=layout)
                args = x, zeros(c, 1, k, k), *affine(c)
                geometry = [s, s], [k // 2] * 4, ONCE, "relu6", 0.01
                yield partial(operators.dwconv_bn_act, *args, *geometry)
                if name == "mobilenet_v1":
                    yield partial(_training, *args, *geometry)
    for c, h, w, k, s, outputs, _ in shapes("mobilenet_v1_blocks"):
        x = zeros(BATCH, c, h, w).contiguous(memory_format=torch.channels_last)
        halves = (zeros(c, 1, k, k), *affine(c), zeros(outputs, c, 1, 1), *affine(outputs), None)
        geometry = [s, s], [k // 2] * 4, ONCE, "relu6", "relu6", 0.0
        yield partial(operators.separable_conv, x, *halves, *geometry)
    for c, h, w, k, s, outputs, _ in shapes("mobilenet_v2_dense"):
        x = zeros(BATCH, c, h, w).contiguous(memory_format=torch.channels_last)
        args = x, zeros(outputs, c, k, k), *affine(outputs)
        geometry = [s, s], [k // 2] * 4, ONCE, "relu6", 0.0
        yield partial(operators.conv_bn_act, *args, *geometry)


def _training(x, weight, gamma, beta, *constants) -> None:
    y, mean, var = operators.dwconv_bn_act_training(x, weight, gamma, beta, *constants, 1e-5)
    operators.dwconv_bn_act_training_backward(
        torch.zeros_like(y), x, weight, gamma, beta, mean, var, *constants, 1e-5, True, True
    )


@contextmanager
def compiling(part: int, parts: int, compiled: list[str]) -> Iterator[None]:
    """Kernels are not started, but of all that would be tried of them this part is compiled."""
    seen: set[str] = set()

    def at(self: Any, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **constants: Any) -> None:
            tuner = self.kernel if hasattr(self.kernel, "configs") else None
            kernel, ways = (self.kernel, [{}]) if tuner is None else (tuner.fn, [])
            if tuner is not None:
                tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))  # its pruning asks
                ways = [config.all_kwargs() for config in tuner.prune_configs(constants)]
            kinds = [str(getattr(a, "dtype", a is None)) for a in args]
            for way in ways:
                key = repr((kernel.__name__, kinds, sorted((constants | way).items())))
                if key in seen or crc32(key.encode()) % parts != part:
                    continue
                seen.add(key)
                compiled.append(key)
                kernel.warmup(*args, grid=(1,), **constants, **way)

        return run

    before = launch._Compiled.__getitem__
    launch._Compiled.__getitem__ = at  # type: ignore[method-assign]
    try:
        yield
    finally:
        launch._Compiled.__getitem__ = before  # type: ignore[method-assign]


def work(part: int, parts: int, seconds: float) -> list[str]:
    """What was compiled: part `part` of `parts`, as far as the time goes."""
    until, compiled = time.monotonic() + seconds, []
    with compiling(part, parts, compiled), torch.no_grad():
        for dtype in (DTYPES["bfloat16"], DTYPES["float32"]):
            for calls in (network_calls, operator_calls):
                for call in calls(dtype):
                    if time.monotonic() > until:
                        return compiled
                    call()
    return compiled
