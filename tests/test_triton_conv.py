"""conv_bn_act on Triton, in its interpreter (test_triton.py runs this file) against float64."""

from __future__ import annotations

import pytest
import rulers
import torch
from rulers import ROUNDING, assert_correct, problem
from torch.library import opcheck

from mnet_kernels import ops
from mnet_kernels.reference import ACTIVATIONS

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(rulers.BACKEND is None, reason="runs in Triton's interpreter"),
]
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "activation": "relu", "slope": 0.01}


class Dense(rulers.Problem):
    """A call of conv_bn_act."""

    def run(self, backend=None, x=None):
        x, *others = self.tensors if x is None else (x, *self.tensors[1:])
        if backend == "native":
            return ops.conv_bn_act(x, *others, **self.constants, backend="native")
        from mnet_kernels.triton.operators import conv_bn_act

        return conv_bn_act(x, *others, *self.positional())

    def positional(self) -> tuple:
        constants = DEFAULTS | self.constants
        if constants["padding"] == "same":
            constants["padding"] = ()
        return tuple(
            [v] if name in ("stride", "padding", "dilation") and isinstance(v, int) else v
            for name, v in constants.items()
        )


def dense(shape, outputs, kernel=(1, 1), *, dtype=torch.float32, affine=True, **rest) -> Dense:
    """As rulers.problem(), with `outputs` channels."""
    p = problem(shape, kernel, dtype=dtype, affine=False, **rest)
    weight = torch.randn(outputs, shape[1], *kernel, dtype=torch.float64).to(p.x)
    scale, shift = torch.rand(outputs) + 0.5, torch.randn(outputs)
    affine = (scale.to(p.x.device), shift.to(p.x.device)) if affine else (None, None)
    return Dense(p.x, weight, *affine, p.constants)


# Input channels at each side of a block of 16, 32 and 64, output channels of 16 ... 256, pixels of
# 32, 64 and 128; rows of as many pixels as one access moves, and not.
CASES = [
    ((2, 3, 15, 13), 32, (3, 3), {"stride": 2, "padding": (0, 0, 1, 1), "activation": "relu6"}),
    ((1, 3, 14, 17), 33, (3, 3), {"stride": 2, "padding": "same", "activation": "hardswish"}),
    ((2, 24, 7, 7), 144, (1, 1), {"activation": "silu"}),
    ((1, 65, 8, 8), 17, (1, 1), {"activation": "identity"}),
    ((2, 128, 4, 4), 300, (1, 1), {"affine": False}),
    ((3, 40, 9, 7), 20, (1, 1), {"stride": 2}),
    ((1, 7, 12, 11), 9, (5, 5), {"dilation": 2, "padding": 4, "activation": "leaky_relu"}),
    ((1, 70, 6, 5), 70, (3, 3), {"padding": 1}),
    ((1, 16, 8, 16), 64, (3, 2), {"padding": (1, 0), "dilation": (1, 3)}),
    ((1, 17, 6, 6), 16, (1, 1), {"padding": (1, 0, 2, 1)}),
    ((1, 33, 7, 9), 128, (2, 4), {}),
    ((4, 5, 1, 1), 1, (1, 1), {"activation": "hardsigmoid"}),
    ((35, 72, 1, 1), 40, (1, 1), {"activation": "relu"}),
]


@pytest.mark.parametrize("dtype", rulers.DTYPES, ids=str)
@both_layouts
@pytest.mark.parametrize("shape,outputs,kernel,constants", CASES, ids=str)
def test_against_float64(shape, outputs, kernel, constants, channels_last, dtype):
    p = dense(shape, outputs, kernel, channels_last=channels_last, dtype=dtype, **constants)
    y = p.run()
    assert_correct(p, y)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert y.is_contiguous(memory_format=layout) or min(shape) == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    p = dense((1, 20, 4, 5), 18, activation=activation, slope=0.2, channels_last=True)
    p.shift *= 4  # reach all branches
    assert_correct(p, p.run())


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_configuration(monkeypatch, dtype, channels_last):
    from mnet_kernels.triton import launch, tuning

    for outputs in (16, 30, 60, 100, 270):
        p = dense((2, 40, 9, 8), outputs, dtype=dtype, channels_last=channels_last)
        for choice in range(len(tuning.prune_dense(dtype.itemsize, {"K": outputs}))):
            monkeypatch.setattr(launch, "interpreted_choice", choice)
            assert_correct(p, p.run())


@both_layouts
def test_one_hot_inputs_find_every_index_error(channels_last):
    for channels, outputs in ((3, 40), (33, 20)):  # several taps in a block of depth, and one
        p = dense(
            (1, channels, 7, 9), outputs, (3, 3), stride=2, padding=1, activation="identity",
            affine=False, channels_last=channels_last,
        )  # fmt: skip
        p.weight = torch.arange(p.weight.numel()).float().reshape(p.weight.shape) + 1
        for c, h, w in [(0, 0, 0), (channels - 1, 6, 8), (channels // 2, 3, 8), (1, 6, 0)]:
            p.x.zero_()
            p.x[0, c, h, w] = 1
            assert torch.equal(p.run(), p.run("native"))


@both_layouts
def test_no_less_accurate_than_native(channels_last):
    for dtype in rulers.DTYPES:
        ours = native = 0.0
        for shape, outputs, kernel, constants in CASES:
            p = dense(shape, outputs, kernel, channels_last=channels_last, dtype=dtype, **constants)
            exact, _ = rulers.reference(p)
            ours += (p.run().double() - exact).abs().mean()
            native += (p.run("native").double() - exact).abs().mean()
        assert ours <= native, dtype


def test_offsets_of_64_bits():
    """A padded plane beyond 2^30 pixels, of which the output sees few."""
    p = dense((1, 2, 4, 4), 3, padding=(2**30, 2, 2**30, 2), stride=(2**29, 1))
    y = p.run()
    assert y.shape == (1, 3, 5, 8)
    inner = Dense(*p.tensors, {"padding": (0, 2, 0, 2), "stride": (4, 1)})
    torch.testing.assert_close(y[:, :, 2:3], inner.run())
    assert torch.equal(y[:, :, 0], p.shift.relu().view(1, 3, 1).expand(1, 3, 8))


def test_planes_of_one_pixel_are_read_along_their_channels(monkeypatch):
    from mnet_kernels.triton import tuning

    seen, real = [], tuning.dense
    monkeypatch.setattr(
        tuning, "dense", lambda *args, **c: seen.append(c["CHANNELS_LAST"]) or real(*args, **c)
    )
    dense((3, 8, 1, 1), 4).run()
    dense((3, 8, 1, 1), 4, padding=1).run()
    dense((3, 8, 1, 2), 4).run()
    assert seen == [True, False, False]


@both_layouts
def test_a_sliced_input_and_weights_of_any_strides(channels_last):
    p = dense((2, 12, 6, 5), 10, (3, 3), padding=1)
    p.x = torch.randn(2, 20, 6, 8)[:, 3:15, :, 1:6]
    p.weight = torch.randn(3, 3, 12, 10).permute(3, 2, 0, 1)
    p.scale, p.shift = torch.rand(20)[::2], torch.randn(10, 2)[:, 1]
    if channels_last:
        p.x = p.x.to(memory_format=torch.channels_last)[:, :, 1:]
    assert_correct(p, p.run())


@both_layouts
@pytest.mark.parametrize("activation", ["relu6", "hardswish"])
def test_inf_and_nan_are_where_native_has_them(activation, channels_last):
    p = dense(
        (1, 20, 6, 6), 18, (3, 3), padding=1, activation=activation, channels_last=channels_last
    )
    for value, (c, h, w) in zip(
        (float("nan"), float("inf"), -float("inf")), [(2, 0, 0), (4, 2, 4), (7, 5, 0)], strict=True
    ):
        p.x[0, c, h, w] = value
    ours, native = p.run(), p.run("native")
    assert torch.equal(ours.isnan(), native.isnan())
    assert ours.isnan().any() and not ours.isnan().all()
    torch.testing.assert_close(ours, native, equal_nan=True)


def test_gradients_are_natives():
    p = dense((1, 6, 5, 6), 7, (3, 3), stride=2, padding="same", activation="silu")
    results = []
    for backend in ("triton", "native"):
        leaves = [t.detach().clone().requires_grad_() for t in p.tensors]
        y = Dense(*leaves, p.constants).run(backend)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        plain = torch.autograd.grad(Dense(*leaves, p.constants).run(backend).sum(), leaves[:2])
        results.append((*first, *second, *plain))
    for ours, native in zip(*results, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-5 * native.abs().max().item())


@both_layouts
def test_opcheck_and_an_empty_batch(channels_last):
    p = dense((2, 5, 4, 5), 6, (3, 2), stride=2, padding=1, channels_last=channels_last)
    call = torch.ops.mnet_kernels.conv_bn_act_triton.default
    opcheck(call, (*p.tensors, *p.positional()))
    for t in p.tensors:
        t.requires_grad_()
    opcheck(call, (*p.tensors, *p.positional()), test_utils=("test_autograd_registration",))
    assert dense((0, 5, 4, 5), 6, stride=2).run().shape == (0, 6, 2, 3)


def test_compile_and_export():
    from mnet_kernels.triton.operators import conv_bn_act

    p = dense((2, 3, 9, 9), 8, (3, 3), stride=2, padding="same")

    class Stem(torch.nn.Module):
        def forward(self, x):
            return conv_bn_act(x * 2, *p.tensors[1:], *p.positional()).mean((2, 3))

    compiled = torch.compile(Stem(), fullgraph=True, dynamic=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Stem(), (p.x,), dynamic_shapes=({0: batch},))
    assert any("conv_bn_act_triton" in str(node.target) for node in program.graph.nodes)
    for images in (2, 3):
        x = torch.randn(images, 3, 9, 9)
        for call in (compiled, program.module()):
            torch.testing.assert_close(call(x), Stem()(x))


def test_autocast_and_vmap():
    p = dense((2, 5, 4, 6), 6, (3, 3), padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = p.run()
    assert torch.equal(y, Dense(p.x.bfloat16(), p.weight.bfloat16(), *p.tensors[2:],
                                p.constants).run())  # fmt: skip
    xs = torch.stack([p.x, p.x + 1])
    mapped = torch.vmap(lambda x: p.run(x=x))(xs)
    torch.testing.assert_close(mapped[1], p.run(x=xs[1]), rtol=0, atol=8 * ROUNDING[torch.float32])


@pytest.mark.parametrize(
    "change,sentence",
    [
        (dict(weight=torch.zeros(6, 5, 1, 1)), r"weight: expected shape \(C_out, 4, Kh, Kw\)"),
        (dict(weight=torch.zeros(6, 4, 1, 1).half()), r"weight: expected x's dtype float32"),
        (dict(scale=torch.ones(4)), r"scale: expected shape \(6,\)"),
        (dict(shift=torch.ones(6).double()), r"shift: expected float32"),
        (dict(constants={"padding": -1}), r"padding: expected non-negative"),
        (dict(constants={"stride": 0}), r"stride: expected positive"),
        (dict(constants={"activation": "gelu"}), r"activation: expected one of identity"),
        (dict(x=torch.zeros(1, 4, 0, 5)), r"x: expected a padded size"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_input(change, sentence):
    p = dense((1, 4, 5, 5), 6)
    for name, value in change.items():
        setattr(p, name, value)
    with pytest.raises(RuntimeError, match="^conv_bn_act: " + sentence):
        p.run()
