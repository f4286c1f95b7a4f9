"""The operators inside torch: dispatcher, compile, export, autograd, autocast, vmap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rulers import problem
from torch.library import opcheck

from mnet_kernels import ops
from mnet_kernels.reference import ACTIVATIONS


def arguments(p) -> tuple:
    c = p.constants
    padding = c.get("padding", 0)
    return (
        *p.tensors, c.get("stride", 1), () if padding == "same" else padding, c.get("dilation", 1),
        c.get("activation", "relu"), c.get("slope", 0.01),
    )  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"stride": 2, "padding": (0, 0, 1, 1), "activation": "relu6"},
        {"stride": (1, 2), "padding": "same", "dilation": 2, "activation": "hardswish"},
        {"padding": (1, 2), "activation": "leaky_relu", "slope": 0.3},
    ],
    ids=str,
)
def test_opcheck_dwconv_bn_act(channels_last, requires_grad, constants):
    p = problem((2, 6, 9, 8), channels_last=channels_last, multiplier=2, **constants)
    if requires_grad:
        for t in p.tensors:
            t.requires_grad_()
    opcheck(torch.ops.mnet_kernels.dwconv_bn_act.default, arguments(p))


@pytest.mark.parametrize("strides", ["sliced", "transposed", "nhwc_sliced"])
def test_opcheck_of_other_strides(strides):
    x = torch.randn(2, 6, 9, 9)
    x = {
        "sliced": x[:, :, 1:, 1:],
        "transposed": x.transpose(2, 3),
        "nhwc_sliced": x.to(memory_format=torch.channels_last)[:, :, 2:],
    }[strides]
    args = (x, torch.randn(6, 1, 3, 3), None, None, 1, 1, 1, "relu", 0.01)
    opcheck(torch.ops.mnet_kernels.dwconv_bn_act.default, args)


def test_opcheck_dense_convolution():
    x = torch.randn(2, 6, 9, 8).to(memory_format=torch.channels_last)
    weight = torch.randn(40, 6, 3, 3)
    opcheck(torch.ops.mnet_kernels.pack_conv_weight.default, (weight,))
    packed = ops.pack_conv_weight(weight)
    args = (x, packed, torch.rand(40), torch.randn(40), 3, 2, 1, 1, 40, "relu", 0.01)
    opcheck(torch.ops.mnet_kernels.conv_bn_act_packed.default, args)


def test_opcheck_checks():
    args = ("op", *arguments(problem())[:7], 0, "relu", 0.01)
    opcheck(torch.ops.mnet_kernels.check_conv.default, args, test_utils=("test_schema",))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("padding", [1, "same"])
def test_compile_fullgraph_with_a_dynamic_batch(channels_last, padding):
    weight, scale, shift = torch.randn(8, 1, 3, 3), torch.rand(8), torch.randn(8)

    def model(x):
        y = ops.dwconv_bn_act(
            x * 2, weight, scale, shift, stride=2, padding=padding, activation="relu6"
        )
        return y.mean((2, 3))

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for batch, size in [(2, 12), (5, 12), (3, 9)]:
        x = torch.randn(batch, 8, size, size).to(memory_format=layout)
        torch.testing.assert_close(compiled(x), model(x))


def test_compile_trains_through_it():
    weight = torch.randn(8, 1, 3, 3, requires_grad=True)

    def loss(w, backend):
        x = torch.linspace(-1, 1, 8 * 36).reshape(1, 8, 6, 6)
        return ops.dwconv_bn_act(x, w, padding=1, activation="silu", backend=backend).square().sum()

    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(weight, None), weight)
    (native,) = torch.autograd.grad(loss(weight, "native"), weight)
    torch.testing.assert_close(compiled, native)


def test_export():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 1, 3, 3))

        def forward(self, x):
            return ops.dwconv_bn_act(x, self.weight, stride=2, padding="same")

    layer = Layer()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(3, 8, 9, 9),), dynamic_shapes=({0: batch},))
    assert any("dwconv_bn_act" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(5, 8, 9, 9)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(activation, channels_last):
    p = problem(
        (1, 2, 4, 5), multiplier=2, dtype=torch.float64, channels_last=channels_last,
        stride=2, padding=(0, 1, 2, 1), activation=activation, slope=0.2,
    )  # fmt: skip
    inputs = tuple(t.detach().clone().requires_grad_() for t in p.tensors)

    def call(*tensors):
        return ops.dwconv_bn_act(*tensors, **p.constants)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_natives(dtype):
    p = problem((2, 8, 9, 9), dtype=dtype, padding="same", stride=2, activation="relu6")
    results = []
    for backend in (None, "native"):
        inputs = [t.detach().clone().requires_grad_() for t in p.tensors]
        y = ops.dwconv_bn_act(*inputs, **p.constants, backend=backend)
        results.append(torch.autograd.grad(y.float().square().sum(), inputs))
    slack = {torch.float32: 1e-4, torch.bfloat16: 4e-2}[dtype]
    for ours, native in zip(*results, strict=True):
        assert ours.dtype == native.dtype
        bound = slack * native.float().abs().max().item()
        torch.testing.assert_close(ours.float(), native.float(), rtol=0, atol=bound)


def test_only_needed_gradients():
    p = problem((1, 4, 5, 5))
    scale = p.scale.clone().requires_grad_()
    ops.dwconv_bn_act(p.x, p.weight, scale, p.shift).sum().backward()
    assert scale.grad is not None


def test_autocast_convolves_in_the_autocast_dtype():
    p = problem((2, 8, 9, 9), padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = p.run()
        native = F.conv2d(p.x, p.weight, None, 1, 1, 1, 8)
    assert y.dtype == native.dtype == torch.bfloat16
    rounded = problem((2, 8, 9, 9), padding=1)
    rounded.x, rounded.weight = p.x.bfloat16(), p.weight.bfloat16()
    rounded.scale, rounded.shift = p.scale, p.shift
    assert torch.equal(y, rounded.run())
    with torch.autocast("cpu", dtype=torch.bfloat16):  # float64 stays, as for native
        assert problem(dtype=torch.float64).run().dtype == torch.float64


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, None, None), (0, 0, 0), (None, 0, None)])
def test_vmap(in_dims):
    shapes = {0: (3, 2, 4, 6, 6), 1: (2, 3, 4, 6, 6), None: (2, 4, 6, 6)}
    x = torch.randn(shapes[in_dims[0]])
    weight = torch.randn((4, 1, 3, 3) if in_dims[1] is None else (3, 4, 1, 3, 3))
    shift = torch.randn((4,) if in_dims[2] is None else (3, 4))

    def call(x, weight, shift, backend=None):
        return ops.dwconv_bn_act(x, weight, None, shift, padding=1, backend=backend)

    args = (x, weight, shift)
    rows = [
        call(*(t if d is None else t.select(d, i) for t, d in zip(args, in_dims, strict=True)))
        for i in range(3)
    ]
    torch.testing.assert_close(torch.vmap(call, in_dims)(x, weight, shift), torch.stack(rows))


def test_inference_mode_and_deterministic():
    p = problem((2, 32, 14, 14), padding=1)
    with torch.inference_mode():
        first = p.run()
    assert torch.equal(first, p.run())
