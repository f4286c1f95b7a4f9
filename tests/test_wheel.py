"""One wheel for every torch: built in pip's isolation under one, tested under another.

What the kernels compute is tested elsewhere; here a share of the operator tests is enough, which
calls everything."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mnet_kernels import backends

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).parents[1]
OPERATOR_TESTS = ("test_dwconv_bn_act.py", "test_conv_bn_act.py", "test_bad_input.py",
                  "test_torch_integration.py")  # fmt: skip
BUILD_TORCH, RUN_TORCH = "2.14.1", "2.13.0"
#: Compiled again: a file with torch's headers, which lie elsewhere in isolation.
COMPILED_AGAIN = "conv_bn_act.o"


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
    # Where there is nvcc, for what the build in place is for: a wheel's six architectures take
    # minutes. Its objects serve again, for as long as they are of these sources and this torch.
    built = backends._why_no_cuda is None
    architectures = backends.cuda_info()["architectures"] if built else "8.0+PTX"
    isolated |= {"TORCH_CUDA_ARCH_LIST": architectures}
    if (ROOT / "build/cuda").is_dir():
        shutil.copytree(ROOT / "build/cuda", source / "build/cuda")
        for torchs in (source / "build/cuda").rglob(COMPILED_AGAIN):
            torchs.unlink()
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", place, source, env=isolated)
    (built,) = place.glob("mnet_kernels-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel) -> dict[str, str]:
    """For a Python that has the wheel and another torch before the installed one."""
    packages = wheel.parent / "packages"
    run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--target", packages, wheel,
        f"torch=={RUN_TORCH}", env=ONCE,
    )  # fmt: skip
    if (libraries := importlib.util.find_spec("nvidia")) is not None:  # gigabytes of them
        (packages / "nvidia").symlink_to(libraries.submodule_search_locations[0])
    return os.environ | {"PYTHONPATH": str(packages)}


@pytest.fixture(scope="module")
def tests(wheel) -> Path:
    tests = wheel.parent / "tests"
    tests.mkdir()
    for name in ("conftest.py", "rulers.py", *OPERATOR_TESTS):
        shutil.copy2(ROOT / "tests" / name, tests / name)
    return tests


def test_is_built_in_isolation(wheel):
    assert wheel.stat().st_size > 0


def test_built_under_one_torch_loads_under_another(wheel, environment):
    facts = run(
        sys.executable, "-c",
        "import torch, mnet_kernels._C as c; print(torch.__version__, c.__file__, c.build_info())",
        cwd=wheel.parent, env=environment,
    )  # fmt: skip
    assert facts.startswith(RUN_TORCH)
    assert f" {wheel.parent / 'packages'}" in facts
    assert f"'built_with_torch': '{BUILD_TORCH}" in facts


def test_built_under_one_torch_runs_under_another(tests, environment):
    out = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not 2_to_31",
        "--share", "1/7", *(tests / file for file in OPERATOR_TESTS), cwd=tests,
        env=environment | {"PYTHONPATH": f"{environment['PYTHONPATH']}{os.pathsep}{tests}"},
    )  # fmt: skip
    assert int(re.search(r"(\d+) passed", out).group(1)) > 400 and "failed" not in out
