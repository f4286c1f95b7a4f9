"""`make gpu`: everything that needs a GPU, with this very Python and its torch; no network.

python benchmarks/gpu.py [--stages build,tests,...] [--minutes 25] [--output FILE.json]

Stages, the most important first: build, tests, layers, separable, conv, training, sanitizer,
networks, profile (ncu on the kernels that lag), suite (all tests that need no emulation). Each has
a share of the time and leaves its part of the result when it ends, so a run that is cut short is a
result; stages that are run later are added to the same file. Exit status: 1 if the build, a test or
a sanitizer failed or a benchmark found a wrong answer, else 0. What a machine lacks is said and
left out.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_table import table

ROOT = Path(__file__).parents[1]
#: Of the time given, what each stage may take at most.
SHARES = {
    "build": 0.12, "tests": 0.12, "layers": 0.22, "separable": 0.08, "conv": 0.04,
    "training": 0.12, "sanitizer": 0.1, "networks": 0.1, "profile": 0.03, "suite": 0.07,
}  # fmt: skip
#: On a device; compute-sanitizer runs a part of them.
DEVICE_TESTS = [
    "tests/test_cuda.py", "tests/test_cuda_conv.py", "tests/test_cuda_gradients.py",
    "tests/test_cuda_in_torch.py", "tests/test_cuda_separable.py", "tests/test_cuda_training.py",
]  # fmt: skip
# Building in place needs nothing of pyproject.toml, which older setuptools cannot read.
BUILD = """
import runpy, sys, setuptools.dist
setuptools.dist.Distribution.parse_config_files = lambda *_, **__: None
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
#: Rows of the second backend, beside those of CUDA, which are named by the layout alone.
TRITON = ("channels_last, triton", "contiguous, triton")
_Stage = dict[str, Any]


def run(command: list[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """(exit status, or None where it ran out of time; output), printed as it comes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | variables
    process = subprocess.Popen(
        ["timeout", "--kill-after=10", str(int(seconds)), *command], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    return None if status in (124, 137) else status, "".join(lines)


def build(seconds: float) -> _Stage:
    status, output = run([sys.executable, "-c", BUILD], seconds, FORCE_CUDA="1")
    return {"passed": status == 0, "tail": output[-2000:] if status != 0 else ""}


def _pytest(command: list[str], seconds: float, **variables: str) -> _Stage:
    status, output = run(command, seconds, **variables)
    counts = {
        what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", output)
    }
    said = "out of time" if status is None else ""
    # Without a GPU every test would be skipped, which proves nothing.
    passed = status == 0 and counts.get("passed", 0) > 0
    return {"passed": passed, "counts": counts, "tail": said if passed else output[-4000:] + said}


def tests(seconds: float) -> _Stage:
    if importlib.util.find_spec("pytest") is None:
        print("there is no pytest: the tests cannot be run")
        return {"passed": False, "left_out": "there is no pytest"}
    files = [*DEVICE_TESTS, "tests/test_bad_input.py", "tests/test_triton_device.py"]
    files = [file for file in files if (ROOT / file).exists()]
    return _pytest(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], seconds
    )


def suite(seconds: float) -> _Stage:
    """All other tests but the proofs without a GPU; what a machine lacks for a file is told."""
    proofs = ["emulation", "machine_code", "traffic", "wheel"]
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests",
        "--continue-on-collection-errors", *(f"--ignore-glob=*{proof}*" for proof in proofs),
        *(f"--ignore={file}" for file in DEVICE_TESTS),
    ]  # fmt: skip
    told = _pytest(command, seconds)
    if told["tail"].endswith("out of time"):
        return told | {"passed": True, "left_out": "out of time"}
    return told


def cuda_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


def sanitizer(seconds: float) -> _Stage:
    tool = cuda_tool("compute-sanitizer")
    if tool is None:
        print("there is no compute-sanitizer: memcheck and racecheck are left out")
        return {"left_out": "there is no compute-sanitizer"}
    result: _Stage = {"passed": True}
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


def profile(seconds: float, layers: list[dict[str, Any]]) -> _Stage:
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
             "Occupancy", "--kernel-name", "regex:dwconv", "--launch-count", "1", sys.executable,
             __file__, "--worker", "call", "--seconds", "0", "--rows", json.dumps(call)], left,
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


def measured(stage: str, seconds: float) -> _Stage:
    """Rows of benchmarks/gpu_measure.py, which runs on its own: what it leaves in time counts."""
    rows = ROOT / "build" / f"gpu-{stage}.jsonl"
    rows.parent.mkdir(exist_ok=True)
    rows.unlink(missing_ok=True)
    status, output = run(
        [sys.executable, __file__, "--worker", stage, "--seconds", str(seconds - 20),
         "--rows", str(rows)], seconds,
    )  # fmt: skip
    lines = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    found = [row for row in lines if "left_out" not in row]
    return {
        "passed": all(row["ours_correct"] for row in found) and len(found) > 0,
        "rows": found,
        "rows_left_out": [row["left_out"] for row in lines if "left_out" in row],
        "finished": status == 0,
        "tail": "" if status == 0 else output[-2000:],
    }


def environment(seconds: float) -> dict[str, Any]:
    """Device, versions, commit and copy bandwidth, asked in a process of its own."""
    status, output = run(
        [sys.executable, __file__, "--worker", "environment", "--seconds", "0", "--rows", "-"],
        seconds,
    )  # fmt: skip
    told = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(told[-1]) if status == 0 and told else {"error": output[-2000:]}


def worker(stage: str, seconds: float, rows: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    if stage != "environment":
        import gpu_measure

        if stage == "call":
            return gpu_measure.call_once(**json.loads(rows))
        return gpu_measure.work(stage, seconds, Path(rows))
    import torch

    from mnet_kernels import backends
    from mnet_kernels.timing import environment as facts

    told = facts()
    reason = backends.why_not("cuda", device="cuda")
    if reason is None:
        import gpu_measure

        properties = torch.cuda.get_device_properties(0)
        told |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": (gpu_measure.smi("driver_version") or [None])[0],
            "kernels": backends.cuda_info(),
            "multiprocessors": properties.multi_processor_count,
            "copy_gb_per_s": gpu_measure.copy_bandwidth(),
        }
    print(json.dumps(told | {"why_not": reason}))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default=",".join(SHARES), help="default: all")
    parser.add_argument("--minutes", type=float, default=25, help="for all stages together")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    parser.add_argument("--commit", help="what is tested, where this is no git checkout")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.seconds, options.rows)
        return 0
    chosen = options.stages.split(",")
    if unknown := set(chosen) - set(SHARES):
        parser.error(f"--stages: expected some of {', '.join(SHARES)}, got {', '.join(unknown)}")

    whole = 60 * options.minutes / sum(SHARES[name] for name in chosen)
    steps = {"build": build, "tests": tests, "sanitizer": sanitizer, "suite": suite}
    result: dict[str, Any] = {}
    passed = True
    for name in [stage for stage in SHARES if stage in chosen]:
        share, start = SHARES[name] * whole, time.monotonic()
        print(f"== {name} (at most {share / 60:.1f} minutes)", flush=True)
        if name != "build" and not result:
            result = begin(options.output, options.commit)
        step = steps.get(name)
        if name == "profile":
            stage = profile(share, result["stages"].get("layers", {}).get("rows", []))
        else:
            stage = step(share) if step else measured(name, share)
        stage["seconds"] = round(time.monotonic() - start, 1)
        if not result:  # it was the build, which the rest needs
            if not stage["passed"]:
                return 1
            result = begin(options.output, options.commit)
        result["stages"][name] = stage
        passed = passed and stage.get("passed", True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(table(result))
    print(table(result))
    print(f"Result: {options.output}, {options.output.with_suffix('.md').name}")
    return 0 if passed else 1


def begin(output: Path, commit: str | None) -> dict[str, Any]:
    """A result without stages, or with those of `output` if it is of the same commit and GPU."""
    facts = environment(120)
    facts["commit"] = facts.get("commit") or commit
    if reason := facts.get("error") or facts.get("why_not"):
        raise SystemExit(f"there is nothing to run on: {reason}")
    result = {"environment": facts, "stages": {}}
    if output.exists():
        previous = json.loads(output.read_text())
        known = previous["environment"]
        if all(known.get(key) == facts.get(key) for key in ("commit", "gpu", "torch")):
            result["stages"] = previous["stages"]
    return result


if __name__ == "__main__":
    sys.exit(main())
