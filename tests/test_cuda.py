"""dwconv_bn_act on a GPU: every kernel against float64, and what only a device can show."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_rulers import ANY, DTYPES, FAST, ON_A_GPU, SHAPES, both_layouts, every_dtype
from rulers import ROUNDING, Problem, assert_correct, problem, tolerance
from rulers import reference as exact_of
from test_bad_input import CASES

from mnet_kernels import backends, ops
from mnet_kernels.reference import ACTIVATIONS

pytestmark = ON_A_GPU


def cuda():
    from mnet_kernels import _cuda

    return _cuda


def able(p: Problem, channels_last: bool) -> list[str]:
    """The kernels that can run this call."""
    c = p.constants
    padding = c.get("padding", 0)
    lists = [
        list(v) if isinstance(v, tuple) else [] if v == "same" else [v]
        for v in (c.get("stride", 1), padding, c.get("dilation", 1))
    ]
    dtype = str(p.x.dtype).removeprefix("torch.")
    return (
        cuda()
        .facts_of_call(list(p.x.shape), dtype, channels_last, list(p.weight.shape), *lists)
        .able
    )


@pytest.fixture
def force():
    """force(name): use this kernel until the test ends."""
    yield cuda().force_variant
    cuda().force_variant("")


def check_every_kernel(p: Problem, channels_last: bool, force) -> set[str]:
    exact, magnitude = exact_of(p)
    allowed = tolerance(p, exact, magnitude)
    names = able(p, channels_last)
    for name in [*names, ""]:
        force(name)
        y = p.run("cuda")
        wrong = ~((y.cpu().double() - exact).abs() <= allowed)  # NaN is wrong
        assert not wrong.any(), (
            f"{name or 'the chosen kernel'}, x {tuple(p.x.shape)}: {int(wrong.sum())} of "
            f"{wrong.numel()} elements are off, the first at {wrong.nonzero()[0].tolist()}"
        )
        assert torch.equal(y, p.run("cuda")), f"{name} is not deterministic"
    return set(names)


@every_dtype
@both_layouts
@pytest.mark.parametrize("margin", [1024, 0])
@pytest.mark.parametrize("kernel,constants", FAST, ids=str)
def test_edges(force, dtype, channels_last, kernel, constants, margin):
    seen = set()
    for shape in SHAPES:
        p = problem(
            shape, kernel, dtype=dtype, channels_last=channels_last, device="cuda", margin=margin,
            activation="relu6", **constants,
        )  # fmt: skip
        seen |= check_every_kernel(p, channels_last, force)
    assert seen


@every_dtype
@both_layouts
def test_sanitized(force, dtype, channels_last):
    """A choice of the edges for compute-sanitizer, to which every launch costs much."""
    for (kernel, constants), shape in itertools.product(FAST, SHAPES[2:9:2]):
        p = problem(
            shape, kernel, dtype=dtype, channels_last=channels_last, device="cuda", margin=0,
            activation="relu6", **constants,
        )  # fmt: skip
        check_every_kernel(p, channels_last, force)


def test_edges_reach_every_kernel():
    """No variant is left out by the shapes above."""
    seen = set()
    for dtype, last, shape, (kernel, constants) in itertools.product(
        DTYPES, (False, True), SHAPES, FAST
    ):
        p = problem(shape, kernel, dtype=dtype, channels_last=last, device="cuda", **constants)
        seen |= set(able(p, last))
    assert seen == set(cuda().variants())


@every_dtype
@both_layouts
@pytest.mark.parametrize("multiplier", [1, 2, 3])
@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_any_kernel_stride_dilation_padding(
    force, dtype, channels_last, kernel, constants, multiplier
):
    p = problem(
        (2, 5, 13, 18), kernel, multiplier=multiplier, dtype=dtype, channels_last=channels_last,
        device="cuda", **constants,
    )  # fmt: skip
    check_every_kernel(p, channels_last, force)


@every_dtype
@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(force, dtype, channels_last, activation):
    for channels in (19, 32):
        p = problem(
            (2, channels, 8, 9), dtype=dtype, channels_last=channels_last, device="cuda",
            padding=1, activation=activation, slope=0.2,
        )  # fmt: skip
        p.shift *= 4  # reach all branches
        check_every_kernel(p, channels_last, force)


@every_dtype
@both_layouts
def test_affine_of_any_kind(force, dtype, channels_last):
    p = problem((2, 16, 9, 9), dtype=dtype, channels_last=channels_last, device="cuda", padding=1)
    wide = torch.randn(16, 3, device="cuda")
    for affine in ((None, None), (wide[:, 0], wide[:, 1]), (None, p.shift), (p.scale, None)):
        q = Problem(p.x, p.weight, *affine, p.constants)
        check_every_kernel(q, channels_last, force)
    for weight in (p.weight.flip(2), p.weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)):
        q = Problem(p.x, weight, p.scale, p.shift, p.constants)
        assert_correct(q, q.run("cuda"))


@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_dtype
def test_nan_and_inf_behave_as_native(force, channels_last, activation, dtype):
    values = [float("nan"), float("inf"), float("-inf"), 1e4, -1e4, 100.0, -100.0, 0.0, -0.0, 3e4]
    x = torch.tensor(values).repeat(32).reshape(1, 32, 2, 5).to("cuda", dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight = torch.zeros(32, 1, 3, 3, device="cuda", dtype=dtype)
    weight[:, :, 1, 1] = 1
    x[:, :, 1] = 1  # a NaN times a zero tap is NaN: the lower row gets some
    p = Problem(x, weight, None, None, {"activation": activation, "padding": 1})
    expected = Problem(x.cpu(), weight.cpu(), None, None, p.constants).run("native")
    for name in able(p, channels_last):
        force(name)
        torch.testing.assert_close(
            p.run("cuda").cpu(), expected, rtol=4 * ROUNDING[dtype], atol=1e-30, equal_nan=True
        )


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 1:-1, 2:-1],
        lambda x: x[:, 1:],
        lambda x: x[::2],
        lambda x: x[1:],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :1].expand(-1, 12, -1, -1),
        lambda x: x.to(memory_format=torch.channels_last)[:, :, ::2],
        lambda x: x.to(memory_format=torch.channels_last)[1:],
    ],
)
@every_dtype
def test_strided_and_unaligned_inputs(view, dtype):
    x = view(torch.randn(4, 12, 9, 10, device="cuda").to(dtype))
    weight = torch.randn(x.shape[1], 1, 3, 3, device="cuda").to(dtype)
    p = Problem(x, weight, None, None, {"padding": 1})
    y = p.run("cuda")
    assert_correct(p, y)
    on_cpu = view(torch.randn(4, 12, 9, 10).to(dtype))
    assert y.stride() == Problem(on_cpu, weight.cpu(), None, None, p.constants).run().stride()


@both_layouts
@pytest.mark.parametrize("offset", [1, 2, 3])
@every_dtype
def test_pointers_off_the_vector(dtype, channels_last, offset):
    """Dense, but its first element lies in the middle of a 16-byte vector."""
    p = problem((2, 32, 14, 14), dtype=dtype, channels_last=channels_last, padding=1)
    flat = torch.empty(p.x.numel() + offset, dtype=dtype, device="cuda")
    x = flat[offset:].as_strided(p.x.shape, p.x.stride(), offset)
    x.copy_(p.x)
    q = Problem(x, p.weight.cuda(), p.scale.cuda(), p.shift.cuda(), p.constants)
    assert_correct(q, q.run("cuda"))


@both_layouts
def test_empty_batch(channels_last):
    p = problem(
        (0, 8, 5, 6), channels_last=channels_last, device="cuda", stride=2, padding=1
    )  # fmt: skip
    assert p.run("cuda").shape == (0, 8, 3, 3)


@every_dtype
@both_layouts
def test_beyond_2_to_31_elements(dtype, channels_last):
    if dtype == torch.float32 or torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB, and two dtypes are enough")
    images = 2**31 // (64 * 128 * 128) + 2
    x = torch.empty(images, 64, 128, 128, dtype=dtype, device="cuda")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x.normal_()
    weight = torch.randn(64, 1, 3, 3, device="cuda").to(dtype)
    y = ops.dwconv_bn_act(x, weight, padding=1, backend="cuda")
    for i in (0, images // 2, images - 1):
        p = Problem(x[i : i + 1], weight, None, None, {"padding": 1})
        assert_correct(p, y[i : i + 1])


# ---- streams, graphs, devices ----
def test_runs_on_the_current_stream():
    p = problem((8, 64, 56, 56), device="cuda", padding=1)
    expected = p.run("cuda")
    x = torch.zeros_like(p.x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the copy is late: only work on this stream waits for it
        x.copy_(p.x, non_blocking=True)
        y = Problem(x, *p.tensors[1:], p.constants).run("cuda")
    stream.synchronize()
    assert torch.equal(y, expected)


def test_streams_do_not_disturb_each_other():
    problems = [problem((4, 32 * i, 28, 28), device="cuda", padding=1) for i in range(1, 7)]
    expected = [p.run("cuda") for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results = []
    for _ in range(5):
        for p, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(p.run("cuda"))
    torch.cuda.synchronize()
    assert all(torch.equal(y, e) for y, e in zip(results, expected * 5, strict=True))


@both_layouts
def test_cuda_graph(channels_last):
    p = problem((2, 32, 14, 14), channels_last=channels_last, device="cuda", padding=1)
    p.run("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = p.run("cuda")
    for _ in range(3):
        p.x.normal_()
        graph.replay()
        assert_correct(p, y)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_another_device_than_the_current_one():
    p = problem((2, 32, 14, 14), device="cuda:1", padding=1)
    with torch.cuda.device(0):
        y = p.run("cuda")
        assert torch.cuda.current_device() == 0
    assert_correct(p, y)
    with pytest.raises(RuntimeError, match="weight: expected x's device cuda:1, got cuda:0"):
        ops.dwconv_bn_act(p.x, p.weight.to("cuda:0"))


# ---- bad input ----
@pytest.mark.parametrize("change,sentence", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input_gives_the_sentence_of_the_cpu(change, sentence):
    def on_device(value):
        return value.cuda() if isinstance(value, torch.Tensor) else value

    ones = torch.ones(4)
    call = dict(x=torch.randn(2, 4, 8, 8), weight=torch.randn(4, 1, 3, 3), scale=ones, shift=ones)
    call = {name: on_device(value) for name, value in (call | {"padding": 1} | change).items()}
    with pytest.raises(RuntimeError, match="^dwconv_bn_act: " + sentence):
        ops.dwconv_bn_act(**call)
    torch.cuda.synchronize()


def test_float64_is_refused_or_native():
    x, weight = torch.randn(1, 4, 5, 5).double().cuda(), torch.randn(4, 1, 3, 3).double().cuda()
    with pytest.raises(RuntimeError, match="serves float32, float16 and bfloat16, not float64"):
        ops.dwconv_bn_act(x, weight, backend="cuda")
    with pytest.raises(RuntimeError, match="x: expected float32, float16 or bfloat16 on a GPU"):
        torch.ops.mnet_kernels.dwconv_bn_act(x, weight, None, None, 1, 0, 1, "relu", 0.0)
    with pytest.warns(UserWarning, match="runs native PyTorch"):
        backends._warn_native.cache_clear()
        ops.dwconv_bn_act(x, weight)


def test_unknown_variant():
    with pytest.raises(RuntimeError, match="there is no variant 'fastest'"):
        cuda().force_variant("fastest")
