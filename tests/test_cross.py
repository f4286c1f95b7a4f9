"""The CPU kernels under other compilers and on another processor: clang, and Arm's NEON emulated.

Skipped where these tools are not installed (Debian: g++-aarch64-linux-gnu, qemu-user, clang).
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from mnet_kernels import _C

ROOT = Path(__file__).parent.parent
INSTRUCTION_SETS = _C.build_info()["instruction_sets"]


@pytest.mark.parametrize(
    "target,compiler,emulator",
    [
        ("baseline", ["aarch64-linux-gnu-g++", "-static"], ["qemu-aarch64"]),
        *((name, ["clang++"], []) for name in ("baseline", "avx2", "avx512", "avx512_bf16")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_kernels(tmp_path, target, compiler, emulator):
    for tool in (compiler[0], *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if not emulator and target not in INSTRUCTION_SETS:
        pytest.skip(f"{platform.machine()} without {target}")
    program = tmp_path / "kernels"
    names = [target, "avx512"] if target == "avx512_bf16" else [target]  # which builds on avx512
    sources = [f"csrc/cpu/instruction_set_{name}.cpp" for name in names]
    subprocess.run(
        [*compiler, "-std=c++20", "-O2", "-Wno-psabi", f"-DMNET_ISA={target}",
         "-Icsrc/cpu", "tests/cross/kernels.cpp", *sources, "-o", program], cwd=ROOT, check=True,
    )  # fmt: skip
    done = subprocess.run([*emulator, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout
