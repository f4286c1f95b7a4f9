"""Edges of the contiguous CUDA kernels, in emulation: where runs of planes, row tiles, strips and
vectors end, and misaligned tensors. What all kernels share is in test_cuda_emulation.py."""

from __future__ import annotations

import pytest
import torch
from emulation import dwconv
from emulation.emulator import EmulationError, emulator
from rulers import Problem, assert_correct, problem
from test_cuda_emulation import FAST_PATHS, check

from mnet_kernels.reference import ACTIVATIONS

STREAM, RUN = "contiguous_stream", "contiguous_run"
#: Elements of either size; float16 and bfloat16 differ in their conversion only.
both_sizes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def check_one(p: Problem, variant: str, sanitizer: str = "", **offsets: int) -> None:
    """One variant; tensors start so many bytes past a 256-byte boundary."""
    numbers = dwconv.sizes(p)
    y = torch.empty([int(numbers[name]) for name in ("N", "K", "OH", "OW")], dtype=p.x.dtype)
    answer = emulator(sanitizer).run(
        "dwconv", variant, numbers=numbers, outputs={"y": y}, offsets=offsets, count=not sanitizer,
        inputs={"x": p.x, "weight": p.weight, "scale": p.scale, "shift": p.shift},
    )  # fmt: skip
    assert_correct(p, y)
    if not sanitizer:
        assert answer.traffic["y"]["bytes"] == y.nbytes
        assert "outside" not in answer.traffic


# Numbers of planes that no power of two divides: the last block has fewer, and its run ends
# anywhere in a vector. Planes of odd lengths, of whole 16-byte vectors (skewed in shared memory),
# and both in turn for input and output.
RUNS = [(533, 5, 3), (1061, 4, 4), (1061, 7, 7), (541, 8, 6), (529, 9, 8)]


@both_sizes
@pytest.mark.parametrize("planes,h,w", RUNS)
def test_runs_of_planes(dtype, planes, h, w):
    for stride in (1, 2):
        check_one(problem((1, planes, h, w), dtype=dtype, padding=1, stride=stride), RUN)


@both_sizes
def test_the_longest_runs(dtype):
    """A block's threads have a plane each; channels wrap around within a run."""
    check_one(problem((11, 1543, 2, 3), dtype=dtype, padding=1), RUN)


@both_sizes
@pytest.mark.parametrize("kernel,stride", FAST_PATHS)
def test_row_tiles(dtype, kernel, stride):
    """A plane is shared between blocks: heights at and beside a multiple of the tile's rows."""
    for h in (28, 29, 57):
        p = problem(
            (1, 2, h, 15), (kernel, kernel), dtype=dtype, padding=kernel // 2, stride=stride
        )  # fmt: skip
        check(p)


@both_sizes
@pytest.mark.parametrize("w", [6, 7, 8, 14, 15, 1000])
def test_widths_beside_a_strip(dtype, w):
    """1000: more strips in a row than a block has threads."""
    for kernel, padding in [(3, 1), (5, (2, 0, 3, 4)), (7, 3)]:
        check(problem((1, 3, 5, w), (kernel, kernel), dtype=dtype, padding=padding))


@both_sizes
def test_tiles_that_lie_in_the_padding(dtype):
    check(problem((1, 2, 3, 5), dtype=dtype, padding=(40, 1, 40, 9)))


@both_sizes
@pytest.mark.parametrize("w", [4, 8, 12, 16, 28])
def test_rows_of_whole_vectors(dtype, w):
    """The stream, with both paddings that are usual at stride 2."""
    streamed = 0
    for kernel, stride in FAST_PATHS:
        for padding in (kernel // 2, "same"):
            for h in (6, 9):
                p = problem(
                    (1, 3, h, w), (kernel, kernel), dtype=dtype, padding=padding, stride=stride
                )  # fmt: skip
                streamed += STREAM in check(p)
    assert streamed == 2 * 2 * len(FAST_PATHS)


@both_sizes
@pytest.mark.parametrize("kernel,stride", FAST_PATHS)
def test_long_walks(dtype, kernel, stride):
    """So many planes that a thread of the stream has several rows of them, the last one fewer."""
    w = 4 if dtype == torch.float32 else 8
    p = problem(
        (12, 1409, 15 * stride, w), (kernel, kernel), dtype=dtype, padding=kernel // 2,
        stride=stride,
    )  # fmt: skip
    y, _ = dwconv.run(emulator(), p, STREAM)
    assert_correct(p, y)


@both_sizes
@pytest.mark.parametrize("x,y", [(0, 4), (4, 0), (8, 8), (12, 4), (2, 6), (16, 48)])
def test_misaligned_tensors(dtype, x, y):
    if x % dtype.itemsize or y % dtype.itemsize:
        pytest.skip("not where an element can lie")
    for shape in [(1, 533, 4, 4), (1, 533, 5, 5), (1, 2, 30, 9)]:
        check_one(problem(shape, dtype=dtype, padding=1), RUN, x=x, y=y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    """Both of them, with whole strips and without."""
    for w in (7, 8):
        p = problem((1, 3, 6, w), padding=1, activation=activation, slope=0.2)
        p.shift *= 4
        check(p)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@both_sizes
@pytest.mark.parametrize("shape", [(1, 533, 5, 5), (1, 2, 29, 15)], ids=str)
def test_under_a_sanitizer(sanitizer, dtype, shape):
    for stride in (1, 2):
        check_one(problem(shape, dtype=dtype, padding=1, stride=stride, margin=0), RUN, sanitizer)


@both_sizes
@pytest.mark.parametrize("kernel,stride", FAST_PATHS)
def test_the_stream_under_address_sanitizer(dtype, kernel, stride):
    for w in (8, 12):
        for padding in (kernel // 2, "same"):
            p = problem(
                (1, 2, 9, w), (kernel, kernel), dtype=dtype, padding=padding, stride=stride
            )  # fmt: skip
            check_one(p, STREAM, "address")


@pytest.mark.parametrize(
    "variant,shape,constants",
    [
        (STREAM, (1, 2, 8, 7), {"padding": 1}),
        (STREAM, (1, 2, 8, 8), {"padding": 0}),
        (RUN, (1, 2, 8, 8), {"dilation": 2}),
        (RUN, (1, 2, 3, 20000), {"padding": 1}),
        (RUN, (1, 2, 8, 8), {"padding": 1, "channels_last": True}),
    ],
)  # fmt: skip
def test_a_call_that_a_variant_cannot_run_is_refused(variant, shape, constants):
    p = problem(shape, **constants)
    with pytest.raises(EmulationError, match=f"variant {variant} cannot run this call"):
        dwconv.run(emulator(), p, variant)
