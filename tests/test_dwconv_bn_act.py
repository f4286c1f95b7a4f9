"""dwconv_bn_act against float64, for every instruction set, dtype and layout."""

from __future__ import annotations

import pytest
import rulers
import torch
from hypothesis import given
from hypothesis import strategies as st
from rulers import DTYPES, ROUNDING, Problem, assert_correct, problem, reference

from mnet_kernels import _C, ops
from mnet_kernels.reference import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Sizes just below, at and above a vector (4, 8, 16 lanes), a tile (7 or 4 columns, 2 rows) and a
# block of rows; planes smaller than the kernel.
CHANNELS = (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48)
SIZES = ((1, 1), (1, 9), (2, 2), (7, 7), (8, 6), (14, 13), (15, 33), (34, 7), (5, 130))


@every_dtype
@both_layouts
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)])
def test_fast_paths(instruction_set, dtype, channels_last, size, kernel, stride):
    p = problem(
        (2, 17, *size), (kernel, kernel), dtype=dtype, channels_last=channels_last,
        stride=stride, padding=kernel // 2, activation="relu6",
    )  # fmt: skip
    assert_correct(p, p.run())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_wider_than_what_a_kernel_prepares(instruction_set, dtype, stride):
    p = problem((1, 2, 5, 1043), dtype=dtype, stride=stride, padding=(2, 1), activation="identity")
    assert_correct(p, p.run())


@both_layouts
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_at_every_side_of_a_vector(instruction_set, channels_last, channels):
    for stride in (1, 2):
        p = problem((3, channels, 9, 10), channels_last=channels_last, stride=stride, padding=1)
        assert_correct(p, p.run())


@every_dtype
@both_layouts
@pytest.mark.parametrize(
    "kernel,constants",
    [
        ((1, 1), {}),
        ((2, 3), {"padding": (1, 2)}),
        ((4, 4), {"stride": 4}),
        ((3, 3), {"stride": 3, "padding": 1}),
        ((3, 3), {"stride": (1, 2), "padding": (2, 0)}),
        ((3, 3), {"dilation": 2, "padding": 2}),
        ((3, 5), {"dilation": (3, 2), "padding": (3, 4), "stride": (2, 3)}),
        ((3, 3), {"stride": 2, "padding": (0, 0, 1, 1)}),
        ((3, 3), {"padding": (3, 0, 1, 2)}),
        ((3, 3), {"padding": (0, 4)}),
        ((3, 3), {"stride": 2, "padding": (0, 5, 4, 0)}),
        ((5, 5), {"stride": 2, "padding": "same"}),
        ((11, 1), {"padding": (5, 0)}),
    ],
    ids=str,
)
def test_any_kernel_stride_dilation_padding(
    instruction_set, dtype, channels_last, kernel, constants
):
    for multiplier in (1, 2, 3):
        p = problem(
            (2, 5, 13, 18), kernel, multiplier=multiplier, dtype=dtype,
            channels_last=channels_last, **constants,
        )  # fmt: skip
        assert_correct(p, p.run())


@every_dtype
@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(instruction_set, dtype, channels_last, activation):
    p = problem(
        (2, 19, 8, 9), dtype=dtype, channels_last=channels_last,
        padding=1, activation=activation, slope=0.2,
    )  # fmt: skip
    p.shift *= 4  # reach all branches
    assert_correct(p, p.run())


@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_inf_behave_as_native(instruction_set, channels_last, activation, dtype):
    values = [float("nan"), float("inf"), float("-inf"), 1e4, -1e4, 100.0, -100.0, 0.0, -0.0, 3e4]
    x = torch.tensor(values).repeat(20).reshape(1, 20, 2, 5).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    p = Problem(x, torch.ones(20, 1, 1, 1, dtype=dtype), None, None, {"activation": activation})
    torch.testing.assert_close(
        p.run(), p.run("native"), rtol=4 * ROUNDING[dtype], atol=1e-30, equal_nan=True
    )


@both_layouts
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 1), (7, 2), (2, 3)])
def test_one_hot_inputs_find_every_index_error(instruction_set, channels_last, kernel, stride):
    """One pixel is 1 and weights are distinct integers: every output is exact."""
    c, h, w = 17, 10, 9
    weight = torch.arange(1.0, c * kernel * kernel + 1).reshape(c, 1, kernel, kernel)
    for at in [(0, 0), (h - 1, w - 1), (0, w - 1), (4, 5), (h - 1, 3)]:
        x = torch.zeros(1, c, h, w)
        x[0, :, at[0], at[1]] = 1
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        p = Problem(x, weight, None, None, {"stride": stride, "padding": 1, "activation": "relu"})
        assert torch.equal(p.run(), p.run("native"))


def test_layout_of_the_output_is_that_of_the_input():
    assert problem((2, 8, 6, 7)).run().is_contiguous()
    last = problem((2, 8, 6, 7), channels_last=True).run()
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 1:-1, 2:-1],
        lambda x: x[:, 1:],
        lambda x: x[::2],
        lambda x: x.transpose(2, 3),
        lambda x: x.flip(3),
        lambda x: x[:, :1].expand(-1, 12, -1, -1),
        lambda x: x.to(memory_format=torch.channels_last)[:, :, ::2],
    ],
)
def test_strided_inputs(view):
    x = view(torch.randn(4, 12, 9, 10))
    p = Problem(x, torch.randn(x.shape[1], 1, 3, 3), None, None, {"padding": 1})
    assert_correct(p, p.run())


def test_strided_weight_scale_and_shift():
    p = problem((2, 16, 9, 9), channels_last=True, padding=1)
    packed = p.weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    wide = torch.randn(16, 3)
    for weight in (packed, p.weight.flip(2), torch.randn(16, 2, 3, 3)[:, 1:]):
        for affine in ((None, None), (wide[:, 0], wide[:, 1]), (None, p.shift), (p.scale, None)):
            q = Problem(p.x, weight, *affine, p.constants)
            assert_correct(q, q.run())


@both_layouts
def test_empty_batch(channels_last):
    p = problem((0, 8, 5, 6), channels_last=channels_last, stride=2, padding=1)
    assert p.run().shape == (0, 8, 3, 3)


@both_layouts
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_work_without_a_trace(channels_last, threads):
    before = torch.get_num_threads()
    problems = [
        problem(shape, channels_last=channels_last, padding=1, stride=stride)
        for shape in [
            (1, 64, 7, 7),
            (1, 33, 14, 14),
            (3, 5, 40, 23),
            (1, 1, 99, 9),
            (1, 256, 2, 2),
        ]
        for stride in (1, 2)
    ]
    try:
        torch.set_num_threads(threads)
        results = [p.run() for p in problems]
        torch.set_num_threads(1)
        assert all(torch.equal(p.run(), y) for p, y in zip(problems, results, strict=True))
    finally:
        torch.set_num_threads(before)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_less_accurate_than_native(channels_last, dtype):
    """Mean error against float64 over V1 shapes, ours at most native's."""
    ours = native = 0.0
    for c, size, stride in [(32, 28, 1), (64, 28, 2), (128, 14, 1), (256, 7, 1)]:
        p = problem(
            (1, c, size, size), dtype=dtype, channels_last=channels_last,
            stride=stride, padding=1, activation="relu6",
        )  # fmt: skip
        exact, _ = reference(p)
        ours += (p.run().double() - exact).abs().mean().item()
        native += (p.run("native").double() - exact).abs().mean().item()
    assert ours <= native


@given(data=st.data())
def test_random_problems(data):
    draw = data.draw
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)), "kernel")
    p = problem(
        draw(st.tuples(*(st.integers(1, most) for most in (3, 40, 30, 40))), "shape"),
        kernel,
        multiplier=draw(st.integers(1, 3), "multiplier"),
        dtype=draw(st.sampled_from(DTYPES), "dtype"),
        channels_last=draw(st.booleans(), "channels_last"),
        affine=draw(st.booleans(), "affine"),
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3)), "stride"),
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 3)), "dilation"),
        padding=draw(
            st.one_of(st.just("same"), st.tuples(*[st.integers(0, 4)] * 4), st.integers(0, 3)),
            "padding",
        ),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS)), "activation"),
        slope=0.1,
    )
    sets = _C.build_info()["instruction_sets"]
    for name in sets if rulers.BACKEND is None else sets[:1]:
        _C.set_instruction_set(name)
        try:
            y = p.run()
        except RuntimeError as error:
            assert "the dilated kernel" in str(error)  # the kernel does not fit the plane
            return
        finally:
            _C.set_instruction_set(sets[0])
        assert_correct(p, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_results_beyond_the_caches(instruction_set, dtype, stride):
    """Large enough for the kernel to prefetch: the first image, copies of another, a last one."""
    images = (2 if dtype == torch.float32 else 4) * stride * stride
    p = problem((3, 64, 225, 226), dtype=dtype, channels_last=True, stride=stride, padding=1)
    p.x = p.x[[0, *[1] * (images - 2), 2]].contiguous(memory_format=torch.channels_last)
    y = p.run()
    last = Problem(p.x[-1:], *p.tensors[1:], p.constants)
    assert_correct(last, y[-1:])
    assert torch.equal(y[:1], Problem(p.x[:1], *p.tensors[1:], p.constants).run())


def _free_gib() -> float:
    try:
        with open("/proc/meminfo") as lines:
            kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0.0
    return kib / 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels,stride", [(1024, 1), (1024, 2), (256, 2), (528, 2)])
def test_results_do_not_depend_on_where_tensors_lie(instruction_set, dtype, channels, stride):
    """x and the result at the same offset in a page, and a little apart: the channels_last kernel
    stores in another order there."""
    page, line = 4096, 64
    p = problem((1, channels, 6, 7), dtype=dtype, channels_last=True, stride=stride, padding=1)
    first = p.run()
    assert_correct(p, first)
    buffer = torch.empty(p.x.numel() + 2 * page, dtype=dtype)
    spare = -buffer.data_ptr() % page // buffer.element_size()
    for apart in (0, line, 2 * line, page - line):
        for _ in range(20):  # where the result will lie is only a guess
            offset = (first.data_ptr() - apart) % page // buffer.element_size()
            x = buffer.as_strided(p.x.shape, p.x.stride(), spare + offset).copy_(p.x)
            del first
            first = ops.dwconv_bn_act(x, *p.tensors[1:], **p.constants, backend=rulers.BACKEND)
            if (first.data_ptr() - x.data_ptr()) % page == apart:
                break
        assert torch.equal(first, p.run())


@pytest.mark.skipif(_free_gib() < 14, reason="needs 14 GiB of free memory")
@both_layouts
def test_more_than_2_to_31_elements(channels_last):
    """The far end of a tensor of 2.2e9 elements, against the same pixels on their own."""
    n, c, h, w = 2, 16, 8300, 8300
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty((n, c, h, w), dtype=torch.bfloat16, memory_format=layout)
    x.copy_(torch.randn(1, c, 1, w).bfloat16().expand(n, c, h, w))
    tail = torch.randn(c, 9, w).bfloat16()
    x[-1, :, -9:] = tail
    assert x.numel() > 2**31
    weight = torch.randn(c, 1, 3, 3).bfloat16()
    y = ops.dwconv_bn_act(x, weight, stride=2, padding=(0, 0, 1, 1), activation="identity")
    del x
    alone = ops.dwconv_bn_act(
        tail[None, :, 1:].to(memory_format=layout), weight, stride=2, padding=(0, 0, 1, 1),
        activation="identity", backend="native",
    )  # fmt: skip
    torch.testing.assert_close(y[-1:, :, -4:], alone, rtol=2**-6, atol=2**-6)
