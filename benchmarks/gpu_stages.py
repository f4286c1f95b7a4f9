"""The stages of `make gpu`: each is given seconds and says what it came to."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: Runs what needs the GPU, in a process of its own.
WORKER = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--worker"]
#: Of a worker whose GPU no longer answers: another one goes on behind the row that did it.
DEVICE_LOST = 3
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
#: On a device; compute-sanitizer runs a part of them.
DEVICE_TESTS = [
    "tests/test_cuda.py", "tests/test_cuda_conv.py", "tests/test_cuda_gradients.py",
    "tests/test_cuda_in_torch.py", "tests/test_cuda_separable.py", "tests/test_cuda_training.py",
]  # fmt: skip
TRITON_TESTS = ["tests/test_triton_device.py"]
# Building in place needs nothing of pyproject.toml, which older setuptools cannot read.
BUILD = """
import runpy, sys, setuptools.dist
setuptools.dist.Distribution.parse_config_files = lambda *_, **__: None
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
Stage = dict[str, Any]


def run(command: list[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """(exit status, or None where it ran out of time; output), printed as it comes. What is out of
    time is interrupted, so that pytest tells what it knows."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | variables
    process = subprocess.Popen(
        ["timeout", "--signal=INT", "--kill-after=10", str(max(1, int(seconds))), *command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    return None if status in (124, 137) else status, "".join(lines)


def build(seconds: float) -> Stage:
    status, output = run([sys.executable, "-c", BUILD], seconds, FORCE_CUDA="1")
    said = " (out of time: what is compiled is kept for the next run)" if status is None else ""
    return {"passed": status == 0, "tail": output[-2000:] + said if status != 0 else ""}


def _pytest(
    command: Sequence[str], seconds: float, parts: Sequence[Sequence[str]] = ((),), **variables: str
) -> Stage:
    """parts: what else each of the processes is given that run side by side."""
    with ThreadPoolExecutor(len(parts)) as pool:
        done = list(pool.map(lambda part: run([*command, *part], seconds, **variables), parts))
    counts: dict[str, int] = {}
    for _, output in done:
        # The last line with counts is pytest's.
        told = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
        for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", " ".join(told[-1:])):
            counts[what] = counts.get(what, 0) + int(n)
    # Without a GPU every test would be skipped, which proves nothing.
    # 5: none of the cases is this process's.
    passed = all(status in (0, 5) for status, _ in done) and counts.get("passed", 0) > 0
    tail = "".join(output[-4000:] for status, output in done if status not in (0, 5))
    stage = {"passed": passed, "counts": counts, "tail": "" if passed else tail}
    if any(status is None for status, _ in done):
        stage["out_of_time"] = True
    return stage


def tests(seconds: float) -> Stage:
    """Each file's cases shared out between processes: what takes time is Triton's compiling, and
    the references, each on one core."""
    if importlib.util.find_spec("pytest") is None:
        print("there is no pytest: the tests cannot be run")
        return {"passed": False, "left_out": "there is no pytest"}
    files = [*DEVICE_TESTS, "tests/test_bad_input.py"]
    some = max(1, min(CORES, 16) // 4)
    parts = [["--share", f"{i}/{some}", *files] for i in range(some)]
    parts += [["--share", f"{i}/{3 * some}", *TRITON_TESTS] for i in range(3 * some)]
    return _pytest([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], seconds, parts)


def suite(seconds: float) -> Stage:
    """All other tests but the proofs without a GPU; what a machine lacks for a file is told."""
    proofs = ["emulation", "machine_code", "traffic", "wheel"]
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests",
        "--continue-on-collection-errors", *(f"--ignore-glob=*{proof}*" for proof in proofs),
        *(f"--ignore={file}" for file in (*DEVICE_TESTS, *TRITON_TESTS)),
    ]  # fmt: skip
    told = _pytest(command, seconds)
    if told.get("out_of_time") and not told["counts"].get("failed"):
        told["passed"] = True
    return told


def triton(seconds: float) -> Stage:
    """Kernels in Triton's cache, compiled by as many processes as there are cores; what could not
    be compiled is told by the stage that needs it."""
    worker = [*WORKER, "triton", "--seconds", str(seconds - 15)]
    parts = min(CORES, 16)
    with ThreadPoolExecutor(parts) as pool:
        commands = [[*worker, "--rows", f"{i}/{parts}"] for i in range(parts)]
        done = list(pool.map(lambda command: run(command, seconds), commands))
    kernels = [int(n) for _, output in done for n in re.findall(r"^compiled (\d+)", output, re.M)]
    failed = [output[-2000:] for status, output in done if status not in (0, None)]
    return {"passed": not failed, "counts": {"kernels": sum(kernels)}, "tail": "".join(failed[:1])}


def cuda_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


def sanitizer(seconds: float) -> Stage:
    tool = cuda_tool("compute-sanitizer")
    if tool is None:
        print("there is no compute-sanitizer: memcheck and racecheck are left out")
        return {"left_out": "there is no compute-sanitizer"}
    result: Stage = {"passed": True}
    for check in ("memcheck", "racecheck"):
        command = [
            tool, "--tool", check, "--error-exitcode", "86", sys.executable, "-m", "pytest", "-q",
            "-p", "no:cacheprovider", *DEVICE_TESTS, "-k", "test_sanitized",
        ]  # fmt: skip
        # Every tensor is an allocation of its own, whose ends the tool knows.
        told = _pytest(command, seconds / 2, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if "Device not supported" in told["tail"]:
            print(f"{check} does not run on this machine and is left out")
            return {"left_out": "compute-sanitizer does not support this machine"}
        # What it has not come to is no error.
        found = told["counts"].get("failed") or re.search(
            "Invalid __|[Rr]ace reported", told["tail"]
        )
        told["passed"] = told["passed"] or bool(told.get("out_of_time") and not found)
        result[check] = told
        result["passed"] = result["passed"] and told["passed"]
    return result


def lagging(layers: list[dict[str, Any]], most: int = 8) -> list[dict[str, Any]]:
    """What the profiler is asked about: calls of ours that lose to a peer, or at batch 256 reach
    less than 90 % of copy speed; the worst first."""
    found = []
    for row in layers:
        for layout in ("channels_last", "contiguous"):
            if layout not in row:
                continue
            speedup = row[layout]["against_best_peer"]["median"]
            part = row[layout]["fraction_of_copy"]
            if speedup < 1 or (row["batch"] == 256 and part < 0.9):
                call = {key: row[key] for key in ("shape", "batch", "dtype")}
                found.append((speedup, call | {"layout": layout}))
    return [call for _, call in sorted(found, key=lambda pair: pair[0])[:most]]


def profile(seconds: float, layers: list[dict[str, Any]]) -> Stage:
    """What limits the kernels that lag, by Nsight Compute's own words and figures."""
    tool = cuda_tool("ncu")
    if tool is None:
        return {"left_out": "there is no ncu"}
    calls, deadline, told = lagging(layers), time.monotonic() + seconds, []
    for call in calls:
        left = deadline - time.monotonic()
        if left < 20:
            break
        status, output = run(
            [tool, "--csv", "--page", "details", "--section", "SpeedOfLight", "--section",
             "Occupancy", "--kernel-name", "regex:dwconv", "--launch-count", "1", *WORKER,
             "call", "--seconds", "0", "--rows", json.dumps(call)], left,
        )  # fmt: skip
        lines = [line for line in output.splitlines() if line.startswith('"')]
        figures = {
            row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
            for row in csv.DictReader(lines) if row.get("Metric Name")
        }  # fmt: skip
        if not figures:  # counters are often for administrators only
            return {"left_out": f"ncu does not work here: {output[-500:]}"}
        told.append(call | {"figures": figures, "finished": status == 0})
    return {"passed": True, "rows": told, "asked": len(calls)}


def measured(stage: str, seconds: float) -> Stage:
    """Rows of benchmarks/gpu_measure.py, which runs on its own: what it leaves in time counts. Of
    rows that come again, with more peers, the last."""
    rows = ROOT / "build" / f"gpu-{stage}.jsonl"
    rows.parent.mkdir(exist_ok=True)
    rows.unlink(missing_ok=True)
    until, status, output = time.monotonic() + seconds, DEVICE_LOST, ""
    while status == DEVICE_LOST and (left := until - time.monotonic()) > 30:
        status, output = run(
            [*WORKER, stage, "--seconds", str(left - 20),
             "--rows", str(rows)], left,
        )  # fmt: skip
    lines = rows_of(rows)
    found: dict[str, dict[str, Any]] = {}
    for row in lines:
        if "left_out" not in row:
            named = [row.get(key) for key in ("model", "shape", "size", "batch", "dtype")]
            found[json.dumps(named)] = row
    left_out = [row for row in lines if "left_out" in row]
    if not lines and status is None:
        return {"left_out": "out of time", "tail": output[-2000:]}
    right = all(row["ours_correct"] for row in found.values())
    return {
        "passed": right and len(found) > 0 and not any(row.get("device_lost") for row in left_out),
        "rows": list(found.values()),
        "rows_left_out": [row["left_out"] for row in left_out],
        "finished": status == 0,
        "tail": "" if status == 0 else output[-2000:],
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The last line may be cut short."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


STEPS = {"build": build, "tests": tests, "triton": triton, "sanitizer": sanitizer, "suite": suite}
