"""The plan of a session with its time limit, and the fixtures that measure a row.

README.md beside this says what is measured how, and what a result looks like.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import racing
import torch
from machine import ceilings
from peers import Case, Ready
from peers_engines import versions
from result_files import FORMAT
from torch import Tensor

from mnet_kernels.timing import environment

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
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_collection_finish(session):
    session.config.mnet_plan.rows = len(session.items)


def pytest_report_teststatus(report):
    if report.when == "call" and report.passed:
        return "passed", "", ""  # the plan has a line for it
    return None


def pytest_benchmark_update_machine_info(config, machine_info):
    tuned = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}
    machine_info.pop("cpu", None)  # `cpu` below says enough
    machine_info["mnet_kernels"] = environment() | {
        "format": FORMAT, "malloc": tuned, "peers": versions(), "families": racing.FAMILIES,
    }  # fmt: skip


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["machine_info"]["mnet_kernels"]["ceilings"] = ceilings()
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        for key in ("options", "params", "param"):
            row.pop(key, None)


class _Plan:
    """How far the session is, and whether there is time for another row."""

    def __init__(self, config):
        minutes = config.getoption("--minutes")
        self.limit_s = float("inf") if minutes is None else 60 * minutes
        self.start = time.monotonic()
        self.rows = self.done = 0
        self.config = config

    def say(self, text: str) -> None:
        capture = self.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(text, flush=True)

    def begin(self) -> None:
        if self.done == 0:
            limit = "no time limit" if self.limit_s == float("inf") else _clock(self.limit_s)
            self.say(f"\n{self.rows} rows, {limit}; ours against the best peer of each:")
        self.done += 1
        if time.monotonic() - self.start > self.limit_s:
            pytest.skip(f"the {_clock(self.limit_s)} minutes are used up: --minutes")

    def end(self, row: dict[str, Any]) -> None:
        spent = time.monotonic() - self.start
        left = min(spent / self.done * (self.rows - self.done), self.limit_s - spent)
        shape = "x".join(map(str, row["shape"])) if "shape" in row else row.get("size", "")
        name = f"{row.get('model', row['kind'])} {shape} b{row['batch']} {row['dtype']}"
        ours, best = (row["us"][who]["median"] / 1e3 for who in ("ours", row["best_peer"]))
        self.say(
            f"{self.done:>4}/{self.rows} {name:<46}{ours:>9.3f} ms, {row['best_peer']} "
            f"{best:.3f}: {row['speedup']['median']:.2f}x {row['verdict']}; "
            f"at most {_clock(max(left, 0))} left"
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


@pytest.fixture(autouse=True)
def _fresh():
    """Nothing of other rows: after eight modules of a class torch silently stops compiling."""
    torch.manual_seed(1)
    torch.compiler.reset()


@pytest.fixture
def _recorded(benchmark, request):
    """Ends a row: for pytest-benchmark, whose own statistics are of ours, and on the terminal."""
    plan = request.config.mnet_plan
    plan.begin()

    def record(row: dict[str, Any], ours: Callable[[], Any], grad: bool) -> dict[str, Any]:
        benchmark.extra_info.update(row)
        repeats = max(1, int(1e3 / row["us"]["ours"]["median"]))
        with torch.inference_mode(not grad):
            benchmark.pedantic(ours, rounds=3, iterations=repeats)
        plan.end(row)
        return row

    return record


@pytest.fixture
def race(_recorded, request):
    """race(case, ours, others, ...): every peer there is against ours, on one case."""
    full = request.config.getoption("--full")

    def run(
        case: Case, ours: Ready, others: dict[str, Ready], slow: tuple[str, ...] = (),
        **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """slow: which of the peers that take long to build the default plan has."""
        left_out = {
            peer.name: "only with --full"
            for peer in racing.PEERS if peer.slow and peer.name not in slow and not full
        }  # fmt: skip
        return _recorded(
            *racing.race(case, {"ours": ours, **others}, left_out=left_out, **settings), grad=False
        )

    return run


@pytest.fixture
def measure(_recorded):
    """measure(ours, peers, exact, tolerance, others=None, **row): the same for plain calls that
    return tensors. All must be right; the speed-ups are against the best of `peers`.
    """

    def run(
        ours: Callable[[], Tensor], peers: dict[str, Callable[[], Tensor]], exact: Tensor,
        tolerance: float, others: dict[str, Callable[[], Tensor]] | None = None,
        grad: bool = False, budget_s: float = 1.5, **row: Any,
    ) -> dict[str, Any]:  # fmt: skip
        calls = {"ours": ours, **peers, **(others or {})}
        errors = {}
        with torch.inference_mode(not grad):
            for name, call in calls.items():
                errors[name] = racing.error_of(call(), exact)
                assert errors[name] <= tolerance, f"{name} is wrong by {errors[name]:.1e}"
        families = {name: racing.FAMILIES.get(name, "torch") for name in peers}
        row |= {"threads": torch.get_num_threads(), "error": errors}
        return _recorded(racing.timed(calls, families, row, budget_s, grad=grad), ours, grad)

    return run
