"""The Triton kernels compiled ahead of time: no spills, 16-byte accesses, loads shared.

Every configuration that autotuning may choose is in the committed table
(triton_machine_code.csv), which a digest of the kernels' code keeps fresh; a sample is compiled
here again, with whatever Triton there is.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import rulers
import torch

pytest.importorskip("triton")
if rulers.BACKEND == "triton":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

import triton
import triton_machine_code
from triton_machine_code import (
    ALL,
    BARE,
    DENSE,
    KERNELS,
    OTHERS,
    SEPARABLE,
    TARGETS,
    TRAINING,
    Case,
    facts,
)

EVERY = {str(case): case for case in triton_machine_code.every_configuration()}
#: Far below 255 registers ptxas keeps two to four words in memory, to fit one more block on a
#: multiprocessor: no want of registers, and no choice of ours.
TRADED = {
    "backward_weight-sm_90-float32-nhwc-32x112-k3s2-1x1-w4",
    "conv_bn_act-sm_100-ieee-nhwc-32x14-k1s1-128x32-w8",
    "statistics-sm_90-float32-nhwc-32x112-k5s2-1x1-w4",
    "training_conv-sm_90-bfloat16-nchw-128x56-k3s2-7x4-w4",
}


def sample() -> list[Case]:
    """A few of each kernel, from elsewhere in the list of each: other targets, types, layouts."""
    chosen = []
    for i, kernel in enumerate(ALL):
        of_it = [EVERY[name] for name in sorted(EVERY) if EVERY[name].kernel == kernel]
        few = 3 if kernel in SEPARABLE | DENSE else 2
        chosen += [of_it[int(len(of_it) * (i / 12 + j / few)) % len(of_it)] for j in range(few)]
    return chosen


#: What is compiled here too.
SAMPLE = sample()


@pytest.fixture(scope="module")
def table() -> triton_machine_code.Table:
    table = triton_machine_code.committed()
    if table.triton != triton.__version__:
        pytest.skip(f"the table is of Triton {table.triton}, here is {triton.__version__}")
    return table


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The sample, on two cores, into a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            yield {case: pool.submit(facts, case) for case in SAMPLE}


# ---- what is wanted of every configuration ----
def assert_good(case: Case, found: dict) -> None:
    if str(case) in TRADED:
        assert 0 < found["stack"] <= 16 and found["registers"] < 100, found
    else:
        assert found["stack"] == 0, found
    if case in BARE or (case.channels_last and case.taps < 9 and case.kernel in KERNELS | TRAINING):
        assert_wide(case, found)
    if case.kernel in SEPARABLE | DENSE:
        assert_matrix(case, found)
    if case.kernel in DENSE:  # none is dropped when it is tuned
        kilobytes = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
        assert found["shared"] <= kilobytes[case.target] * 1024, case


def assert_wide(case: Case, found: dict) -> None:
    """Taps, scale and shift are float32 or of the tensors' type: 16 bytes for each too."""
    assert found["wide_loads"] == found["loads"] > 0, (case, found)
    if case.target.startswith("sm") and case.kernel in ("forward", "backward_data"):
        assert found["wide_stores"] == found["stores"] > 0, (case, found)


def assert_matrix(case: Case, found: dict) -> None:
    plain = case.precision == "ieee" and case.dtype == torch.float32  # float32 without losses
    assert (found["matrix"] == 0) == (plain and case.target.startswith("sm")), found
    if case.channels_last and case.target.startswith("sm"):
        assert found["wide_stores"] == found["stores"] > 0


# ---- the table ----
def test_the_table_is_of_this_code(table):
    renew = "python tests/triton_machine_code.py"
    codes = {kernel: triton_machine_code.code(kernel) for kernel in table.codes}
    assert codes == table.codes, f"kernels have changed: {renew}"
    assert table.rows.keys() == EVERY.keys(), f"configurations have changed: {renew}"


def test_every_configuration_is_good(table):
    assert EVERY.keys() >= TRADED
    for name, case in EVERY.items():
        assert_good(case, table.rows[name])


CONTIGUOUS = [
    case for case in OTHERS if not case.channels_last and case.size == 56 and case.kernel in KERNELS
]


@pytest.mark.parametrize("case", CONTIGUOUS, ids=str)
def test_contiguous_moves_16_bytes_at_once(table, case):
    """A row of the patch and the edges that its taps reach over; the taps are single numbers."""
    found = table.rows[str(case)]
    rows = case.configurations()[case.choice].kwargs["ROWS"]
    if case.stride == 1:
        assert found["wide_loads"] >= rows + (0 if case.kernel == "backward_conv" else 2)
    else:  # dx is written in 16 bytes, dy read in 8
        assert found["wide_loads"] + found["wide_stores"] >= rows
    if case.kernel == "forward" and case.stride == 1:
        assert found["wide_stores"] == found["stores"] == rows


@pytest.mark.parametrize("choice", range(3))
def test_no_input_is_loaded_twice(table, choice):
    """The loads of a patch that coincide are one: (ROWS + 2) * (COLS + 2) for a 3x3 kernel."""
    case = Case("forward", choice=choice if choice < 2 else -1)
    config = case.configurations()[case.choice].kwargs
    taps, affine = 9, 4  # 8 scales and 8 shifts in float32
    loads = (config["ROWS"] + 2) * (config["COLS"] + 2) + taps + affine
    assert table.rows[str(case)]["loads"] == loads


# ---- the compiler ----
def test_the_sample_is_of_everything():
    assert {case.kernel for case in SAMPLE} == ALL.keys()
    assert {case.target for case in SAMPLE} == set(TARGETS)
    assert {(case.dtype, case.channels_last) for case in SAMPLE} >= {
        (dtype, last) for dtype in (torch.float32, torch.bfloat16) for last in (True, False)
    }


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_the_table_says_what_the_compiler_does(compiled, case):
    found = compiled[case].result()
    assert_good(case, found)
    committed = triton_machine_code.committed()
    if committed.triton == triton.__version__:
        numbers = {key: found[key] for key in triton_machine_code.COLUMNS}
        assert numbers == committed.rows[str(case)]
