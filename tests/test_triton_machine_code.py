"""The Triton kernels compiled ahead of time: no spills, 16-byte accesses, loads shared.

Every configuration that autotuning may choose is in the committed table
(triton_machine_code.csv); a few are compiled here, and what the table has no room for.
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
from triton_machine_code import DENSE, FEW, KERNELS, SEPARABLE, TARGETS, TRAINING, Case, facts

EVERY = {str(case): case for case in triton_machine_code.every_configuration()}
#: Far below 255 registers ptxas keeps two to four words in memory, to fit one more block on a
#: multiprocessor: no want of registers, and no choice of ours.
TRADED = {
    "backward_weight-sm_90-float32-nhwc-32x112-k3s2-1x1-w4",
    "conv_bn_act-sm_100-ieee-nhwc-32x14-k1s1-128x32-w8",
    "statistics-sm_90-float32-nhwc-32x112-k5s2-1x1-w4",
    "training_conv-sm_90-bfloat16-nchw-128x56-k3s2-7x4-w4",
}
#: Dense convolutions without scale and shift, whose narrow loads would hide others: pointwise,
#: several taps, several taps in a block of depth.
BARE = [
    Case("conv_bn_act", target, dtype, last, *layer, choice=choice, affine=False)
    for target, dtype, last, *layer, choice in [
        ("sm_90", torch.bfloat16, True, 256, 14, 1, -1),
        ("gfx942", torch.bfloat16, True, 256, 14, 1, -1),
        ("sm_80", torch.bfloat16, True, 128, 28, 3, -1),
        ("sm_90", torch.float32, True, 128, 28, 3, -1),
        ("sm_90", torch.bfloat16, True, 24, 28, 3, 0),
        ("gfx942", torch.float32, True, 24, 28, 3, 0),
        ("sm_100", torch.float32, True, 64, 56, 1, -1),
        # Hopper's matrix units take TF32 with channels side by side: contiguous is turned in 4s.
        ("sm_80", torch.float32, False, 64, 56, 1, -1),
        ("sm_90", torch.bfloat16, False, 64, 56, 1, -1),
    ]
]
#: Of the table, what is compiled here too.
SAMPLE = [EVERY[name] for name in sorted(EVERY)[::61]]
CASES = [
    *FEW,
    *(Case(case.kernel, target, channels_last=case.channels_last)
      for case in FEW for target in ("sm_80", "sm_100")),
    *(Case("forward", choice=choice) for choice in (0, 1)),
    *(Case(k, channels_last=False, stride=2) for k in KERNELS),
    # Not in the table: kernels that are not unrolled, float16, TensorFloat-32.
    *(Case(k, channels_last=last, taps=9, size=14) for k in KERNELS for last in (True, False)),
    *(Case(k, dtype=torch.float16, channels=24, size=28) for k in KERNELS),
    *(Case(k, target, torch.float32, True, 512, 14) for k in SEPARABLE for target in TARGETS),
]  # fmt: skip


@pytest.fixture(scope="module")
def table() -> triton_machine_code.Table:
    table = triton_machine_code.committed()
    if table.triton != triton.__version__:
        pytest.skip(f"the table is of Triton {table.triton}, here is {triton.__version__}")
    return table


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every case, on two cores, into a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            yield {case: pool.submit(facts, case) for case in dict.fromkeys(CASES + SAMPLE + BARE)}


# ---- the table ----
def test_the_table_is_of_this_code(table):
    renew = "python tests/triton_machine_code.py"
    codes = {kernel: triton_machine_code.code(kernel) for kernel in table.codes}
    assert codes == table.codes, f"kernels have changed: {renew}"
    assert table.rows.keys() == EVERY.keys(), f"configurations have changed: {renew}"


def test_no_configuration_spills(table):
    spilling = {name: row for name, row in table.rows.items() if row["stack"]}
    assert spilling.keys() == TRADED
    assert all(row["stack"] <= 16 and row["registers"] < 100 for row in spilling.values())


def test_every_configuration_for_channels_last_moves_16_bytes_at_once(table):
    checked = [c for c in EVERY.values() if c.channels_last and c.kernel in KERNELS | TRAINING]
    assert len(checked) > 300
    for case in checked:
        assert_wide(case, table.rows[str(case)])


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_the_table_says_what_the_compiler_does(table, compiled, case):
    found = compiled[case].result()
    assert {key: found[key] for key in triton_machine_code.COLUMNS} == table.rows[str(case)]


# ---- what is compiled here ----
def assert_wide(case: Case, found: dict) -> None:
    """Taps, scale and shift are float32 or of the tensors' type: 16 bytes for each too."""
    assert found["wide_loads"] == found["loads"] > 0, (case, found)
    if case.target.startswith("sm") and case.kernel in ("forward", "backward_data"):
        assert found["wide_stores"] == found["stores"] > 0, (case, found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_spills(compiled, case):
    found = compiled[case].result()
    assert found["stack"] == 0, found
    if case.channels_last and case.taps < 9 and case.kernel in KERNELS:
        assert_wide(case, found)


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.channels_last and c.size == 56 and c.kernel in KERNELS],
    ids=str,
)  # fmt: skip
def test_contiguous_moves_16_bytes_at_once(compiled, case):
    """A row of the patch and the edges that its taps reach over; the taps are single numbers."""
    found = compiled[case].result()
    rows = found["config"]["ROWS"]
    if case.stride == 1:
        assert found["wide_loads"] >= rows + (0 if case.kernel == "backward_conv" else 2)
    else:  # dx is written in 16 bytes, dy read in 8
        assert found["wide_loads"] + found["wide_stores"] >= rows
    if case.kernel == "forward" and case.stride == 1:
        assert found["wide_stores"] == found["stores"] == rows


@pytest.mark.parametrize("choice", range(3))
def test_no_input_is_loaded_twice(compiled, choice):
    """The loads of a patch that coincide are one: (ROWS + 2) * (COLS + 2) for a 3x3 kernel."""
    found = compiled[Case("forward", choice=choice if choice < 2 else -1)].result()
    config = found["config"]
    taps, affine = 9, 4  # 8 scales and 8 shifts in float32
    assert found["loads"] == (config["ROWS"] + 2) * (config["COLS"] + 2) + taps + affine, found


@pytest.mark.parametrize("case", BARE, ids=str)
def test_dense_convolutions_load_16_bytes_at_once(compiled, case):
    assert_wide(case, compiled[case].result())


@pytest.mark.parametrize(
    "case", [c for c in EVERY.values() if c.kernel in SEPARABLE | DENSE], ids=str
)
def test_products_run_on_the_matrix_units(table, case):
    assert_matrix(case, table.rows[str(case)])


def test_the_tiles_of_dense_convolutions_fit_in_shared_memory(table):
    """None is dropped when it is tuned."""
    kilobytes = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
    for case in (c for c in EVERY.values() if c.kernel in DENSE):
        assert table.rows[str(case)]["shared"] <= kilobytes[case.target] * 1024, case


@pytest.mark.parametrize("case", [c for c in CASES if c.kernel in SEPARABLE], ids=str)
def test_float32_runs_on_the_matrix_units_as_tf32(compiled, case):
    assert_matrix(case, compiled[case].result())


def assert_matrix(case: Case, found: dict) -> None:
    plain = case.precision == "ieee" and case.dtype == torch.float32  # float32 without losses
    assert (found["matrix"] == 0) == (plain and case.target.startswith("sm")), found
    if case.channels_last and case.target.startswith("sm"):
        assert found["wide_stores"] == found["stores"] > 0
