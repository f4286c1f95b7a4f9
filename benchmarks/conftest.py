"""One measurement for all benchmarks: ours and every peer take turns in the same rounds."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mnet_kernels.timing import environment, interleave, ratio

Call = Callable[[], Tensor]


def pytest_benchmark_update_machine_info(config, machine_info):
    tuned = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}
    machine_info["mnet_kernels"] = environment() | {"malloc": tuned}


@pytest.fixture
def measure(benchmark):
    """measure(ours, peers, exact, ...): check every candidate, time them in turns, record the row.

    The row's speed-up is against the best peer; `others` are timed beside them. pytest-benchmark's
    own statistics are of `ours`.
    """

    def run(
        ours: Call, peers: dict[str, Call], exact: Tensor, tolerance: float,
        others: dict[str, Call] | None = None, **row: Any,
    ) -> dict[str, Any]:  # fmt: skip
        scale = exact.abs().max().item()
        errors = {}
        calls = {"ours": ours, **peers, **(others or {})}
        with torch.inference_mode():
            for name, call in calls.items():
                errors[name] = (call().double() - exact).abs().max().item() / scale
                assert errors[name] <= tolerance, f"{name} is wrong by {errors[name]:.1e}"
            nbytes = row.get("bytes")
            if nbytes:  # how fast this machine moves as many bytes, in the same rounds
                source = torch.randn(nbytes // 8)
                target = torch.empty_like(source)
                calls["copy"] = lambda: target.copy_(source)
            times = interleave(calls, budget_s=row.pop("budget_s", 1.5))
        best = min(peers, key=lambda name: times[name].median)
        speedup = ratio(times[best], times["ours"])
        row |= {
            "us": {name: spread.summary(1e-6) for name, spread in times.items()},
            "best_peer": best,
            "speedup": speedup.summary(),
            "error": errors,
        }
        if nbytes:
            row["gb_per_s"] = nbytes / times["ours"].median / 1e9
            row["fraction_of_copy"] = times["copy"].median / times["ours"].median
        benchmark.extra_info.update(row)
        with torch.inference_mode():
            benchmark.pedantic(ours, rounds=5, iterations=max(1, int(2e-3 / times["ours"].median)))
        return row

    return run


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)
