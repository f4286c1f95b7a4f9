"""Shared fixtures: every instruction set, poisoned memory, one hypothesis profile."""

from __future__ import annotations

import os
from collections import Counter
from zlib import crc32

import pytest
import rulers
import torch

from mnet_kernels import _C

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # `make gpu` takes what Python packages a GPU machine has
    pass
else:
    # CI runs the same examples everywhere; HYPOTHESIS_PROFILE=search looks further.
    settings.register_profile(
        "ci", max_examples=150, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    settings.register_profile(
        "search", settings.get_profile("ci"), max_examples=2000, derandomize=False
    )
    settings.register_profile("interpreter", settings.get_profile("ci"), max_examples=5)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

INSTRUCTION_SETS = tuple(_C.build_info()["instruction_sets"])


#: Begun first: files of minutes, then those of more than twenty seconds, so that no worker is left
#: alone with one at the end.
LONGEST = (
    "test_wheel.py", "test_cuda_emulation.py", "test_triton.py", "test_cuda_emulation_backward.py",
    "test_cuda_emulation_training.py", "test_cuda_machine_code.py", "test_triton_machine_code.py",
    "test_train_together.py", "test_train_many.py", "test_dwconv_training.py",
    "test_dwconv_bn_act.py", "test_train_interrupted.py", "test_evaluate.py", "test_cli.py",
    "test_swap_models.py", "test_models.py",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One more than cores: a worker often waits for a process, and that one for the network."""
    return min(os.cpu_count() or 1, 8) + 1


def pytest_addoption(parser):
    parser.addoption("--backend", choices=["triton"], help="run the operator tests on this backend")
    parser.addoption("--share", help="I/N: of every parametrised test, each N-th case from I on")


def pytest_configure(config):
    torch.manual_seed(20261123)  # tensors in the names of cases: the same for every worker
    if config.getoption("--backend") == "triton":
        rulers.use_triton_interpreter()


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # one of several processes
        items.sort(key=lambda item: (*LONGEST, item.path.name).index(item.path.name))
    if config.getoption("--share") is None:
        return
    first, step = map(int, config.getoption("--share").split("/"))
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        name = item.nodeid.split("[")[0]
        if seen[name] % step == first or "[" not in item.nodeid:
            kept.append(item)
        seen[name] += 1
    items[:] = kept


def pytest_generate_tests(metafunc):
    if "instruction_set" in metafunc.fixturenames:
        sets = INSTRUCTION_SETS if rulers.BACKEND is None else (rulers.BACKEND,)
        metafunc.parametrize("instruction_set", sets, indirect=True)


@pytest.fixture(autouse=True)
def _configuration(request):
    """In Triton's interpreter: every test takes one of the configurations that fit, always the
    same one."""
    if rulers.BACKEND == "triton":
        from mnet_kernels.triton import launch

        launch.interpreted_choice = crc32(request.node.nodeid.encode()) % 3
    yield


@pytest.fixture
def instruction_set(request):
    """Runs the test once with the kernels of each instruction set this machine has, or of the
    backend under test."""
    if request.param in INSTRUCTION_SETS:
        _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(INSTRUCTION_SETS[0])


@pytest.fixture
def poisoned_memory():
    """New tensors start as NaN: an element that a kernel does not write is found."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _same_start():
    """One seed, and one thread: test tensors are too small to share, and a busy machine then
    costs nothing. Tests of threads set their own."""
    torch.manual_seed(20261123)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
