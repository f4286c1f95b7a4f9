"""The Triton kernels compiled ahead of time: no spills, 16-byte accesses, loads shared."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import rulers
import torch

pytest.importorskip("triton")
if rulers.BACKEND == "triton":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

from triton_machine_code import FEW, KERNELS, MERGES, SEPARABLE, TARGETS, TRAINING, Case, facts

LAYERS = [
    {"stride": 2},
    {"dtype": torch.float32},
    {"channels": 128, "size": 7},
    {"taps": 9, "size": 14},
]
LAYERS_OF_CHANNELS_LAST = [
    {"dtype": torch.float16, "channels": 24, "size": 28},
    {"taps": 5, "size": 28, "stride": 2},
    {"taps": 7, "size": 28, "stride": 2},
]
CASES = [
    *(Case(k, channels_last=last, choice=choice)
      for k in KERNELS for last in (True, False) for choice in range(3)),
    *(Case(k, channels_last=last, **layer)
      for k in KERNELS for last in (True, False) for layer in LAYERS),
    *(Case(k, **layer) for k in KERNELS for layer in LAYERS_OF_CHANNELS_LAST),
    *(Case(case.kernel, target, channels_last=case.channels_last)
      for case in FEW for target in ("sm_80", "sm_100", "gfx942")),
    *(Case(k, target, channels_last=last, dtype=dtype)
      for k, dtype in zip(TRAINING, 2 * (torch.bfloat16, torch.float32), strict=True)
      for target in TARGETS for last in (True, False)),
    *(Case(k, taps=7, size=14) for k in ("statistics", "training_sums")),
    *(Case(k, target, dtype, last, channels, size, precision=precision)
      for k in SEPARABLE for target in TARGETS
      for dtype, precision, last, channels, size in [
          (torch.bfloat16, "ieee", True, 128, 28), (torch.bfloat16, "ieee", False, 256, 28),
          (torch.float32, "ieee", True, 64, 56)]),
    *(Case(k, "sm_90", torch.float32, True, 512, 14) for k in SEPARABLE),
    *(Case(k, target) for k in MERGES for target in ("sm_90", "gfx942")),
]  # fmt: skip
CASES = [case for case in CASES if case.choice < len(case.configurations())]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every case, on two cores, into a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            yield {case: pool.submit(facts, case) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_spills(compiled, case, record_property):
    found = compiled[case].result()
    record_property("registers", found["registers"])
    assert found["stack"] == 0, found


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.channels_last and c.taps < 9 and c.kernel in KERNELS | TRAINING],
    ids=str,
)
def test_channels_last_moves_16_bytes_at_once(compiled, case):
    found = compiled[case].result()
    # Taps, scale and shift are float32 or of the tensors' type: 16 bytes for each too.
    assert found["wide_loads"] == found["loads"] > 0, found
    if case.target.startswith("sm") and case.kernel in ("forward", "backward_data"):
        assert found["wide_stores"] == found["stores"] > 0, found


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if not c.channels_last
        and c.size == 56
        and c.target.startswith("sm")
        and c.kernel in KERNELS
    ],
    ids=str,
)
def test_contiguous_moves_16_bytes_at_once(compiled, case):
    """A row of the patch and the edges that its taps reach over; the taps are single numbers."""
    found = compiled[case].result()
    rows = found["config"]["ROWS"]
    if case.stride == 1:
        assert found["wide_loads"] >= rows + (0 if case.kernel == "backward_conv" else 2)
    else:  # dx is written in 16 bytes, dy read in 8
        assert found["wide_loads"] + found.get("wide_stores", 0) >= rows
    if case.kernel == "forward" and case.stride == 1:
        assert found["wide_stores"] == found["stores"] == rows


@pytest.mark.parametrize("choice", range(3))
def test_no_input_is_loaded_twice(compiled, choice):
    """The loads of a patch that coincide are one: (ROWS + 2) * (COLS + 2) for a 3x3 kernel."""
    found = compiled[Case("forward", choice=choice)].result()
    config = found["config"]
    taps, affine = 9, 4  # 8 scales and 8 shifts in float32
    assert found["loads"] == (config["ROWS"] + 2) * (config["COLS"] + 2) + taps + affine, found


@pytest.mark.parametrize("case", [c for c in CASES if c.kernel in SEPARABLE], ids=str)
def test_the_pointwise_half_runs_on_the_matrix_units(compiled, case):
    found = compiled[case].result()
    plain = case.precision == "ieee" and case.dtype == torch.float32  # float32 without losses
    assert (found["matrix"] == 0) == (plain and case.target.startswith("sm")), found
    if case.channels_last and case.target.startswith("sm"):
        assert found["wide_stores"] == found["stores"] > 0
