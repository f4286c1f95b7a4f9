"""conv_bn_act on a GPU: every kernel against float64, and what only a device can show."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_rulers import ON_A_GPU, every_dtype
from emulation.conv import Conv, assert_correct, conv
from torch import Tensor

from mnet_kernels.reference import ACTIVATIONS

pytestmark = ON_A_GPU

# Shape, outputs: at both sides of a vector, an instruction, a chunk, a tile; images sharing a tile.
SHAPES = [
    ((1, 8, 1, 1), 8), ((3, 72, 7, 7), 40), ((2, 16, 14, 14), 136), ((1, 136, 9, 11), 24),
    ((5, 264, 7, 7), 320), ((1, 16, 57, 56), 96), ((2, 1024, 7, 7), 128), ((1, 7, 9, 10), 13),
    ((2, 3, 65, 64), 32), ((1, 1536, 5, 5), 40),
]  # fmt: skip
ANY = [
    ((1, 1), {}),
    ((3, 3), {"padding": "same", "stride": 2}),
    ((3, 3), {"padding": 1}),
    ((3, 5), {"dilation": (3, 2), "padding": (3, 4), "stride": (2, 3)}),
]


def cuda():
    from mnet_kernels import _cuda

    return _cuda


def lists(p: Conv) -> tuple[list[int], list[int], list[int]]:
    """stride, padding, dilation as the operator takes them."""
    c = {"stride": 1, "padding": 0, "dilation": 1} | p.constants
    stride, padding, dilation = (
        [] if v == "same" else list(v) if isinstance(v, tuple) else [v]
        for v in (c["stride"], c["padding"], c["dilation"])
    )
    return stride, padding, dilation


def run(p: Conv, **changed: Tensor | None) -> Tensor:
    tensors = dict(zip(("x", "weight", "scale", "shift"), p.tensors, strict=True)) | changed
    return torch.ops.mnet_kernels.conv_bn_act(
        *tensors.values(), *lists(p), p.constants.get("activation", "relu"),
        p.constants.get("slope", 0.01), p.tf32,
    )  # fmt: skip


def able(p: Conv) -> list[str]:
    dtype = str(p.x.dtype).removeprefix("torch.")
    return cuda().facts_of_conv_call(list(p.x.shape), dtype, list(p.weight.shape), *lists(p)).able


@pytest.fixture
def force():
    """force(name): use this kernel until the test ends."""
    yield cuda().force_conv_variant
    cuda().force_conv_variant("")


def check_every_kernel(p: Conv, force) -> None:
    for name in [*able(p), ""]:
        force(name)
        y = run(p)
        assert_correct(p, y)
        assert torch.equal(y, run(p)), f"{name} is not deterministic"


@every_dtype
@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_edges(force, dtype, kernel, constants):
    for shape, outputs in SHAPES:
        p = conv(
            shape, outputs, kernel, dtype=dtype, device="cuda", activation="relu6", **constants
        )
        check_every_kernel(p, force)


@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_tf32(force, kernel, constants):
    """Within its own bound, and it is TF32: not what plain multiply-adds make of it."""
    for shape, outputs in SHAPES:
        p = conv(shape, outputs, kernel, device="cuda", tf32=True, **constants)
        check_every_kernel(p, force)
        fast, p.tf32 = run(p), False
        assert fast.numel() < 1000 or not torch.equal(fast, run(p))


@every_dtype
def test_sanitized(force, dtype):
    """A choice of the edges for compute-sanitizer, to which every launch costs much."""
    for (shape, outputs), (kernel, constants) in itertools.product(SHAPES[2:9:3], ANY[:2]):
        p = conv(shape, outputs, kernel, dtype=dtype, device="cuda", margin=0, **constants)
        check_every_kernel(p, force)


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(force, dtype, activation):
    p = conv((2, 24, 9, 9), 40, dtype=dtype, device="cuda", activation=activation, slope=0.2)
    p.shift *= 4
    check_every_kernel(p, force)


@every_dtype
def test_layouts(dtype):
    """A contiguous x is copied on the way in, the result on the way out; odd strides likewise."""
    p = conv((2, 24, 9, 9), 40, (3, 3), padding=1, dtype=dtype, device="cuda")
    expected = run(p)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    y = run(p, x=p.x.contiguous(), weight=p.weight.contiguous())
    assert y.is_contiguous()
    assert torch.equal(y, expected)
    wide = torch.full((2, 24, 9, 18), float("nan"), device="cuda", dtype=dtype)
    wide[..., ::2] = p.x
    transposed = p.weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(run(p, x=wide[..., ::2], weight=transposed), expected)


def test_an_empty_batch():
    assert run(conv((0, 24, 9, 9), 40, device="cuda")).shape == (0, 40, 9, 9)


def test_streams_and_a_cuda_graph():
    p = conv((4, 64, 14, 14), 128, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = run(p)
    stream.synchronize()
    assert_correct(p, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(p)
    for _ in range(2):
        p.x.normal_()
        graph.replay()
        assert_correct(p, y)


@pytest.mark.parametrize("shape,kernel", [((4, 64, 28, 28), (1, 1)), ((4, 64, 28, 28), (3, 3))])
def test_nothing_is_allocated_but_the_output(shape, kernel):
    p = conv(shape, 128, kernel, dtype=torch.bfloat16, device="cuda")
    run(p)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = run(p)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 512


@pytest.mark.parametrize(
    "shape,outputs,kernel", [((256, 16, 112, 112), 96, (1, 1)), ((64, 3, 224, 224), 32, (3, 3))]
)
def test_large_batches_are_no_less_accurate_than_native(force, shape, outputs, kernel):
    """Mean error against float64 on the first and the last image, beside a native convolution and
    an affine that each round."""
    p = conv(
        shape, outputs, kernel, dtype=torch.bfloat16, device="cuda", padding=kernel[0] // 2,
        stride=1 if kernel == (1, 1) else 2,
    )  # fmt: skip
    some = [0, shape[0] - 1]
    part = Conv(p.x[some], *p.tensors[1:], p.constants)
    wide = [None if t is None else t.cpu().double() for t in part.tensors]
    exact = Conv(*wide, p.constants).run("native")
    native = (part.run("native").cpu().double() - exact).abs().mean()
    for name in able(p):
        force(name)
        error = (run(p)[some].cpu().double() - exact).abs().mean()
        assert error <= native, name
