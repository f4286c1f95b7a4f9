"""The machine: threads bound to CPUs, its caches, and what it can do at best."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mnet_kernels import ops
from mnet_kernels.timing import interleave

#: Threads that the default plan measures with: as many as there are CPUs, two at most.
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
THREADS = min(2, len(CPUS))
#: Thread pools spin for about this long after a call.
SETTLE_S = 2e-3

METHOD = (
    "copy: torch.Tensor.copy_, bytes in plus out; matrix: the fastest of our packed pointwise "
    "convolution, F.conv2d and torch.mm, on 256 and 512 channels at 28x28; medians"
)


@contextlib.contextmanager
def bound(threads: int) -> Iterator[None]:
    """torch and everybody else get ``threads`` threads and as many CPUs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    _bind(CPUS[:threads])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _bind(CPUS)


def _bind(cpus: list[int]) -> None:
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return  # not Linux: the threads are equal, but not bound
    for task in tasks.iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.sched_setaffinity(int(task.name), cpus)


@functools.cache
def last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not say."""
    sizes = [1]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        with contextlib.suppress(ValueError):
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes) if max(sizes) > 1 else 32 << 20


@functools.cache
def _copy_gb_per_s(threads: int) -> dict[int, float]:
    """By bytes in plus out, from the inner caches to the memory."""
    rates = {}
    with bound(threads):
        for size in (1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20):
            source = torch.randn(size // 8)
            target = torch.empty_like(source)
            times = interleave(
                {"copy": lambda t=target, s=source: t.copy_(s)}, budget_s=0.2, settle_s=SETTLE_S
            )
            rates[size] = size / times["copy"].median / 1e9
    return rates


@functools.cache
def _matrix_gflop_per_s(threads: int, dtype: torch.dtype) -> float:
    best = 0.0
    with bound(threads), torch.inference_mode():
        for channels in (256, 512):
            x = torch.randn(4, channels, 28, 28).to(dtype, memory_format=torch.channels_last)
            weight = torch.randn(channels, channels, 1, 1).to(dtype)
            a, b = x.permute(0, 2, 3, 1).reshape(-1, channels), weight.view(channels, channels)
            calls = {"F.conv2d": lambda x=x, w=weight: F.conv2d(x, w),
                     "torch.mm": lambda a=a, b=b: torch.mm(a, b)}  # fmt: skip
            if ops.packs(dtype):
                packed = ops.pack_conv_weight(weight)
                calls["packed"] = lambda x=x, packed=packed, n=channels: ops.conv_bn_act_packed(
                    x, packed, kernel_size=1, out_channels=n, activation="identity"
                )
            times = interleave(calls, budget_s=0.5, settle_s=SETTLE_S)
            flops = 2 * x.numel() * channels
            best = max(best, *(flops / t.median / 1e9 for t in times.values()))
    return best


def ceilings() -> dict[str, Any]:
    """What was measured of the above in this session, ready for JSON."""
    return {"method": METHOD, "threads": _measured}


_measured: dict[str, dict[str, Any]] = {}


def matrix_rate(threads: int, dtype: torch.dtype) -> float:
    """GFLOP/s of the best matrix product; measures a row's ceilings, once a session."""
    entry = _measured.setdefault(
        str(threads), {"copy_gb_per_s": _copy_gb_per_s(threads), "matrix_gflop_per_s": {}}
    )
    rate = _matrix_gflop_per_s(threads, dtype)
    entry["matrix_gflop_per_s"][str(dtype).removeprefix("torch.")] = rate
    return rate
