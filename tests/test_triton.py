"""The Triton backend without a GPU: the operator tests in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so they run in Pythons of their own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rulers

pytest.importorskip("triton")
if rulers.BACKEND == "triton":
    pytest.skip("starts what runs here", allow_module_level=True)

TESTS = Path(__file__).parent
#: Threads, prefetching, files of 14 GiB and where tensors lie in a page are the cpu backend's; the
#: interpreter has no fused multiply-add, which native's accuracy rests on.
NOT_TRITONS = (
    "not threads and not beyond and not 2_to_31 and not where_tensors_lie and not no_less_accurate"
)
#: Tests, which part of them, and which of them. Few runs, as each imports torch anew.
RUNS = {
    "operator": (("test_dwconv_bn_act.py",), "0/1", NOT_TRITONS),
    "gradients": (("test_fused_gradients.py", "test_triton_training.py"), "0/1", ""),
    "separable, dense": (("test_triton_separable.py", "test_triton_conv.py"), "0/1", ""),
    "torch, swap": (
        ("test_triton_in_torch.py", "test_bad_input.py", "test_triton_pairs.py",
         "test_triton_dense.py"),
        "0/1", "",
    ),
    # A GPU's tests can run at all: their kernels and most of their cases are those above.
    "device": (("test_triton_device.py",), "1/3", ""),
}  # fmt: skip


#: Ships with torch 2.10; its interpreter needs a NumPy that still takes arrays of one for ints.
OLDEST = ("triton==3.6.0", "numpy<2.4")


def interpreter_command(
    files: tuple[str, ...], share: str, expression: str
) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly",
               "--backend", "triton", "--share", share, "-k", expression,
               *(str(TESTS / file) for file in files)]  # fmt: skip
    environment = os.environ | {"TRITON_INTERPRET": "1", "HYPOTHESIS_PROFILE": "interpreter"}
    return command, environment


@pytest.fixture(scope="module")
def interpreted():
    """All runs at once, begun with the first: each computes on one core."""
    running = {}
    for name in RUNS:
        command, environment = interpreter_command(*RUNS[name])
        running[name] = subprocess.Popen(
            command, env=environment, cwd=TESTS.parent, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.parametrize("name", RUNS)
def test_in_the_interpreter(interpreted, name):
    out, _ = interpreted[name].communicate(timeout=600)
    assert interpreted[name].returncode == 0, out[-6000:]
    assert int(re.search(r"(\d+) passed", out).group(1)) > 15


@pytest.mark.old_triton
def test_the_oldest_triton_interprets_and_compiles(tmp_path):
    """Beside the installed torch, which ships a newer one."""
    other = tmp_path / "packages"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-compile",
            "--target",
            other,
            *OLDEST,
        ],
        check=True,
    )
    path = os.pathsep.join([str(other), str(TESTS.parent), str(TESTS)])
    facts = subprocess.run(
        [sys.executable, TESTS / "triton_machine_code.py", "few"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert facts.returncode == 0, facts.stderr[-4000:]
    found = json.loads(facts.stdout)
    assert found["triton"] == OLDEST[0].split("==")[1]
    for kernel in found["facts"]:
        assert kernel["stack"] == 0, kernel
        assert kernel["wide_loads"] > 0
    command, environment = interpreter_command(
        ("test_dwconv_bn_act.py", "test_fused_gradients.py", "test_triton_conv.py"), "1/6",
        NOT_TRITONS,
    )  # fmt: skip
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": path}, cwd=TESTS.parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 100
