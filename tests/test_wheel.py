"""One wheel for every torch: built in pip's isolation under one, tested under another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).parents[1]
OPERATOR_TESTS = ("test_dwconv_bn_act.py", "test_conv_bn_act.py", "test_bad_input.py",
                  "test_torch_integration.py")  # fmt: skip
BUILD_TORCH, RUN_TORCH = "2.14.1", "2.13.0"


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


#: Python compiles what it imports: most of torch never is.
ONCE = os.environ | {"PIP_NO_COMPILE": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"  # what git has, so that nothing built here leaks in
    files = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard")
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    pins = place / "pins.txt"
    pins.write_text(f"torch=={BUILD_TORCH}\n")
    # pip reads the one or the other, by its age, for the packages that the build needs.
    isolated = ONCE | {"PIP_CONSTRAINT": str(pins), "PIP_BUILD_CONSTRAINT": str(pins)}
    # Where there is nvcc, for one architecture only: a wheel's six take minutes.
    isolated |= {"TORCH_CUDA_ARCH_LIST": "8.0+PTX"}
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", place, source, env=isolated)
    (built,) = place.glob("mnet_kernels-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel) -> Path:
    """Of an environment with the wheel and another torch."""
    place = wheel.parent
    venv.create(place / "venv", with_pip=True)
    python = place / "venv" / "bin" / "python"
    run(
        python, "-m", "pip", "install", wheel, f"torch=={RUN_TORCH}", "pytest", "hypothesis",
        "expecttest", cwd=place, env=ONCE,
    )  # fmt: skip
    return python


@pytest.fixture(scope="module")
def tests(wheel) -> Path:
    tests = wheel.parent / "tests"
    tests.mkdir()
    for name in ("conftest.py", "rulers.py", *OPERATOR_TESTS):
        shutil.copy2(ROOT / "tests" / name, tests / name)
    return tests


def test_is_built_in_isolation(wheel):
    assert wheel.stat().st_size > 0


def test_built_under_one_torch_loads_under_another(python):
    facts = run(
        python, "-c",
        "import torch, mnet_kernels._C as c; print(torch.__version__, c.build_info())",
        cwd=python.parent,
    )  # fmt: skip
    assert facts.startswith(RUN_TORCH)
    assert f"'built_with_torch': '{BUILD_TORCH}" in facts


@pytest.mark.parametrize("file", OPERATOR_TESTS)
def test_built_under_one_torch_runs_under_another(python, tests, file):
    out = run(
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not 2_to_31", tests / file,
        cwd=tests, env=os.environ | {"PYTHONPATH": str(tests)},
    )  # fmt: skip
    assert " passed" in out and "failed" not in out
