"""The Triton backend without a GPU: the operator tests in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so they run in a Python of their own, and a
share of the table only: the interpreter takes a second a call. All of it:
``TRITON_INTERPRET=1 pytest --backend triton tests/test_dwconv_bn_act.py ...``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent
#: Tests, which cases of them, and which of them not.
RUNS = {
    # Threads, prefetching and files of 14 GiB are the cpu backend's; the interpreter has no fused
    # multiply-add, which native's accuracy rests on.
    "operator": (
        ("test_dwconv_bn_act.py",), "2/9", "not threads and not beyond and not 2_to_31 "
        "and not no_less_accurate",
    ),
    "gradients": (("test_fused_gradients.py",), "0/3", ""),
    "torch": (("test_triton_in_torch.py", "test_bad_input.py"), "0/1", ""),
}  # fmt: skip


def interpreter_command(name: str) -> tuple[list[str], dict[str, str]]:
    files, share, expression = RUNS[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly",
               "--backend", "triton", "--share", share, "-k", expression,
               *(str(TESTS / file) for file in files)]  # fmt: skip
    environment = os.environ | {"TRITON_INTERPRET": "1", "HYPOTHESIS_PROFILE": "interpreter"}
    return command, environment


@pytest.fixture(scope="module")
def interpreted():
    """All runs at once: each computes on one core."""
    running = {}
    for name in RUNS:
        command, environment = interpreter_command(name)
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
    assert int(re.search(r"(\d+) passed", out).group(1)) > 20
