"""separable_conv on a GPU: every kernel against float64, and what only a device can show."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_rulers import ON_A_GPU, every_dtype
from emulation.separable import Separable, separable
from torch import Tensor

from mnet_kernels.reference import ACTIVATIONS

pytestmark = ON_A_GPU

# Shape, outputs: at both sides of a vector, an instruction, a chunk, a tile; images sharing a tile.
SHAPES = [
    ((1, 8, 1, 1), 8), ((3, 72, 7, 7), 40), ((2, 16, 14, 14), 136), ((1, 136, 9, 11), 24),
    ((5, 264, 7, 7), 320), ((1, 32, 57, 56), 64), ((2, 1024, 7, 7), 128), ((1, 7, 9, 10), 13),
    ((1, 1536, 5, 5), 40),
]  # fmt: skip
ANY = [
    ((3, 3), {"padding": 1}),
    ((3, 3), {"padding": "same", "stride": 2}),
    ((5, 5), {"padding": 2}),
    ((3, 5), {"dilation": (3, 2), "padding": (3, 4), "stride": (2, 3)}),
    ((1, 1), {}),
]


def cuda():
    from mnet_kernels import _cuda

    return _cuda


def lists(s: Separable) -> tuple[list[int], list[int], list[int]]:
    """stride, padding, dilation as the operator takes them."""
    c = {"stride": 1, "padding": 0, "dilation": 1} | s.depthwise.constants
    stride, padding, dilation = (
        [] if v == "same" else list(v) if isinstance(v, tuple) else [v]
        for v in (c["stride"], c["padding"], c["dilation"])
    )
    return stride, padding, dilation


def run(s: Separable, **changed: Tensor | None) -> Tensor:
    x, weight, scale, shift = s.depthwise.tensors
    tensors = {
        "x": x, "dw_weight": weight, "dw_scale": scale, "dw_shift": shift,
        "pw_weight": s.pw_weight, "pw_scale": s.pw_scale, "pw_shift": s.pw_shift,
        "residual": s.residual,
    } | changed  # fmt: skip
    activation = s.depthwise.constants.get("activation", "relu")
    return torch.ops.mnet_kernels.separable_conv(
        *tensors.values(), *lists(s), activation, s.pw_activation, s.slope, s.tf32
    )


def able(s: Separable) -> list[str]:
    p = s.depthwise
    stride, padding, dilation = lists(s)
    dtype = str(p.x.dtype).removeprefix("torch.")
    return (
        cuda()
        .facts_of_separable_call(
            list(p.x.shape), dtype, list(p.weight.shape), s.pw_weight.shape[0], stride, padding,
            dilation,
        )
        .able
    )  # fmt: skip


@pytest.fixture
def force():
    """force(name): use this kernel until the test ends."""
    yield cuda().force_separable_variant
    cuda().force_separable_variant("")


def check_every_kernel(s: Separable, force) -> None:
    for name in [*able(s), ""]:
        force(name)
        y = run(s)
        s.assert_correct(y)
        assert torch.equal(y, run(s)), f"{name} is not deterministic"


@every_dtype
@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_edges(force, dtype, kernel, constants):
    for number, (shape, outputs) in enumerate(SHAPES):
        check_every_kernel(
            separable(
                shape, outputs, kernel, dtype=dtype, device="cuda", residual=number % 2 == 1,
                dw_activation="relu6", **constants,
            ),
            force,
        )  # fmt: skip


@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_tf32(force, kernel, constants):
    """Within its own bound, and it is TF32: not what plain multiply-adds make of it."""
    for number, (shape, outputs) in enumerate(SHAPES):
        s = separable(
            shape, outputs, kernel, device="cuda", residual=number % 2 == 1, tf32=True, **constants
        )
        check_every_kernel(s, force)
        fast, s.tf32 = run(s), False
        assert fast.numel() < 1000 or not torch.equal(fast, run(s))


def test_cudnns_flag_decides():
    from mnet_kernels import separable_conv

    s = separable((2, 64, 14, 14), 64, padding=1, device="cuda")
    p = s.depthwise
    ways = []
    for allowed in (False, True):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            ways.append(separable_conv(
                p.x, p.weight, p.scale, p.shift, s.pw_weight, s.pw_scale, s.pw_shift, padding=1,
                backend="cuda",
            ))  # fmt: skip
        s.tf32 = allowed
        assert torch.equal(ways[-1], run(s))
    assert not torch.equal(*ways)


@every_dtype
def test_sanitized(force, dtype):
    """A choice of the edges for compute-sanitizer, to which every launch costs much."""
    for (shape, outputs), (kernel, constants) in itertools.product(SHAPES[1:8:2], ANY[:3]):
        check_every_kernel(
            separable(
                shape, outputs, kernel, dtype=dtype, device="cuda", margin=0, residual=True,
                **constants,
            ),
            force,
        )  # fmt: skip


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(force, dtype, activation):
    s = separable(
        (2, 24, 9, 9), 40, padding=1, dtype=dtype, device="cuda", dw_activation=activation,
        pw_activation=activation, slope=0.2,
    )  # fmt: skip
    s.depthwise.shift *= 4
    s.pw_shift *= 4
    check_every_kernel(s, force)


def test_multiplier(force):
    check_every_kernel(separable((2, 9, 8, 8), 24, multiplier=3, padding=1, device="cuda"), force)


@every_dtype
def test_layouts(dtype):
    """A contiguous x is copied on the way in, the result on the way out; odd strides likewise."""
    s = separable((2, 24, 9, 9), 40, padding=1, dtype=dtype, device="cuda", residual=True)
    expected = run(s)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    y = run(s, x=s.depthwise.x.contiguous(), residual=s.residual.contiguous())
    assert y.is_contiguous()
    assert torch.equal(y, expected)
    wide = torch.full((2, 24, 9, 18), float("nan"), device="cuda", dtype=dtype)
    wide[..., ::2] = s.depthwise.x
    transposed = s.pw_weight[:, :, 0, 0].T.contiguous().T[:, :, None, None]
    y = run(s, x=wide[..., ::2], pw_weight=transposed)
    assert torch.equal(y, expected)


def test_an_empty_batch():
    s = separable((0, 24, 9, 9), 40, padding=1, device="cuda")
    assert run(s).shape == (0, 40, 9, 9)


def test_streams_and_a_cuda_graph():
    s = separable((4, 64, 14, 14), 128, padding=1, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = run(s)
    stream.synchronize()
    s.assert_correct(y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(s)
    for _ in range(2):
        s.depthwise.x.normal_()
        graph.replay()
        s.assert_correct(y)


def test_nothing_is_allocated_but_the_output():
    s = separable((4, 64, 28, 28), 128, padding=1, dtype=torch.bfloat16, device="cuda")
    run(s)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = run(s)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 512


@pytest.mark.parametrize("shape,outputs", [((256, 512, 14, 14), 512), ((64, 128, 56, 56), 128)])
def test_large_batches_are_no_less_accurate_than_native(force, shape, outputs):
    """Mean error against float64 on the first and the last image, beside two native convolutions
    that round in between."""
    s = separable(shape, outputs, padding=1, dtype=torch.bfloat16, device="cuda")
    p = s.depthwise
    some = [0, shape[0] - 1]
    part = Separable(
        type(p)(p.x[some], *p.tensors[1:], p.constants), s.pw_weight, s.pw_scale, s.pw_shift
    )
    exact, _ = part.reference()
    z = torch.nn.functional.conv2d(part.depthwise.run("native"), s.pw_weight)
    each = (1, -1, 1, 1)
    z = z * s.pw_scale.to(z.dtype).view(each) + s.pw_shift.to(z.dtype).view(each)
    native = (z.relu().cpu().double() - exact).abs().mean()
    for name in able(s):
        force(name)
        error = (run(s)[some].cpu().double() - exact).abs().mean()
        assert error <= native, name
