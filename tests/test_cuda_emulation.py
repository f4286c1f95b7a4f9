"""The CUDA kernels without a GPU: csrc/cuda compiled for the CPU and run (tests/emulation),
against float64; again under sanitizers; and planted faults that each of these must find."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from emulation import dwconv
from emulation.emulator import Answer, EmulationError, emulator
from rulers import Problem, assert_correct, problem

from mnet_kernels.reference import ACTIVATIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])

# Planes smaller than a kernel, a strip, a warp; odd ones; wider than a block.
SIZES = ((1, 1), (1, 9), (2, 2), (7, 7), (8, 6), (14, 13), (5, 70))
CHANNELS = (1, 3, 4, 7, 8, 12, 16, 24, 40, 72)


def check(p: Problem, sanitizer: str = "", offset: int = 0) -> list[str]:
    """Every variant that can run this problem computes it, and writes each output once."""
    program = emulator(sanitizer)
    variants = dwconv.able(program, p, offset)
    for variant in variants:
        try:
            y, answer = dwconv.run(program, p, variant, count=not sanitizer, offset=offset)
            assert_correct(p, y)
        except (AssertionError, EmulationError) as error:
            raise AssertionError(f"{variant}: {error}") from error
        if not sanitizer:
            assert answer.traffic["y"]["bytes"] == y.nbytes, variant
            assert "outside" not in answer.traffic, f"{variant}: {answer.traffic}"
    return variants


def test_every_variant_can_run_something():
    """Each row of the table is reached by the fast-path problems below."""
    program = emulator()
    reached = set()
    for channels_last, size in itertools.product((False, True), (9, 16)):
        for kernel, stride in FAST_PATHS:
            p = problem(
                (1, 16, size, size), (kernel, kernel), channels_last=channels_last,
                stride=stride, padding=kernel // 2,
            )  # fmt: skip
            reached |= set(dwconv.able(program, p))
            _, answer = dwconv.run(program, p, "auto")
            assert answer.text in dwconv.able(program, p)
    assert reached == set(dwconv.names(program))


FAST_PATHS = [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)]


@every_dtype
@both_layouts
@pytest.mark.parametrize("kernel,stride", FAST_PATHS)
def test_fast_paths(dtype, channels_last, kernel, stride):
    for size in SIZES:
        p = problem(
            (2, 24, *size), (kernel, kernel), dtype=dtype, channels_last=channels_last,
            stride=stride, padding=kernel // 2, activation="relu6",
        )  # fmt: skip
        check(p)


@every_dtype
@both_layouts
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_at_every_side_of_a_vector(dtype, channels_last, channels):
    for stride in (1, 2):
        check(
            problem(
                (3, channels, 6, 5), dtype=dtype, channels_last=channels_last,
                stride=stride, padding=1,
            )
        )  # fmt: skip


@every_dtype
@both_layouts
@pytest.mark.parametrize("kernel,stride", FAST_PATHS)
@pytest.mark.parametrize("padding", [0, (2, 0, 1, 3), "same", 6], ids=str)
def test_padding(dtype, channels_last, kernel, stride, padding):
    p = problem(
        (1, 16, 9, 10), (kernel, kernel), dtype=dtype, channels_last=channels_last,
        stride=stride, padding=padding,
    )  # fmt: skip
    check(p)


@every_dtype
@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (2, 1)])
def test_activations(dtype, channels_last, activation, kernel, stride):
    p = problem(
        (1, 16, 6, 7), (kernel, kernel), dtype=dtype, channels_last=channels_last,
        stride=stride, padding=1, activation=activation, slope=0.2,
    )  # fmt: skip
    p.shift *= 4  # reach all branches
    check(p)


ANY = [
    ((1, 1), {}),
    ((2, 3), {"padding": (1, 2)}),
    ((4, 4), {"stride": 4}),
    ((3, 3), {"stride": 3, "padding": 1}),
    ((3, 3), {"stride": (1, 2), "padding": (2, 0)}),
    ((3, 3), {"dilation": 2, "padding": 2}),
    ((3, 5), {"dilation": (3, 2), "padding": (3, 4), "stride": (2, 3)}),
    ((11, 1), {"padding": (5, 0)}),
]


@every_dtype
@both_layouts
@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_any_kernel_stride_dilation_multiplier(dtype, channels_last, kernel, constants):
    for multiplier in (1, 2, 3):
        p = problem(
            (2, 5, 11, 12), kernel, multiplier=multiplier, dtype=dtype,
            channels_last=channels_last, affine=multiplier != 2, **constants,
        )  # fmt: skip
        check(p)


@both_layouts
@pytest.mark.parametrize("kernel,stride", FAST_PATHS)
def test_one_hot_inputs_find_every_index_error(channels_last, kernel, stride):
    """One pixel is 1 and weights are distinct integers: every output is exact."""
    c, h, w = 12, 10, 9
    weight = torch.arange(1.0, c * kernel * kernel + 1).reshape(c, 1, kernel, kernel)
    for at in [(0, 0), (h - 1, w - 1), (0, w - 1), (4, 5), (h - 1, 3)]:
        x = torch.zeros(1, c, h, w)
        x[0, :, at[0], at[1]] = 1
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        p = Problem(x, weight, None, None, {"stride": stride, "padding": kernel // 2})
        for variant in dwconv.able(emulator(), p):
            assert torch.equal(dwconv.run(emulator(), p, variant)[0], p.run("native")), variant


@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_behave_as_native(channels_last, activation):
    values = [float("nan"), float("inf"), float("-inf"), 1e4, -1e4, 100.0, -100.0, 0.0, -0.0, 3e4]
    x = torch.tensor(values).repeat(16).reshape(1, 16, 2, 5)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight = torch.zeros(16, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    for w, padding in ((weight, 1), (torch.ones(16, 1, 1, 1), 0)):
        p = Problem(x, w, None, None, {"activation": activation, "padding": padding})
        for variant in dwconv.able(emulator(), p):
            y, _ = dwconv.run(emulator(), p, variant)
            torch.testing.assert_close(y, p.run("native"), rtol=1e-6, atol=1e-30, equal_nan=True)


@every_dtype
@both_layouts
@pytest.mark.parametrize("offset", [2, 4, 8, 16, 18])
def test_misaligned_slices(dtype, channels_last, offset):
    """x is a slice: variants that want aligned vectors step aside or step down."""
    if offset % dtype.itemsize:
        pytest.skip("not where an element can lie")
    for kernel, stride in [(3, 1), (3, 2)]:
        p = problem(
            (1, 16, 8, 8), (kernel, kernel), dtype=dtype, channels_last=channels_last,
            stride=stride, padding=1,
        )  # fmt: skip
        check(p, offset=offset)


@both_layouts
def test_padding_and_dilation_beyond_32_bits(channels_last):
    """The general kernel with 64-bit indices: of three rows of taps only one meets the input."""
    p = problem((2, 3, 4, 5), channels_last=channels_last, dilation=(2**30, 1), padding=(2**30, 1))
    y, _ = dwconv.run(emulator(), p, "general")
    middle = Problem(p.x, p.weight[:, :, 1:2], p.scale, p.shift, {"padding": (0, 1)})
    assert_correct(middle, y)


@both_layouts
def test_more_than_2_to_31_elements(channels_last):
    """Some blocks from all over a tensor of 2.25e9 elements: no address lies outside of it."""
    program, shape = emulator(), (700, 1024, 56, 56)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=layout)
    weight = torch.empty(1024, 1, 3, 3, dtype=torch.bfloat16, device="meta")
    numbers = dwconv.sizes(Problem(x, weight, None, None, {"padding": 1}))
    scratch = {"x": x.nbytes, "weight": weight.nbytes, "y": x.nbytes}
    able = program.run("dwconv_able", numbers=numbers, scratch=scratch).text.split()
    assert "general" in able
    for variant in able:
        answer = program.run(
            "dwconv", variant, numbers=numbers | {"sample": 40, "images": 1},
            scratch=scratch, count=True,
        )  # fmt: skip
        assert answer.traffic["x"]["bytes"] > 0
        assert "outside" not in answer.traffic, variant


# Under the sanitizers: out-of-bounds and misaligned accesses, undefined arithmetic; races.


SIZED = (torch.float32, torch.bfloat16)
#: Every path in both layouts, with elements of either size; but real threads are slow: under the
#: thread sanitizer a path has one size in one layout and the other in the other, for where a
#: kernel's barriers are depends on path and layout.
under_sanitizers = pytest.mark.parametrize(
    "sanitizer,path,channels_last,dtype",
    [
        *itertools.product(["address"], FAST_PATHS, (False, True), SIZED),
        *(("thread", path, last, SIZED[(i + last) % 2])
          for i, path in enumerate(FAST_PATHS) for last in (False, True)),
    ],
    ids=str,
)  # fmt: skip


@under_sanitizers
def test_under_a_sanitizer(sanitizer, path, channels_last, dtype):
    kernel, stride = path
    sizes = [(1, 1), (5, 6), (7, 7)] if sanitizer == "address" else [(5, 6)]
    for size in sizes:
        for channels in (3, 16):
            p = problem(
                (2, channels, *size), (kernel, kernel), dtype=dtype, channels_last=channels_last,
                stride=stride, padding=kernel // 2,
            )  # fmt: skip
            check(p, sanitizer)


@both_layouts
@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_the_general_kernel_under_address_sanitizer(channels_last, kernel, constants):
    p = problem((2, 3, 11, 12), kernel, multiplier=2, channels_last=channels_last, **constants)
    check(p, "address")


# Planted faults: what shows that the tests above can fail.


def sum_of_three(variant: str, sanitizer: str = "", **options) -> Answer:
    x, y = torch.randn(200), torch.empty(200)
    answer = emulator(sanitizer).run(
        "sum_of_three", variant, numbers={"count_of_x": 200}, inputs={"x": x},
        outputs={"y": y}, **options,
    )  # fmt: skip
    expected = torch.nn.functional.conv1d(x[None, None], torch.ones(1, 1, 3), padding=1)[0, 0]
    torch.testing.assert_close(y, expected)
    return answer


@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
def test_nothing_is_found_where_nothing_is_planted(sanitizer):
    sum_of_three("correct", sanitizer)


def test_a_missing_barrier_is_a_reported_race():
    with pytest.raises(EmulationError, match="data race"):
        sum_of_three("missing_barrier", "thread")


@pytest.mark.parametrize("variant", ["halo_out_of_bounds", "shared_out_of_bounds"])
def test_a_read_out_of_bounds_is_reported(variant):
    with pytest.raises(EmulationError, match="heap-buffer-overflow"):
        sum_of_three(variant, "address")


@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
def test_a_misaligned_vector_is_reported(sanitizer):
    with pytest.raises(EmulationError, match="misaligned access: 16 bytes"):
        sum_of_three("misaligned", sanitizer)


# The emulation itself.


def converted(variant: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.numel(), dtype=dtype)
    numbers = {"count_of_x": x.numel()}
    emulator().run("convert", variant, numbers=numbers, inputs={"x": x}, outputs={"y": y})
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_conversions_are_those_of_torch(dtype):
    """All 65536 values there; back from values at, beside and between those of the type."""
    name = str(dtype).removeprefix("torch.")
    every = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16)).view(dtype)
    torch.testing.assert_close(
        converted(f"from_{name}", every, torch.float32), every.float(), rtol=0, atol=0,
        equal_nan=True,
    )  # fmt: skip
    steps = every.float().view(torch.int32)
    half = 1 << (12 if dtype == torch.float16 else 15)
    near = torch.cat([steps + d for d in (0, 1, -1, half - 1, half, half + 1)]).view(torch.float32)
    near = torch.cat([near, torch.randn(10000), torch.tensor([65519.0, 65520.0, 3.4e38, 1e-45])])
    ours, theirs = converted(f"to_{name}", near, dtype), near.to(dtype)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    zero = theirs == 0
    assert torch.equal(ours[zero].signbit(), theirs[zero].signbit())


def test_shuffles_sum_a_warp():
    x, y = torch.arange(64.0), torch.empty(64)
    numbers = {"count_of_x": 64}
    emulator().run("warp_sum", numbers=numbers, inputs={"x": x}, outputs={"y": y})
    assert torch.equal(y, x.view(2, 32).sum(1, keepdim=True).expand(2, 32).reshape(-1))


@pytest.mark.parametrize("step,sectors,ways", [(1, 4, 1), (2, 8, 2), (8, 32, 8), (32, 32, 32)])
def test_counted_traffic(step, sectors, ways):
    """32 lanes load, and store to shared memory, a float every `step` floats; even lanes store."""
    x, y = torch.zeros(32 * step), torch.empty(32)
    traffic = (
        emulator()
        .run("strided", numbers={"step": step}, inputs={"x": x}, outputs={"y": y}, count=True)
        .traffic
    )
    assert traffic["x"] == {
        "requests": 1, "bytes": 128, "sectors": sectors, "least_sectors": 4,
        "block_sectors": sectors,
    }  # fmt: skip
    assert traffic["y"]["bytes"] == 64
    assert traffic["y"]["sectors"] == 4
    assert traffic["shared"]["worst_conflict"] == traffic["shared"]["wavefronts"] == ways


def test_a_variant_is_never_exchanged_silently():
    with pytest.raises(EmulationError, match="no variant is called nonsense"):
        dwconv.run(emulator(), problem(), "nonsense")
