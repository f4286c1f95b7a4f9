"""Peers in a row of the benchmarks: the missing and the wrong are said, the best is what counts."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mnet_kernels.timing import Spread

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import machine
import peers_engines
import racing
from peers import TORCH, Case, Missing, Peer, Ready, folded


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(racing, "matrix_rate", lambda threads, dtype: 100.0)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU6())
    return Case(model.eval(), torch.randn(2, 4, 6, 5), threads=1)


@pytest.fixture
def take(monkeypatch):
    """take(name=milliseconds, ...): what the clock will say, without waiting for it."""

    def take(**ms: float) -> None:
        def interleave(calls, **_):
            return {n: Spread((ms[n] / 1e3, ms[n] / 0.99e3, ms[n] / 1.01e3)) for n in calls}

        monkeypatch.setattr(racing, "interleave", interleave)

    return take


def native(case: Case) -> Ready:
    return Ready(case.model)


def missing(case: Case) -> Ready:
    raise Missing("it is not installed")


def test_a_row_says_who_is_missing_wrong_or_broken_and_counts_the_best(case, take):
    take(ours=6.0, slow=20.0, quick=10.0, engine=4.0, copy=3.0)
    there = [
        Peer("slow", "torch", native),
        Peer("quick", "torch", native),
        Peer("engine", "engine", native),
        Peer("absent", "engine", missing),
        Peer("throws", "engine", lambda case: 1 / 0),
        Peer("wrong", "engine", lambda case: Ready(lambda x: case.model(x) * 1.001)),
        Peer("breaks", "engine", lambda case: Ready(lambda x: x[100])),
        Peer("costly", "engine", missing),
    ]
    row, _ = racing.race(
        case, {"ours": native(case)}, there, left_out={"costly": "takes too long"},
        budget_s=0.3, bytes=1 << 12, flops=10**6, kind="layer",
    )  # fmt: skip
    assert row["missing_peers"] == {
        "costly": "takes too long",
        "absent": "it is not installed",
        "throws": "ZeroDivisionError: division by zero",
        "wrong": row["missing_peers"]["wrong"],
        "breaks": row["missing_peers"]["breaks"],
    }
    assert "wrong: off by 1.0e-03" in row["missing_peers"]["wrong"]
    assert "IndexError" in row["missing_peers"]["breaks"]
    assert set(row["us"]) == {"ours", "slow", "quick", "engine", "copy"}
    assert (row["best_torch"], row["best_engine"], row["best_peer"]) == ("quick",) + ("engine",) * 2
    assert row["speedup_torch"]["median"] == pytest.approx(10 / 6, rel=1e-3)
    assert row["speedup"]["median"] == pytest.approx(4 / 6, rel=1e-3)
    assert row["verdict"] == "slower"
    assert row["gflop_per_s"] == pytest.approx(1 / 6, rel=1e-3)
    assert row["fraction_of_matrix"] == pytest.approx(1 / 600, rel=1e-3)
    assert row["fraction_of_copy"] == pytest.approx(0.5, rel=1e-3)


def test_ours_must_be_right(case):
    with pytest.raises(AssertionError, match=r"ours is wrong: off by 1\.0e-02"):
        racing.race(case, {"ours": Ready(lambda x: case.model(x) * 1.01)}, [])


def test_a_cold_row_rotates_through_more_than_the_last_level_cache(case, monkeypatch):
    monkeypatch.setattr(racing, "last_level_cache", lambda: 10 * case.x.nbytes)
    seen = []

    def run(x):
        seen.append(x.data_ptr())
        return case.model(x)

    row, _ = racing.race(case, {"ours": Ready(run)}, TORCH[:1], cold=True, budget_s=0.1)
    assert row["cache"] == "cold"
    assert len(set(seen)) == 20 and seen[1:21] == seen[21:41]


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"])
def test_folding_a_network_leaves_its_answers(name):
    import torchvision

    from mnet_kernels.models import mobilenet_v1
    from mnet_kernels.subjects import randomise_batchnorm

    model = mobilenet_v1(0.25) if name == "mobilenet_v1" else getattr(torchvision.models, name)()
    x = torch.randn(2, 3, 64, 64)
    randomise_batchnorm(model.eval(), x)
    fast = folded(model.double())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    with torch.inference_mode():
        torch.testing.assert_close(fast(x.double()), model(x.double()))


def test_a_peer_of_plain_pytorch_is_right(case):
    row, _ = racing.race(case, {"ours": Ready(case.model)}, TORCH[:5], budget_s=0.1)
    assert row["missing_peers"] == {} and len(row["us"]) == 6
    assert max(row["error"].values()) < 1e-6


def test_an_engine_that_is_not_installed_is_said(monkeypatch, case):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(peers_engines, "version", lambda name: None)
    engines = [p for p in peers_engines.ENGINES if p.name == "ONNX Runtime"]
    row, _ = racing.race(case, {"ours": Ready(case.model)}, [*TORCH[:1], *engines], budget_s=0.1)
    assert row["missing_peers"] == {"ONNX Runtime": "onnxruntime is not installed"}
    assert "speedup_engine" not in row


def test_threads_are_equal_and_bound_and_given_back():
    import os

    before = torch.get_num_threads()
    with machine.bound(1):
        assert torch.get_num_threads() == 1
        assert os.sched_getaffinity(0) == set(machine.CPUS[:1])
    assert torch.get_num_threads() == before
    assert os.sched_getaffinity(0) == set(machine.CPUS)
