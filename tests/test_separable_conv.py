"""separable_conv against float64 on every instruction set; inside torch."""

from __future__ import annotations

import pytest
import rulers
import torch
from rulers import ROUNDING, problem
from torch import Tensor
from torch.library import opcheck

from mnet_kernels import SeparableConv, backends, ops, separable_conv
from mnet_kernels.reference import ACTIVATIONS
from mnet_kernels.separable import why_composed

pytestmark = pytest.mark.usefixtures("poisoned_memory")

operator = torch.ops.mnet_kernels.separable_conv.default
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class Block:
    """A call of separable_conv: its tensors in the operator's order, and its constants."""

    def __init__(
        self, shape, outputs, kernel=3, *, multiplier=1, dtype=torch.float32, channels_last=True,
        residual=False, **constants,
    ) -> None:  # fmt: skip
        depthwise = {k: v for k, v in constants.items() if k in ("stride", "padding", "dilation")}
        self.depthwise = problem(
            shape, (kernel, kernel), multiplier=multiplier, dtype=dtype,
            channels_last=channels_last, **depthwise,
            activation=constants.get("dw_activation", "relu"), slope=constants.get("slope", 0.01),
        )  # fmt: skip
        self.constants = constants
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inner = shape[1] * multiplier
        weight = torch.randn(outputs, inner, 1, 1, dtype=torch.float64).to(dtype)
        scale, shift = torch.rand(outputs, dtype=wide) + 0.5, torch.randn(outputs, dtype=wide)
        self.tensors = [*self.depthwise.tensors, weight, scale, shift, None]
        if residual:
            size = self.run("native").shape
            self.tensors[7] = torch.randn(size, dtype=torch.float64).to(dtype)

    def run(self, backend=rulers.BACKEND, tensors=None, **changes) -> Tensor:
        *tensors, residual = self.tensors if tensors is None else tensors
        return separable_conv(
            *tensors, residual=residual, **self.constants, **changes, backend=backend
        )

    def arguments(self) -> tuple:
        c = {"padding": 0, **self.constants}
        padding = () if c["padding"] == "same" else c["padding"]
        return (
            *self.tensors, c.get("stride", 1), padding, c.get("dilation", 1),
            c.get("dw_activation", "relu"), c.get("pw_activation", "relu"), c.get("slope", 0.01),
        )  # fmt: skip

    def exact(self) -> Tensor:
        return self.run("native", [t if t is None else t.double() for t in self.tensors])

    def assert_correct(self, y: Tensor) -> None:
        """The depthwise half's own tolerance goes through the product, whose sum of n terms in
        pieces of 128 has at most 128 + n / 128 roundings; then two to the dtype."""
        exact = self.exact()
        assert y.shape == exact.shape
        assert y.dtype == self.tensors[0].dtype
        middle, magnitude = rulers.reference(self.depthwise)
        middle_error = rulers.tolerance(self.depthwise, middle, magnitude)
        *_, weight, scale, shift, residual = (t if t is None else t.double() for t in self.tensors)
        each = (-1, 1, 1)

        def product(t: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(t, weight.abs()) * scale.abs().view(each)

        terms = weight.shape[1]
        sums = (min(terms, 128 + terms / 128) + 8) * ROUNDING[
            torch.float64 if y.dtype == torch.float64 else torch.float32
        ]
        error = product(middle_error)
        error = error + sums * (product(middle.abs() + middle_error) + shift.abs().view(each))
        error = 1.5 * error  # no activation is steeper
        added = 0 if residual is None else residual.abs()
        error = error + 2 * ROUNDING[y.dtype] * (exact.abs() + added + error) + 1e-300
        wrong = ~((y.double() - exact).abs() <= error)
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements are off"


# (N, C, H, W), K, kernel, constants: channels at every side of a vector, a panel and a dot
# product's pair; planes of one band and of many; a leading dimension that collides in the cache.
CASES = [
    ((2, 16, 9, 11), 24, 3, {"padding": 1}),
    ((1, 3, 33, 31), 8, 3, {"padding": "same", "stride": 2}),
    ((3, 33, 14, 13), 31, 3, {"padding": 1, "residual": False, "dw_activation": "silu"}),
    ((1, 48, 40, 28), 65, 3, {"padding": (0, 0, 1, 1), "stride": 2, "dw_activation": "relu6"}),
    ((2, 40, 17, 16), 40, 3, {"padding": 1, "residual": True, "pw_activation": "identity"}),
    ((1, 7, 30, 57), 20, 5, {"padding": 2, "multiplier": 2, "pw_activation": "hardswish"}),
    ((2, 32, 15, 15), 33, 5, {"padding": "same", "stride": 2, "pw_activation": "relu6"}),
    ((1, 17, 12, 12), 5, 7, {"padding": (3, 1), "dilation": (1, 2), "residual": True}),
    ((1, 9, 1, 1), 4, 1, {"dw_activation": "leaky_relu", "slope": 0.3}),
    ((1, 1024, 7, 7), 34, 3, {"padding": 1, "dw_activation": "identity"}),
]


@pytest.mark.parametrize("shape,outputs,kernel,constants", CASES, ids=str)
@both_dtypes
def test_against_float64(instruction_set, shape, outputs, kernel, constants, dtype):
    block = Block(shape, outputs, kernel, dtype=dtype, **constants)
    y = block.run()
    block.assert_correct(y)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.set_num_threads(3)
    assert torch.equal(block.run(), y)  # whoever takes which band


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(instruction_set, activation):
    constants = {"dw_activation": activation, "pw_activation": activation, "slope": 0.2}
    block = Block((1, 20, 9, 10), 36, padding=1, **constants)
    block.assert_correct(block.run())


@pytest.mark.parametrize("dtype", rulers.DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_dtype_and_layout(dtype, channels_last, residual):
    block = Block(
        (2, 18, 9, 8), 21, dtype=dtype, channels_last=channels_last, residual=residual, padding=1
    )
    y = block.run()
    exact = block.exact()
    native = (block.run("native").double() - exact).abs()
    assert (y.double() - exact).abs().mean() <= native.mean() * 1.01 + 1e-15
    if dtype in (torch.float32, torch.bfloat16):
        block.assert_correct(y)
        assert y.is_contiguous() is not channels_last
    fused = dtype == torch.float32 or (dtype == torch.bfloat16 and ops.packs(dtype))
    assert (why_composed("cpu", dtype) is None) == fused


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [0, 1, 2, 5])
def test_threads_and_batches(batch, threads):
    torch.set_num_threads(threads)
    block = Block((batch, 24, 20, 21), 40, padding=1, residual=True, stride=1)
    y = block.run()
    if batch:
        block.assert_correct(y)
    assert y.shape == (batch, 40, 20, 21)


def test_one_hot_inputs_find_every_index_error(instruction_set):
    """Whole numbers, exact in float32: no tolerance."""
    for c, h, w in [(0, 0, 0), (16, 6, 8), (5, 3, 8)]:
        block = Block((1, 17, 7, 9), 40, padding=1, dw_activation="identity", stride=2)
        block.tensors[1] = (torch.arange(17 * 9) + 1.0).reshape(17, 1, 3, 3)
        block.tensors[4] = (torch.arange(40 * 17) % 64 + 1.0).reshape(40, 17, 1, 1)
        block.tensors[0] = torch.zeros(1, 17, 7, 9).to(memory_format=torch.channels_last)
        block.tensors[0][0, c, h, w] = 1
        for i in (2, 3, 5, 6):
            block.tensors[i] = None
        assert torch.equal(block.run(), block.run("native"))


def test_other_strides():
    block = Block((2, 12, 9, 9), 20, padding=1, residual=True)
    expected = block.run()
    for i in range(8):
        t = block.tensors[i]
        wide = torch.full([2 * n for n in t.shape], float("nan"))
        block.tensors[i] = wide[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)
    torch.testing.assert_close(block.run(), expected, rtol=0, atol=0)


# ---- bad input ---------------------------------------------------------------------------------

X, PW = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 1, 1)
BAD = [
    (dict(x=X[0]), r"x: expected 4 dimensions \(N, C, H, W\), got shape \(4, 8, 8\)"),
    (dict(dw_weight=torch.ones(4, 3, 3)), r"dw_weight: expected 4 dimensions .*\(4, 3, 3\)"),
    (dict(dw_weight=torch.ones(6, 1, 3, 3)), r"dw_weight: expected shape \(4\*M, 1, Kh, Kw\)"),
    (dict(dw_weight=torch.ones(4, 1, 3, 3).double()), r"dw_weight: expected x's dtype float32"),
    (dict(dw_scale=torch.ones(3)), r"dw_scale: expected shape \(4,\), .*\(3,\)"),
    (dict(dw_shift=torch.ones(4).half()), r"dw_shift: expected float32 .*, got float16"),
    (dict(pw_weight=PW[:, :3]), r"pw_weight: expected shape \(K, 4, 1, 1\) .*\(6, 3, 1, 1\)"),
    (dict(pw_weight=PW[..., 0]), r"pw_weight: expected shape \(K, 4, 1, 1\) .*\(6, 4, 1\)"),
    (dict(pw_weight=torch.ones(6, 4, 3, 3)), r"pw_weight: expected shape .*\(6, 4, 3, 3\)"),
    (dict(pw_weight=PW[:0]), r"pw_weight: expected shape .*\(0, 4, 1, 1\)"),
    (dict(pw_weight=PW.double()), r"pw_weight: expected x's dtype float32, got float64"),
    (dict(pw_scale=torch.ones(4)), r"pw_scale: expected shape \(6,\), .*\(4,\)"),
    (dict(pw_shift=torch.ones(6).double()), r"pw_shift: expected float32 .*, got float64"),
    (dict(residual=X), r"residual: expected the result's shape \(2, 6, 8, 8\), got .*\(2, 4, 8"),
    (dict(residual=X[0]), r"residual: expected the result's shape .*\(4, 8, 8\)"),
    (dict(residual=torch.ones(2, 6, 8, 8).double()), r"residual: expected x's dtype float32, got"),
    (dict(stride=0), r"stride: expected positive, got \(0, 0\)"),
    (dict(padding=-1), r"padding: expected non-negative"),
    (dict(dilation=9), r"x: expected a padded size of at least 19 x 19"),
    (dict(dw_activation="gelu"), r"dw_activation: expected one of identity, .*'gelu'"),
    (dict(pw_activation="tanh"), r"pw_activation: expected one of identity, .*'tanh'"),
    (dict(slope=float("nan")), r"slope: expected a finite number, got nan"),
]
SERVING = [name for name in backends.NAMES if backends.why_not(name) is None]


@pytest.mark.parametrize("backend", [None, *SERVING])
@pytest.mark.parametrize("change,sentence", BAD, ids=[sentence[:28] for _, sentence in BAD])
def test_bad_input(backend, change, sentence):
    call = dict(
        x=X, dw_weight=torch.ones(4, 1, 3, 3), dw_scale=torch.ones(4), dw_shift=torch.ones(4),
        pw_weight=PW, pw_scale=torch.ones(6), pw_shift=torch.ones(6), padding=1,
    ) | change  # fmt: skip
    with pytest.raises(RuntimeError, match="^separable_conv: " + sentence):
        separable_conv(**call, backend=backend)


def test_backends_and_types():
    block = Block((1, 4, 5, 5), 6)
    with pytest.raises(RuntimeError, match="separable_conv: backend: expected one that can serve"):
        block.run("tpu")
    with pytest.raises(TypeError, match="separable_conv: x: expected a Tensor, got str"):
        separable_conv("image", *block.tensors[1:7])
    for i, name in [(1, "dw_weight"), (4, "pw_weight"), (6, "pw_shift")]:
        tensors = list(block.tensors)
        tensors[i] = tensors[i].to("meta")
        for backend in (None, *SERVING):
            with pytest.raises(RuntimeError, match=f"separable_conv: {name}: expected x's device"):
                block.run(backend, tensors)


@pytest.mark.parametrize("activation", ["gelu", None])
def test_bad_modules(activation):
    with pytest.raises(ValueError, match="SeparableConv: pw_activation: expected one of"):
        SeparableConv(4, 6, pw_activation=activation)
    with pytest.raises(ValueError, match="SeparableConv: residual: expected out_channels"):
        SeparableConv(4, 6, residual=True)
    with pytest.raises(ValueError, match='SeparableConv: padding: expected "same"'):
        SeparableConv(4, 6, padding="valid")
    with pytest.raises(ValueError, match="SeparableConv: backend: expected one of"):
        SeparableConv(4, 6, backend="tpu")


# ---- inside torch ------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(channels_last, grad):
    first = {"residual": True, "padding": 1}
    second = {"stride": 2, "padding": "same", "multiplier": 2, "pw_activation": "hardswish"}
    block = Block((2, 6, 9, 8), 10, channels_last=channels_last, **(first if grad else second))
    for t in block.tensors:
        if t is not None and grad:
            t.requires_grad_()
    opcheck(operator, block.arguments())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compile_fullgraph_with_a_dynamic_batch(dtype):
    block = Block((2, 8, 12, 12), 10, dtype=dtype, stride=2, padding="same")

    def model(x):
        return block.run(tensors=[x * 2, *block.tensors[1:]]).mean((2, 3))

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, size in [(2, 12), (5, 12), (3, 9)]:
        x = torch.randn(batch, 8, size, size, dtype=dtype).to(memory_format=torch.channels_last)
        torch.testing.assert_close(compiled(x), model(x))


def test_compile_trains_through_it():
    block = Block((2, 6, 7, 7), 5, padding=1, dw_activation="silu", pw_activation="hardswish")

    def loss(w, backend=None):
        tensors = list(block.tensors)
        tensors[1] = w
        return block.run(backend, tensors).square().sum()

    weight = block.tensors[1].requires_grad_()
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")(weight)
    (compiled,) = torch.autograd.grad(compiled_loss, weight)
    (native,) = torch.autograd.grad(loss(weight, "native"), weight)
    torch.testing.assert_close(compiled, native, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    block = Block(
        (1, 2, 4, 5), 3, dtype=torch.float64, multiplier=2, residual=True, padding=(0, 1, 2, 1),
        dw_activation=activation, pw_activation=activation, slope=0.2,
    )  # fmt: skip
    inputs = tuple(t.detach().clone().requires_grad_() for t in block.tensors)

    def call(*tensors):
        return block.run(tensors=tensors)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    if activation != "hardsigmoid":  # torch's own has no second derivative
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@both_dtypes
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_are_as_good_as_natives(dtype, residual):
    block = Block((2, 8, 9, 9), 12, dtype=dtype, residual=residual, padding=1, pw_activation="silu")
    dy = torch.randn(2, 12, 9, 9).to(dtype)

    def gradients(backend, dtype=None):
        tensors = [
            t if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
            for t in block.tensors
        ]
        y = block.run(backend, tensors)
        return torch.autograd.grad(y, [t for t in tensors if t is not None], dy.to(y.dtype))

    exact = gradients("native", torch.float64)
    for ours, native, right in zip(gradients(None), gradients("native"), exact, strict=True):
        assert ours.dtype == native.dtype
        error, allowed = ((g.double() - right).abs().mean() for g in (ours, native))
        assert error <= 1.2 * allowed + 1e-7 * right.abs().mean()


def test_second_derivatives_of_the_operator():
    block = Block((1, 3, 5, 5), 4, padding=1, dw_activation="silu", pw_activation="silu")
    results = []
    for backend in (None, "native"):
        x = block.tensors[0].detach().requires_grad_()
        (dx,) = torch.autograd.grad(
            block.run(backend, [x, *block.tensors[1:]]).sum(), x, create_graph=True
        )
        results.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_autocast():
    block = Block((2, 8, 9, 9), 12, padding=1, residual=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block.run()
    assert y.dtype == torch.bfloat16
    narrow = [t.bfloat16() if i in (0, 1, 4, 7) else t for i, t in enumerate(block.tensors)]
    assert torch.equal(y, block.run(tensors=narrow))


@pytest.mark.parametrize("over", ["images", "residual too", "weight"])
def test_vmap(over):
    block = Block((2, 4, 6, 6), 5, padding=1, residual=True)
    dims = {"images": (0,), "residual too": (0, 7), "weight": (4,)}[over]
    stacks = [torch.stack([block.tensors[i], 2 * block.tensors[i] - 1]) for i in dims]

    def call(*given):
        tensors = list(block.tensors)
        for i, t in zip(dims, given, strict=True):
            tensors[i] = t
        return block.run(tensors=tensors)

    rows = [call(*(s[i] for s in stacks)) for i in range(2)]
    torch.testing.assert_close(torch.vmap(call)(*stacks), torch.stack(rows))
