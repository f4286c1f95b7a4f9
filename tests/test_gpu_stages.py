"""`make gpu` without a GPU: its stages, their time, and what is left when something goes wrong."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FACTS = {"gpu": "G", "torch": "2", "tree": "t", "commit": "c", "date": "d", "copy_gb_per_s": 1.0}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    monkeypatch.setattr(gpu, "environment", lambda seconds: dict(FACTS))
    yield gpu
    for module in [name for name in sys.modules if name.split("_")[0] == "gpu"]:
        sys.modules.pop(module, None)


@pytest.fixture
def stages(gpu):
    return gpu.gpu_stages


def options(tmp_path, minutes=10.0):
    return argparse.Namespace(minutes=minutes, output=tmp_path / "gpu.json", commit=None)


def result(tmp_path):
    return json.loads((tmp_path / "gpu.json").read_text())


def test_what_runs_out_of_time_is_interrupted_and_heard(stages):
    """And its output may be anything."""
    program = (
        "import sys, time\n"
        "sys.stdout.buffer.write(b'begun \\xff\\n'); sys.stdout.flush()\n"
        "try: time.sleep(30)\n"
        "except KeyboardInterrupt: print('5 passed in 1.0s')\n"
    )
    start = time.monotonic()
    status, output = stages.run([sys.executable, "-c", program], 2)
    assert status is None and time.monotonic() - start < 12
    assert "begun" in output and "5 passed" in output


def test_what_the_user_has_on_the_path_stays_there(stages, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/of/mine")
    _, output = stages.run([sys.executable, "-c", "import sys; print(sys.path)"], 20)
    assert str(ROOT) in output and "/somewhere/of/mine" in output


def test_processes_of_tests_are_one_stage(stages, monkeypatch):
    said = {
        "0/2": (0, "3 tests failed 9 passed in a log\n4 passed, 1 skipped in 2.0s"),
        "1/2": (1, "E assert\n1 failed, 2 passed in 70.12s (0:01:10)"),
        "2/2": (5, "no tests ran in 0.1s"),
        "3/2": (None, "3 passed in 8.0s"),
    }
    monkeypatch.setattr(stages, "run", lambda command, seconds, **_: said[command[-1]])
    stage = stages._pytest(["pytest"], 9, [[name] for name in said])
    assert stage["counts"] == {"passed": 9, "skipped": 1, "failed": 1}
    assert not stage["passed"] and stage["out_of_time"] and "E assert" in stage["tail"]
    stage = stages._pytest(["pytest"], 9, [["0/2"], ["2/2"]])
    assert stage == {"passed": True, "counts": {"passed": 4, "skipped": 1}, "tail": ""}


def test_every_case_is_some_processs(stages, monkeypatch):
    monkeypatch.setattr(stages, "CORES", 16)
    given = []

    def run(command, seconds, **_):
        given.append(command)
        return 0, "1 passed in 1.0s"

    monkeypatch.setattr(stages, "run", run)
    assert stages.tests(100)["passed"]
    for files, count in ((stages.DEVICE_TESTS, 4), (stages.TRITON_TESTS, 12)):
        shares = [c[c.index("--share") + 1] for c in given if files[0] in c]
        assert sorted(shares) == sorted(f"{i}/{count}" for i in range(count))
        assert all((ROOT / file).exists() for file in files)


def test_the_sanitizer_finds_or_runs_out_of_time(stages, monkeypatch):
    monkeypatch.setattr(stages, "cuda_tool", lambda name: name)
    for said, passed in (
        ((None, "2 passed in 8.0s"), True),
        ((None, "========= Invalid __global__ read of size 4"), False),
        ((86, "2 passed in 8.0s"), False),
        ((0, "2 passed in 8.0s"), True),
    ):
        monkeypatch.setattr(stages, "run", lambda *_, said=said, **__: said)
        assert stages.sanitizer(60)["passed"] is passed
    monkeypatch.setattr(stages, "run", lambda *_, **__: (1, "Device not supported"))
    assert stages.sanitizer(60)["left_out"]


def test_a_stage_that_breaks_stops_no_other_and_time_flows_on(gpu, stages, monkeypatch, tmp_path):
    shares = {}

    def stage(name):
        def run(seconds):
            shares[name] = seconds
            if name == "triton":
                raise ValueError("broken")
            return {"passed": True, "counts": {}}

        return run

    for name in stages.STEPS:
        monkeypatch.setitem(stages.STEPS, name, stage(name))
    row = {"ours_correct": True, "images_per_s": {}, "images_per_s_graph": {}, "peak_bytes": {}}
    monkeypatch.setattr(
        stages, "measured", lambda name, seconds: stage(name)(seconds) | {"rows": [row]}
    )
    chosen = ["build", "tests", "triton", "networks"]
    assert gpu.run_stages(chosen, options(tmp_path)) == 1
    told = result(tmp_path)["stages"]
    assert list(told) == chosen and not told["triton"]["passed"] and told["networks"]["passed"]
    assert "ValueError: broken" in told["triton"]["tail"]
    # The build took no time: what it might have taken is the others'.
    weights = [gpu.SHARES[name] for name in chosen]
    for i, name in enumerate(chosen):
        assert shares[name] == pytest.approx(600 * weights[i] / sum(weights[i:]), rel=0.02)
    assert "triton: FAILED" in (tmp_path / "gpu.md").read_text()


def test_results_add_up_for_the_same_sources_only(gpu, stages, monkeypatch, tmp_path):
    for name in stages.STEPS:
        monkeypatch.setitem(stages.STEPS, name, lambda seconds: {"passed": True, "counts": {}})
    assert gpu.run_stages(["tests"], options(tmp_path)) == 0
    assert gpu.run_stages(["triton"], options(tmp_path)) == 0
    assert list(result(tmp_path)["stages"]) == ["tests", "triton"]
    # Out of time is no reason to forget.
    assert gpu.run_stages(["tests"], options(tmp_path, minutes=0.01)) == 0
    assert result(tmp_path)["stages"]["tests"]["passed"]
    monkeypatch.setattr(gpu, "environment", lambda seconds: FACTS | {"tree": "another"})
    assert gpu.run_stages(["suite"], options(tmp_path)) == 0
    assert list(result(tmp_path)["stages"]) == ["suite"]


def test_a_failed_build_is_the_end(gpu, stages, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(stages.STEPS, "build", lambda s: {"passed": False, "tail": "nvcc failed"})
    assert gpu.run_stages(["build", "tests"], options(tmp_path)) == 1
    assert "the build failed: nvcc failed" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "environment", lambda seconds: {"why_not": "there is no CUDA GPU"})
    with pytest.raises(SystemExit, match="nothing to run on: there is no CUDA GPU"):
        gpu.run_stages(["tests"], options(tmp_path))


def test_the_digest_is_of_the_sources(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    source = tmp_path / "csrc" / "a.cu"
    source.parent.mkdir()
    source.write_text("1")
    before = gpu.tree()
    (tmp_path / "csrc" / "a.o").write_text("built")
    assert gpu.tree() == before
    source.write_text("2")
    assert gpu.tree() != before


def test_a_lost_device_costs_its_row(gpu, stages, monkeypatch, tmp_path, capsys):
    """Each worker a process in truth; a row that is cut short is none."""
    import gpu_measure

    def make(number, modes):
        made.append(number)
        if number == 1:
            raise torch.AcceleratorError("illegal memory access")
        if number == 2:
            raise ValueError("too large")
        return {"shape": [number], "ours_correct": True, "modes": modes}

    made: list[int] = []
    plan = [(make, n, ("compile",)) for n in (0, 1, 2, 3, 0)]

    def run(command, seconds, **_):
        stage, _, _, _, rows = command[3:]
        assert stage == "layers"
        alive = gpu_measure.work(stage, 1000.0, Path(rows))
        return (0 if alive else stages.DEVICE_LOST), ""

    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "run", run)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_measure, "smi", lambda fields: None)
    monkeypatch.setattr(
        gpu_measure, "import_module", lambda name: argparse.Namespace(plan=lambda: plan)
    )
    (tmp_path / "build").mkdir()
    stage = stages.measured("layers", 100)
    assert made == [0, 1, 2, 3, 0]
    assert [row["shape"] for row in stage["rows"]] == [[0], [3]]
    assert len(stage["rows_left_out"]) == 2 and stage["finished"]
    assert not stage["passed"]  # ours may be what lost it
    rows = tmp_path / "build" / "gpu-layers.jsonl"
    rows.write_text(rows.read_text() + '{"shape": [')
    assert len(stages.rows_of(rows)) == 5


def test_a_stage_that_came_to_nothing_is_left_out(stages, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    (tmp_path / "build").mkdir()
    monkeypatch.setattr(stages, "run", lambda *_, **__: (None, "compiling"))
    assert stages.measured("layers", 100)["left_out"] == "out of time"
    monkeypatch.setattr(stages, "run", lambda *_, **__: (1, "ImportError"))
    stage = stages.measured("layers", 100)
    assert not stage["passed"] and stage["tail"] == "ImportError"


def test_when_time_is_short_nothing_is_compiled_and_nothing_repeated(gpu, monkeypatch, tmp_path):
    import gpu_measure

    made = []
    plan = [(lambda *row: made.append(row) or {"ours_correct": True}, n, ("compile",))
            for n in (0, 1, 0)]  # fmt: skip
    spent = iter([0.1, 0.1, 0.7, 0.7, 0.7, 0.7])
    monkeypatch.setattr(gpu_measure.Clock, "spent", lambda self: next(spent))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_measure, "smi", lambda fields: None)
    monkeypatch.setattr(
        gpu_measure, "import_module", lambda name: argparse.Namespace(plan=lambda: plan)
    )
    assert gpu_measure.work("layers", 10, tmp_path / "rows.jsonl")
    assert made == [(0, ("compile",)), (1, ())]


def test_it_asks_for_no_more_packages_than_it_says(stages):
    """CONTRIBUTING: nvcc, a CUDA torch, setuptools, ninja and pytest."""
    others = ("rich", "click", "hypothesis", "PIL", "pytest_benchmark", "torchvision", "timm")
    modules = ("timing", "errors", "layers", "networks", "fused", "triton", "training", "measure")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
        f"sys.path[:0] = ['benchmarks', 'tests']\n"
        "import importlib\n"
        f"for name in {modules}: importlib.import_module('gpu_' + name)\n"
        "import gpu, conftest, test_cuda, test_cuda_separable, test_triton_device\n"
        "print(sorted(sys.modules['gpu_networks'].networks()))\n"
    )
    status, output = stages.run([sys.executable, "-c", program], 60)
    assert status == 0 and "mobilenet_v2 is left out" in output and "['mobilenet_v1']" in output


@pytest.fixture
def on_the_cpu(gpu, monkeypatch):
    """Triton's operators on CPU tensors, none of their kernels started."""
    triton = pytest.importorskip("triton")
    import gpu_networks
    import gpu_timing
    import gpu_triton

    from mnet_kernels import backends
    from mnet_kernels.models import mobilenet_v1
    from mnet_kernels.nn import server
    from mnet_kernels.runs import stage_by_stage
    from mnet_kernels.triton import launch

    if launch.TRITON_INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    compiled = []

    def warmup(self, *args, grid, **constants):
        missing = set(self.arg_names[len(args) :]) - set(constants)
        assert not missing, (self.__name__, missing)
        compiled.append((self.__name__, tuple(sorted(constants.items()))))

    caches = backends._first, server._found, server.dense_server
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(triton.JITFunction, "warmup", warmup)
    monkeypatch.setattr(gpu_timing, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_triton, "SIZE", 32)
    monkeypatch.setattr(
        gpu_triton, "networks", lambda: {"v1": lambda: mobilenet_v1(alpha=0.25, num_classes=10)}
    )
    monkeypatch.setattr(backends, "why_not", lambda *_, **__: None)
    monkeypatch.setattr(stage_by_stage, "TRITON_INTERPRETED", True)
    assert gpu_networks.SIZE == 224
    yield gpu_triton, compiled
    for cache in caches:
        cache.cache_clear()


def test_triton_is_compiled_ahead_each_kernel_once(on_the_cpu):
    gpu_triton, compiled = on_the_cpu
    whole = gpu_triton.work(0, 1, 1000)
    assert len(whole) == len(set(whole)) == len(compiled)
    parts = [gpu_triton.work(i, 3, 1000) for i in range(3)]
    assert sorted(itertools.chain(*parts)) == sorted(whole)
    assert min(map(len, parts)) > len(whole) / 5
    names = {name for name, _ in compiled}
    assert names >= {"_forward", "_separable", "_conv", "_statistics", "_backward_conv"}
    # Every layer of the plan, in both dtypes and layouts.
    import gpu_layers

    want = {(c, k, s) for row in gpu_layers.plan() for c, _, _, k, s, _ in [row[2]]}
    for last in (True, False):
        found = {(c["C"], c["KH"], c["SH"]) for name, pairs in compiled if name == "_forward"
                 for c in [dict(pairs)] if c["CHANNELS_LAST"] is last}  # fmt: skip
        assert found >= want
    assert gpu_triton.work(0, 1, -1) == []
