"""The plan of a session with its time limit, and one measurement for all rows.

README.md beside this says what is measured how, and what a result looks like.
"""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from machine import SETTLE_S, bound, ceilings, last_level_cache, note
from peers import TORCH, Case, Missing, Ready
from peers_engines import ENGINES, versions
from result_files import FORMAT
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mnet_kernels.compare import tolerance
from mnet_kernels.timing import Spread, environment, interleave, ratio, verdict

Call = Callable[[], Tensor]

PEERS = [*TORCH, *ENGINES]
FAMILIES = {peer.name: peer.family for peer in PEERS}
#: In this order the rows run: what matters most first, should the time be up before the end.
ORDER = ["test_networks", "test_pairs", "test_layers", "test_training"]


def pytest_addoption(parser):
    group = parser.getgroup("mnet_kernels")
    group.addoption("--full", action="store_true", help="all rows against all peers (hours)")
    group.addoption("--minutes", type=float, default=None, help="start no row after this time")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: a row that only --full measures")
    config.mnet_plan = _Plan(config)


def pytest_collection_modifyitems(config, items):
    def place(item):
        return ORDER.index(item.module.__name__) if item.module.__name__ in ORDER else len(ORDER)

    items.sort(key=place)
    if not config.getoption("--full"):
        beyond = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=beyond)
        items[:] = [item for item in items if item not in beyond]
    config.mnet_plan.rows = len(items)


def pytest_benchmark_update_machine_info(config, machine_info):
    tuned = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}
    machine_info.pop("cpu", None)  # `cpu` below says enough
    machine_info["mnet_kernels"] = environment() | {
        "format": FORMAT, "malloc": tuned, "peers": versions(), "families": FAMILIES,
    }  # fmt: skip


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["machine_info"]["mnet_kernels"]["ceilings"] = ceilings()
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        row.pop("options", None), row.pop("params", None), row.pop("param", None)


class _Plan:
    """How far the session is, and whether there is time for another row."""

    def __init__(self, config):
        minutes = config.getoption("--minutes")
        self.limit_s = float("inf") if minutes is None else 60 * minutes
        self.start = time.monotonic()
        self.rows = self.done = 0
        self.say = lambda text: config.get_terminal_writer().line(text)

    def begin(self) -> None:
        spent = time.monotonic() - self.start
        if self.done == 0:
            limit = "no time limit" if self.limit_s == float("inf") else _clock(self.limit_s)
            self.say(f"\n{self.rows} rows, {limit}; ours against the best peer of each:")
        if spent > self.limit_s:
            self.done += 1
            pytest.skip(f"the {_clock(self.limit_s)} minutes are used up: --minutes")

    def end(self, row: dict[str, Any]) -> None:
        self.done += 1
        spent = time.monotonic() - self.start
        left = min(spent / self.done * (self.rows - self.done), self.limit_s - spent)
        shape = "x".join(map(str, row["shape"])) if "shape" in row else row.get("size", "")
        name = f"{row.get('model', row['kind'])} {shape} b{row['batch']} {row['dtype']}"
        speedup, us = row["speedup"], row["us"]
        self.say(
            f"{self.done:>4}/{self.rows} {name:<52}{us['ours']['median'] / 1e3:>9.3f} ms "
            f"{us[row['best_peer']]['median'] / 1e3:>9.3f} ({row['best_peer']}) "
            f"{speedup['median']:.2f}x {row['verdict']}; about {_clock(left)} left"
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


@pytest.fixture
def measure(benchmark, request):
    """measure(ours, peers, exact, tolerance, others=None, **row): check every candidate, time them
    in turns, record the row.

    The row's speed-ups are against the best of `peers`; `others` are timed beside them.
    pytest-benchmark's own statistics are of `ours`.
    """
    plan = request.config.mnet_plan
    plan.begin()

    def run(
        ours: Call, peers: dict[str, Call], exact: Tensor, tolerance: float,
        others: dict[str, Call] | None = None, grad: bool = False, **row: Any,
    ) -> dict[str, Any]:  # fmt: skip
        errors = {}
        calls = {"ours": ours, **peers, **(others or {})}
        with torch.inference_mode(not grad):
            for name, call in calls.items():
                errors[name] = _error(call(), exact)
                assert errors[name] <= tolerance, f"{name} is wrong by {errors[name]:.1e}"
        row |= {"threads": torch.get_num_threads(), "error": errors}
        return _record(benchmark, plan, calls, list(peers), row, grad=grad)

    return run


@pytest.fixture
def race(benchmark, request):
    """race(case, ours, others, ...): every peer there is against ours, on one case."""
    plan = request.config.mnet_plan
    plan.begin()
    full = request.config.getoption("--full")

    def run(
        case: Case, ours: Ready, others: dict[str, Ready], *, cold: bool = False,
        slow: tuple[str, ...] = (), without: tuple[str, ...] = (), **row: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """slow: which of the peers that are slow to build the default plan has."""
        name = str(case.dtype).removeprefix("torch.")
        rate = note(case.threads, case.dtype)
        torch.compiler.reset()
        with bound(case.threads), torch.inference_mode():
            exact = copy.deepcopy(case.model).double()(case.x.double())
            allowed = _allowed(case, exact)
            ready = {"ours": ours, **others}
            missing = {}
            for peer in PEERS:
                if not full and (peer.name in without or (peer.slow and peer.name not in slow)):
                    missing[peer.name] = "not in the default plan: --full"
                    continue
                try:
                    with torch.inference_mode(False), torch.no_grad():
                        ready[peer.name] = peer.build(case)
                except Missing as why:
                    missing[peer.name] = str(why)
                except Exception as error:  # whatever its library throws
                    missing[peer.name] = _one_line(error)
            in_call = row["bytes"] if "bytes" in row else case.x.nbytes + exact.nbytes
            inputs = [case.x]
            if cold:
                inputs = [torch.randn_like(case.x) for _ in range(_rotation(case.x.nbytes))]
                inputs[0] = case.x
            errors, calls = {}, {}
            for who, how in ready.items():
                taken = [how.take(x) for x in inputs]
                try:
                    error = _error(how.read(how.run(taken[0])), exact)
                except Exception as failure:
                    if who not in FAMILIES:
                        raise
                    missing[who] = _one_line(failure)
                    continue
                if error <= allowed:
                    errors[who], calls[who] = error, _rotating(how.run, taken)
                elif who in FAMILIES:
                    missing[who] = f"wrong: off by {error:.1e}, allowed is {allowed:.1e}"
                else:
                    pytest.fail(f"{who} is off by {error:.1e}, allowed is {allowed:.1e}")
            row |= {
                "batch": len(case.x), "dtype": name, "threads": case.threads,
                "direction": "forward", "error": errors, "missing_peers": missing,
                "cache": "cold" if cold or in_call > last_level_cache() else "warm",
            }  # fmt: skip
            peers = [who for who in calls if who in FAMILIES]
            return _record(benchmark, plan, calls, peers, row, len(inputs), rate)

    return run


def _rotation(nbytes: int) -> int:
    return max(2, -(-2 * last_level_cache() // nbytes))


def _rotating(run: Callable[[Any], Any], taken: list[Any]) -> Call:
    if len(taken) == 1:
        only = taken[0]
        return lambda: run(only)
    turn = itertools.cycle(taken)
    return lambda: run(next(turn))


def _allowed(case: Case, exact: Tensor) -> float:
    """The error that is allowed in a row: native's own, with room for another order of sums."""
    depth = sum(isinstance(m, (_ConvNd, nn.Linear)) for m in case.model.modules())
    native = _error(case.model(case.x), exact)
    return tolerance(native, depth, str(case.dtype).removeprefix("torch."))


def _error(y: Tensor, exact: Tensor) -> float:
    if y.shape != exact.shape:
        return float("inf")
    error = ((y.double() - exact).abs().max() / exact.abs().max()).item()
    return error if error >= 0 else float("inf")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _record(
    benchmark: Any, plan: _Plan, calls: dict[str, Call], peers: list[str], row: dict[str, Any],
    rotation: int = 1, matrix_rate: float | None = None, grad: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Times the calls in turns and writes the row down."""
    nbytes, flops = row.get("bytes"), row.get("flops")
    if nbytes:  # how fast this machine moves as many bytes, in the same rounds
        sources = [torch.randn(nbytes // 8) for _ in range(rotation)]
        target = torch.empty_like(sources[0])
        calls["copy"] = _rotating(target.copy_, sources)
    budget = row.pop("budget_s", 1.5)
    with torch.inference_mode(not grad), torch.compiler.set_stance("fail_on_recompile"):
        times = interleave(calls, budget_s=budget, settle_s=SETTLE_S)
        ours = times["ours"]
        benchmark.pedantic(calls["ours"], rounds=3, iterations=max(1, int(1e-3 / ours.median)))
    row["us"] = {name: spread.summary(1e-6) for name, spread in times.items()}
    for family in ("torch", "engine"):
        chosen = [name for name in peers if FAMILIES.get(name, "torch") == family]
        if chosen:
            row[f"best_{family}"], speedup = _best(chosen, times)
            row[f"speedup_{family}"] = speedup.summary()
    row["best_peer"], speedup = _best(peers, times)
    row["speedup"], row["verdict"] = speedup.summary(), verdict(speedup)
    if nbytes:
        row["gb_per_s"] = nbytes / ours.median / 1e9
        row["fraction_of_copy"] = times["copy"].median / ours.median
    if flops:
        row["gflop_per_s"] = flops / ours.median / 1e9
        if matrix_rate is not None:
            row["fraction_of_matrix"] = row["gflop_per_s"] / matrix_rate
    benchmark.extra_info.update(_rounded(row))
    plan.end(row)
    return row


def _best(peers: list[str], times: dict[str, Spread]) -> tuple[str, Spread]:
    best = min(peers, key=lambda name: times[name].median)
    return best, ratio(times[best], times["ours"])


def _rounded(value: Any) -> Any:
    """Four digits are more than a measurement has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
