"""`make gpu`: everything that needs a GPU, with this very Python and its torch; no network.

python benchmarks/gpu.py [--stages build,tests,...] [--minutes 13] [--output FILE.json]

Stages, the most important first: build, tests, triton (its kernels compiled ahead, on all cores),
networks, layers, separable, training, conv, sanitizer, profile (ncu on the kernels that lag), suite
(all tests that need no emulation). Each has a share of the time that is left, and leaves its part
of the result when it ends, so a run that is cut short is a result; a stage that breaks does not
stop the others, and stages that are run later are added to the same file. Exit status: 1 if the
build, a test or a sanitizer failed or a benchmark found a wrong answer, else 0. What a machine
lacks is said and left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import gpu_stages
from gpu_table import table

ROOT = Path(__file__).parents[1]
#: Of the time that a stage and those after it have, it may take its share of theirs.
SHARES = {
    "build": 0.2, "tests": 0.17, "triton": 0.07, "networks": 0.14, "layers": 0.16,
    "separable": 0.07, "training": 0.07, "conv": 0.03, "sanitizer": 0.06, "profile": 0.02,
    "suite": 0.01,
}  # fmt: skip


def environment(seconds: float) -> dict[str, Any]:
    """Device, versions, commit and copy bandwidth, asked in a process of its own."""
    status, output = gpu_stages.run(
        [*gpu_stages.WORKER, "environment", "--seconds", "0", "--rows", "-"], seconds
    )
    told = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(told[-1]) if status == 0 and told else {"error": output[-2000:]}


def worker(stage: str, seconds: float, rows: str) -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    if stage == "call":
        import gpu_layers

        gpu_layers.call_once(**json.loads(rows))
    elif stage == "triton":
        import gpu_triton

        part, parts = map(int, rows.split("/"))
        print(f"compiled {len(gpu_triton.work(part, parts, seconds))} kernels")
    elif stage == "environment":
        print(json.dumps(facts_here()))
    else:
        import gpu_measure

        return 0 if gpu_measure.work(stage, seconds, Path(rows)) else gpu_stages.DEVICE_LOST
    return 0


def facts_here() -> dict[str, Any]:
    import torch

    from mnet_kernels import backends
    from mnet_kernels.timing import environment as facts

    told = facts() | {"tree": tree()}
    reason = backends.why_not("cuda", device="cuda")
    if reason is None:
        import gpu_timing

        properties = torch.cuda.get_device_properties(0)
        told |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": (gpu_timing.smi("driver_version") or [None])[0],
            "kernels": backends.cuda_info(),
            "multiprocessors": properties.multi_processor_count,
            "copy_gb_per_s": gpu_timing.copy_bandwidth(),
        }
    return told | {"why_not": reason}


def tree() -> str:
    """What is measured, where a commit does not say it: a digest of the sources."""
    digest = hashlib.sha256()
    for folder in ("csrc", "mnet_kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".inc", ".csv"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default=",".join(SHARES), help="default: all")
    parser.add_argument("--minutes", type=float, default=13, help="for all stages together")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    parser.add_argument("--commit", help="what is tested, where this is no git checkout")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options.seconds, options.rows)
    chosen = options.stages.split(",")
    if unknown := set(chosen) - set(SHARES):
        parser.error(f"--stages: expected some of {', '.join(SHARES)}, got {', '.join(unknown)}")
    return run_stages([name for name in SHARES if name in chosen], options)


def run_stages(chosen: list[str], options: argparse.Namespace) -> int:
    until = time.monotonic() + 60 * options.minutes
    result: dict[str, Any] = {}
    passed = True
    for number, name in enumerate(chosen):
        start = time.monotonic()
        if name != "build" and not result:
            result = begin(options.output, options.commit)
        left = until - time.monotonic()
        share = left * SHARES[name] / sum(SHARES[later] for later in chosen[number:])
        print(f"== {name} (at most {share / 60:.1f} minutes)", flush=True)
        stage = stage_of(name, share, result)
        stage["seconds"] = round(time.monotonic() - start, 1)
        if not result:  # it was the build, which the rest needs
            if not stage.get("passed"):
                print(f"the build failed: {stage.get('tail', 'out of time')[-500:]}")
                return 1
            result = begin(options.output, options.commit)
        if "left_out" not in stage or name not in result["stages"]:  # an earlier run's still counts
            result["stages"][name] = stage
        passed = passed and stage.get("passed", True)
        write(result, options.output)
    print(table(result))
    print(f"Result: {options.output}, {options.output.with_suffix('.md').name}")
    return 0 if passed else 1


def stage_of(name: str, seconds: float, result: dict[str, Any]) -> gpu_stages.Stage:
    """What a stage comes to; one that breaks does not take the others with it."""
    if seconds < 15:
        return {"left_out": "out of time"}
    try:
        if name == "profile":
            layers = result["stages"].get("layers", {}).get("rows", [])
            return gpu_stages.profile(seconds, layers)
        step = gpu_stages.STEPS.get(name)
        return step(seconds) if step else gpu_stages.measured(name, seconds)
    except Exception:
        traceback.print_exc()
        return {"passed": False, "tail": traceback.format_exc()[-2000:]}


def write(result: dict[str, Any], output: Path) -> None:
    """As a whole or not at all: the run may be cut short at any time."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (output, json.dumps(result, indent=1) + "\n"), (output.with_suffix(".md"), table(result))
    ):  # fmt: skip
        new = path.with_name(path.name + ".new")
        new.write_text(text, encoding="utf-8")
        new.replace(path)


def begin(output: Path, commit: str | None) -> dict[str, Any]:
    """A result without stages, or with those of `output` if it is of the same sources, GPU and
    torch."""
    facts = environment(120)
    facts["commit"] = facts.get("commit") or commit
    if reason := facts.get("error") or facts.get("why_not"):
        raise SystemExit(f"there is nothing to run on: {reason}")
    result = {"environment": facts, "stages": {}}
    if output.exists():
        previous = json.loads(output.read_text(encoding="utf-8"))
        known = previous["environment"]
        if all(known.get(key) == facts.get(key) for key in ("tree", "gpu", "torch")):
            result["stages"] = previous["stages"]
    return result


if __name__ == "__main__":
    sys.exit(main())
