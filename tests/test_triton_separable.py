"""separable_conv on Triton, in its interpreter (test_triton.py runs this file) against float64."""

from __future__ import annotations

import pytest
import rulers
import torch
import torch.nn.functional as F
from rulers import ROUNDING, SMALLEST, problem
from torch.library import opcheck

from mnet_kernels import reference
from mnet_kernels.reference import ACTIVATIONS
from mnet_kernels.registration import explicit_padding, pair

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(rulers.BACKEND is None, reason="runs in Triton's interpreter"),
]
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
EACH = (-1, 1, 1)


class Block:
    """A call: its tensors in the operator's order, and its constants."""

    def __init__(self, shape, outputs, kernel=(3, 3), *, residual=False, affine=True, **constants):
        self.pw_activation = constants.pop("pw_activation", "relu")
        p = self.depthwise = problem(shape, kernel, affine=affine, **constants)
        c = {"stride": 1, "padding": 0, "dilation": 1, "activation": "relu", "slope": 0.01}
        c |= p.constants
        stride, dilation = pair(c["stride"]), pair(c["dilation"])
        padding = () if c["padding"] == "same" else c["padding"]
        padding = (padding,) * 4 if isinstance(padding, int) else padding
        self.constants = (
            stride, padding, dilation, c["activation"], self.pw_activation, c["slope"],
        )  # fmt: skip
        inner = p.weight.shape[0]
        weight = torch.randn(outputs, inner, 1, 1, dtype=torch.float64).to(p.x)
        scale, shift = (t.to(p.x.device) for t in (torch.rand(outputs) + 0.5, torch.randn(outputs)))
        self.tensors = [*p.tensors, weight, *((scale, shift) if affine else (None, None)), None]
        if residual:
            size = self.exact().shape
            self.tensors[7] = torch.randn(size, dtype=torch.float64).to(p.x)

    def run(self, tensors=None):
        from mnet_kernels.triton.operators import separable_conv

        return separable_conv(*(tensors or self.tensors), *self.constants)

    def exact(self, tensors=None, dtype=torch.float64):
        """In plain PyTorch, in the dtype, on the CPU."""
        tensors = [None if t is None else t.to("cpu", dtype) for t in tensors or self.tensors]
        x, weight, scale, shift, pw_weight, pw_scale, pw_shift, residual = tensors
        stride, padding, dilation, dw_activation, pw_activation, slope = self.constants
        y = reference.dwconv_bn_act(
            x, weight, scale, shift, stride=stride, dilation=dilation, slope=slope,
            padding=explicit_padding(x, weight, stride, padding, dilation),
            activation=dw_activation,
        )  # fmt: skip
        y = reference.conv_bn_act(
            y, pw_weight, pw_scale, pw_shift, activation=pw_activation, slope=slope
        )
        return y if residual is None else y + residual

    def assert_correct(self, y):
        """The depthwise half's own tolerance goes through the product, each term of whose sum may
        be rounded; then two roundings to the dtype."""
        exact, dtype = self.exact(), self.tensors[0].dtype
        assert (y.shape, y.dtype) == (exact.shape, dtype)
        middle, magnitude = rulers.reference(self.depthwise)
        middle_error = rulers.tolerance(self.depthwise, middle, magnitude)
        *_, weight, scale, shift, residual = (
            None if t is None else t.cpu().double() for t in self.tensors
        )
        by = 1 if scale is None else scale.abs().view(EACH)
        offset = 0 if shift is None else shift.abs().view(EACH)

        def product(t):
            return F.conv2d(t, weight.abs()) * by

        steps = (weight.shape[1] + 8) * ROUNDING[torch.float32]
        error = product(middle_error) + steps * (product(middle.abs() + middle_error) + offset)
        error = 1.5 * error  # no activation is steeper
        added = 0 if residual is None else residual.abs()
        allowed = error + 2 * ROUNDING[dtype] * (exact.abs() + added + error) + SMALLEST[dtype]
        wrong = ~((y.cpu().double() - exact).abs() <= allowed)  # NaN is wrong
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements are off"


# Input and output channels at each side of a block of 32 or 16 and of 32, 64, 128, 256; pixels at
# each side of 32, 64 and 128.
CASES = [
    ((2, 9, 7, 6), 24, (3, 3), {"padding": 1}),
    ((1, 33, 9, 7), 31, (3, 3), {"padding": 1, "residual": True, "activation": "silu"}),
    ((1, 32, 8, 8), 65, (3, 3), {"padding": 1, "stride": 2, "pw_activation": "identity"}),
    ((6, 16, 9, 9), 64, (3, 3), {"padding": "same", "stride": 2, "residual": True}),
    ((3, 40, 7, 7), 130, (3, 3), {"padding": (0, 0, 1, 1), "activation": "relu6"}),
    ((1, 17, 6, 6), 300, (3, 3), {"dilation": 2, "padding": 2, "affine": False}),
    ((1, 7, 9, 10), 20, (5, 5), {"padding": 2, "multiplier": 2, "pw_activation": "hardswish"}),
    ((1, 5, 11, 9), 16, (8, 8), {"padding": 4, "activation": "leaky_relu", "slope": 0.3}),
    ((1, 3, 1, 1), 1, (1, 1), {"activation": "hardsigmoid"}),
]


@pytest.mark.parametrize("dtype", rulers.DTYPES, ids=str)
@both_layouts
@pytest.mark.parametrize("shape,outputs,kernel,constants", CASES, ids=str)
def test_against_float64(shape, outputs, kernel, constants, channels_last, dtype):
    block = Block(shape, outputs, kernel, channels_last=channels_last, dtype=dtype, **constants)
    y = block.run()
    block.assert_correct(y)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert y.is_contiguous(memory_format=layout) or min(shape) == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    block = Block(
        (1, 20, 4, 5), 18, padding=1, activation=activation, pw_activation=activation, slope=0.2
    )
    block.assert_correct(block.run())


def test_every_configuration(monkeypatch):
    from mnet_kernels.triton import launch

    for choice in range(3):
        monkeypatch.setattr(launch, "interpreted_choice", choice)
        for outputs in (60, 270):
            block = Block((1, 20, 9, 8), outputs, padding=1, channels_last=True, residual=True)
            block.assert_correct(block.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_middle_is_rounded_as_a_tensor_would_be(dtype):
    """A product by one, so that nothing else is rounded in between."""
    block = Block((1, 8, 6, 6), 8, padding=1, dtype=dtype, pw_activation="identity")
    block.tensors[4:7] = [torch.eye(8, dtype=dtype).view(8, 8, 1, 1), None, None]
    from mnet_kernels.triton.operators import dwconv_bn_act

    stride, padding, dilation, activation, _, slope = block.constants
    middle = dwconv_bn_act(*block.tensors[:4], stride, padding, dilation, activation, slope)
    assert torch.equal(block.run(), middle)


def test_a_residual_of_another_layout_and_a_sliced_input():
    block = Block((2, 12, 6, 5), 12, padding=1, channels_last=True, residual=True)
    block.tensors[0] = torch.randn(2, 20, 6, 8)[:, 3:15, :, 1:6]
    block.depthwise.x = block.tensors[0]
    block.assert_correct(block.run())


def test_inf_and_nan_stay_where_they_are():
    block = Block((1, 6, 5, 5), 5, (1, 1), channels_last=True, pw_activation="identity")
    block.tensors[0] = block.tensors[0].clone()
    block.tensors[0][0, 2, 1, 3], block.tensors[0][0, 4, 0, 0] = float("nan"), float("inf")
    y = block.run()
    bad = torch.zeros(5, 5, dtype=torch.bool)
    bad[1, 3] = bad[0, 0] = True
    assert y[0][:, ~bad].isfinite().all()
    assert y[0][:, 1, 3].isnan().all()


def test_gradients_are_those_of_the_halves():
    block = Block(
        (1, 6, 5, 6), 7, padding=1, stride=2, channels_last=True, residual=True,
        activation="silu", pw_activation="hardswish",
    )  # fmt: skip
    results = []
    for call in (block.run, lambda leaves: block.exact(leaves, torch.float32)):
        leaves = [t.detach().clone().requires_grad_() for t in block.tensors]
        results.append(torch.autograd.grad(call(leaves).square().sum(), leaves, create_graph=True))
        results[-1] += torch.autograd.grad(sum(g.square().sum() for g in results[-1]), leaves)
    for ours, native in zip(*results, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-5 * native.abs().max().item())


def test_first_gradients_go_through_the_fused_backward():
    block = Block((1, 6, 5, 6), 7, padding=1, activation="silu", pw_activation="silu")
    results = []
    for call in (block.run, lambda leaves: block.exact(leaves, torch.float32)):
        leaves = [t if t is None else t.detach().clone().requires_grad_() for t in block.tensors]
        wanted = [t for t in leaves[:6] if t is not None]
        results.append(torch.autograd.grad(call(leaves).square().sum(), wanted))
    for ours, native in zip(*results, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-5 * native.abs().max().item())


def test_opcheck_and_an_empty_batch():
    block = Block((2, 5, 4, 5), 6, channels_last=True, multiplier=2, residual=True)
    call = torch.ops.mnet_kernels.separable_conv_triton.default
    opcheck(call, (*block.tensors, *block.constants))
    for t in block.tensors:
        t.requires_grad_()
    opcheck(call, (*block.tensors, *block.constants), test_utils=("test_autograd_registration",))
    assert Block((0, 5, 4, 5), 6).run().shape == (0, 6, 2, 3)


def test_autocast_and_vmap():
    block = Block((2, 5, 4, 6), 6, padding=1, residual=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block.run()
    narrow = [t.bfloat16() if i in (0, 1, 4, 7) else t for i, t in enumerate(block.tensors)]
    assert torch.equal(y, block.run(narrow))
    xs = torch.stack([block.tensors[0], block.tensors[0] + 1])
    mapped = torch.vmap(lambda x: block.run([x, *block.tensors[1:]]))(xs)
    assert torch.equal(mapped[1], block.run([xs[1], *block.tensors[1:]]))


def test_bad_input():
    block = Block((1, 4, 5, 5), 6)
    block.tensors[4] = torch.zeros(6, 5, 1, 1)
    with pytest.raises(RuntimeError, match="separable_conv: pw_weight: expected"):
        block.run()
