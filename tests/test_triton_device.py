"""The Triton backend on a GPU: kernels as compiled there, and what only a device can show.

Tests of values take one of the configurations that fit, always the same one: to tune every layer
here would take minutes. Without a GPU the interpreter runs them on the CPU: test_triton.py.
"""

from __future__ import annotations

from zlib import crc32

import pytest
import rulers
import torch
from cuda_rulers import ANY, DTYPES, FAST, SHAPES, both_layouts
from gradient_rulers import assert_gradients, gradients
from rulers import assert_correct, problem
from test_triton_conv import CASES as DENSE
from test_triton_conv import dense
from test_triton_separable import CASES, Block
from test_triton_training import check as check_training

from mnet_kernels import backends, ops
from mnet_kernels.reference import ACTIVATIONS

DEVICE = "cpu" if rulers.BACKEND == "triton" else "cuda"
WHY_NOT = backends.why_not("triton", device=DEVICE)
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.usefixtures("poisoned_memory"),
]
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter launches nothing")


def check(p) -> None:
    """Forward and backward."""
    y = p.run("triton")
    assert_correct(p, y)
    dy = torch.randn(y.shape, dtype=torch.float64).to(p.x)
    assert_gradients(p, dy, gradients(p, dy, "triton"))


@pytest.fixture
def untuned(monkeypatch, request):
    from mnet_kernels.triton import tuning

    number = crc32(request.node.nodeid.encode())

    def one_of(prune):
        def one(*args):
            fitting = prune(*args)
            return [fitting[number % len(fitting)]]

        return one

    for name in ("prune", "prune_dense"):
        monkeypatch.setattr(tuning, name, one_of(getattr(tuning, name)))


@pytest.mark.usefixtures("untuned")
@both_layouts
@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))
def test_shapes(number, channels_last):
    p = problem(
        SHAPES[number], dtype=DTYPES[number % 3], channels_last=channels_last, device=DEVICE,
        padding=1, activation="relu6",
    )  # fmt: skip
    check(p)


@pytest.mark.usefixtures("untuned")
@both_layouts
@pytest.mark.parametrize(("kernel", "constants"), FAST + ANY, ids=str)
def test_any_kernel_stride_dilation_padding(channels_last, kernel, constants):
    p = problem(
        (2, 9, 13, 12), kernel, multiplier=1 if (kernel, constants) in FAST else 2,
        channels_last=channels_last, device=DEVICE, **constants,
    )  # fmt: skip
    check(p)


@pytest.mark.usefixtures("untuned")
@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(channels_last, activation):
    p = problem(
        (1, 8, 5, 6), channels_last=channels_last, device=DEVICE, padding=1,
        activation=activation, slope=0.2,
    )  # fmt: skip
    p.shift *= 4  # reach all branches
    check(p)


@pytest.mark.usefixtures("untuned")
@both_layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "stride"), [((3, 24, 14, 14), 1), ((4, 9, 15, 16), 2)], ids=str)
def test_training(shape, stride, dtype, channels_last):
    p = problem(
        shape, dtype=dtype, channels_last=channels_last, device=DEVICE, stride=stride, padding=1,
        activation="relu6",
    )  # fmt: skip
    check_training(p)


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "outputs", "kernel", "constants"), CASES[:6], ids=str)
def test_separable(shape, outputs, kernel, constants, dtype, channels_last):
    with torch.backends.cudnn.flags(allow_tf32=False):
        block = Block(
            shape, outputs, kernel, dtype=dtype, channels_last=channels_last, device=DEVICE,
            **constants,
        )  # fmt: skip
        block.assert_correct(block.run())


@pytest.mark.usefixtures("untuned")
@both_layouts
@pytest.mark.parametrize("number", range(len(DENSE)), ids=lambda i: str(DENSE[i]))
def test_dense(number, channels_last):
    shape, outputs, kernel, constants = DENSE[number]
    p = dense(
        shape, outputs, kernel, dtype=DTYPES[number % 3], channels_last=channels_last,
        device=DEVICE, **constants,
    )  # fmt: skip
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert_correct(p, p.run())


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration_of_dense(monkeypatch, dtype):
    """Each alone, for the outputs of each of its kernels to be seen."""
    from mnet_kernels.triton import tuning
    from mnet_kernels.triton.conv_bn_act import _conv

    prune = tuning.prune_dense
    for outputs in (16, 30, 60, 100, 270):
        p = dense((2, 96, 14, 14), outputs, dtype=dtype, channels_last=True, device=DEVICE)
        for config in prune(dtype.itemsize, {"K": outputs}):
            monkeypatch.setattr(tuning, "prune_dense", lambda *_, config=config: [config])
            monkeypatch.setattr(_conv, "cache", {})
            with torch.backends.cudnn.flags(allow_tf32=False):
                assert_correct(p, p.run())


@on_a_gpu
def test_float32_products_follow_cudnns_flag():
    """TF32 keeps 11 bits of a factor."""
    block = Block((1, 64, 14, 14), 64, padding=1, channels_last=True, device=DEVICE)
    p = dense((1, 64, 14, 14), 64, channels_last=True, device=DEVICE)
    for run, assert_exact in (
        (block.run, block.assert_correct), (p.run, lambda y: assert_correct(p, y)),
    ):  # fmt: skip
        with torch.backends.cudnn.flags(allow_tf32=False):
            full = run()
            assert_exact(full)
        with torch.backends.cudnn.flags(allow_tf32=True):
            short = run()
        error = (short - full).abs().max() / full.abs().max()
        assert 0 < error < 2.0**-7


@on_a_gpu
@both_layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_graph_replays_any_batch_that_was_not_tuned_for(channels_last, dtype):
    """The configuration of the first batch serves the next: nothing is tuned in the capture."""
    first = problem((2, 16, 14, 14), dtype=dtype, channels_last=channels_last, device=DEVICE)
    first.run("triton")
    p = problem((5, 16, 14, 14), dtype=dtype, channels_last=channels_last, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = p.run("triton")
    y.fill_(float("nan"))
    graph.replay()
    assert_correct(p, y)


@on_a_gpu
@both_layouts
def test_compiled_and_exported(channels_last):
    weight = torch.randn(8, 1, 3, 3, device=DEVICE)
    scale, shift = torch.rand(8, device=DEVICE), torch.randn(8, device=DEVICE)

    class Layer(torch.nn.Module):
        def forward(self, x):
            y = ops.dwconv_bn_act(x * 2, weight, scale, shift, padding=1, backend="triton")
            return y.mean((2, 3))

    def image(batch):
        x = torch.randn(batch, 8, 12, 12, device=DEVICE)
        return x.to(memory_format=torch.channels_last) if channels_last else x

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    program = torch.export.export(
        layer, (image(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    for batch in (2, 5):
        x = image(batch)
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(program.module()(x), layer(x))


@on_a_gpu
@both_layouts
def test_the_same_call_gives_the_same_bits(channels_last):
    p = problem((5, 24, 28, 28), channels_last=channels_last, device=DEVICE, padding=1)
    dy = torch.randn(5, 24, 28, 28, device=DEVICE)
    first, second = gradients(p, dy, "triton"), gradients(p, dy, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
