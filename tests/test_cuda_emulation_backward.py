"""The CUDA backward without a GPU: its kernels compiled for the CPU and run (tests/emulation),
against float64 autograd of the reference, and again under sanitizers."""

from __future__ import annotations

import pytest
import torch
from emulation import dwconv_backward
from emulation.emulator import EmulationError, emulator
from gradient_rulers import assert_gradients, gradients
from rulers import Problem, problem
from test_cuda_emulation import under_sanitizers
from torch import Tensor
from torch.library import opcheck

from mnet_kernels import ops, registration
from mnet_kernels.reference import ACTIVATIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
FAST_PATHS = [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)]


def gradient_of_output(p: Problem) -> Tensor:
    y = p.run("native")
    layout = torch.contiguous_format if p.x.is_contiguous() else torch.channels_last
    return torch.randn(y.shape).to(y.dtype).to(memory_format=layout)


def variants(p: Problem, dy: Tensor, offset: int = 0) -> list[str]:
    """Each variant of the first and of the third step that can run, in as few pairs as do."""
    able = dwconv_backward.able(emulator(), p, dy, offset)
    whole = [v for v in able if len(set(v.split(","))) == 1 and "general" not in v]
    pairs = [v.split(",") for v in able if v not in whole]
    first, data = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    most = max(len(first), len(data))
    return whole + [f"{first[i % len(first)]},{data[i % len(data)]}" for i in range(most)]


def check(p: Problem, sanitizer: str = "", offset: int = 0) -> None:
    """Every variant that can run this problem computes its gradients, twice the same bits, and
    writes each output once."""
    program, dy = emulator(sanitizer), gradient_of_output(p)
    for variant in variants(p, dy, offset):
        try:
            found, answer = dwconv_backward.run(
                program, p, dy, variant, count=not sanitizer, offset=offset
            )
            assert_gradients(p, dy, found)
        except (AssertionError, EmulationError) as error:
            raise AssertionError(f"{variant}: {error}") from error
        if not sanitizer:
            assert "outside" not in answer.traffic, f"{variant}: {answer.traffic}"
            for name, t in zip(("dx", "dweight", "dscale", "dshift"), found, strict=True):
                assert answer.traffic[name]["bytes"] == t.nbytes, (variant, name)


@every_dtype
@both_layouts
@pytest.mark.parametrize("kernel,stride", FAST_PATHS)
def test_fast_paths(dtype, channels_last, kernel, stride):
    for size in ((1, 1), (2, 9), (7, 7), (8, 13)):
        check(
            problem(
                (2, 12, *size), (kernel, kernel), dtype=dtype, channels_last=channels_last,
                stride=stride, padding=kernel // 2, activation="relu6",
            )
        )  # fmt: skip


@every_dtype
@both_layouts
@pytest.mark.parametrize("channels", (1, 3, 8, 20, 34, 40))
def test_channels_at_every_side_of_a_vector_and_of_a_warp(dtype, channels_last, channels):
    for stride in (1, 2):
        check(
            problem(
                (2, channels, 6, 5), dtype=dtype, channels_last=channels_last, stride=stride,
                padding=1,
            )
        )  # fmt: skip


@every_dtype
@both_layouts
@pytest.mark.parametrize("padding", [0, (2, 0, 1, 3), "same", 6], ids=str)
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 2)])
def test_padding(dtype, channels_last, kernel, stride, padding):
    check(
        problem(
            (1, 8, 9, 10), (kernel, kernel), dtype=dtype, channels_last=channels_last,
            stride=stride, padding=padding,
        )
    )  # fmt: skip


@every_dtype
@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(dtype, channels_last, activation):
    p = problem(
        (1, 8, 6, 7), dtype=dtype, channels_last=channels_last, padding=1, activation=activation,
        slope=0.2,
    )  # fmt: skip
    p.shift *= 4  # reach all branches
    check(p)


@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_knees_and_infinities_are_natives(channels_last, activation):
    """z = x at the knees themselves, beside them, and where it overflows."""
    values = torch.tensor([0.0, -0.0, 6.0, 3.0, -3.0, 2.999, -2.999, 100.0, -100.0, 1e30])
    x = values.repeat(8).reshape(1, 8, 2, 5)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight = torch.zeros(8, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    p = Problem(x, weight, torch.ones(8), torch.zeros(8), {"activation": activation, "padding": 1})
    dy = torch.ones_like(x)
    for variant in variants(p, dy):
        found, _ = dwconv_backward.run(emulator(), p, dy, variant)
        dx = gradients(p, dy, "native")[0]
        finite = dx.isfinite()  # native's silu is inf * 0 for a large z
        torch.testing.assert_close(found.dx[finite], dx[finite], rtol=1e-6, atol=1e-30)


ANY = [
    ((1, 1), {}),
    ((2, 3), {"padding": (1, 2)}),
    ((4, 4), {"stride": 4}),
    ((3, 3), {"stride": 3, "padding": 1}),
    ((3, 3), {"stride": (1, 2), "padding": (2, 0)}),
    ((3, 3), {"dilation": 2, "padding": 2}),
    ((3, 5), {"dilation": (3, 2), "padding": (3, 4), "stride": (2, 3)}),
    ((11, 1), {"padding": (5, 0)}),
]


@every_dtype
@both_layouts
@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_any_kernel_stride_dilation_multiplier(dtype, channels_last, kernel, constants):
    for multiplier in (1, 3):
        check(
            problem(
                (2, 5, 11, 12), kernel, multiplier=multiplier, dtype=dtype,
                channels_last=channels_last, **constants,
            )
        )  # fmt: skip


@both_layouts
@pytest.mark.parametrize("kernel,stride", FAST_PATHS)
def test_one_hot_gradients_find_every_index_error(channels_last, kernel, stride):
    """One output's gradient is 1, weights are distinct integers: dx is exact."""
    c, h, w = 8, 10, 9
    weight = torch.arange(1.0, c * kernel * kernel + 1).reshape(c, 1, kernel, kernel)
    x = torch.randint(1, 9, (1, c, h, w)).float()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    p = Problem(x, weight, None, None, {
        "stride": stride, "padding": kernel // 2, "activation": "identity"
    })  # fmt: skip
    y = p.run("native")
    for at in [(0, 0), (y.shape[2] - 1, y.shape[3] - 1), (1, y.shape[3] - 1), (2, 3)]:
        dy = torch.zeros_like(y)
        dy[0, :, at[0], at[1]] = 1
        dx, dweight, *_ = gradients(p, dy, "native")
        for variant in variants(p, dy):
            found, _ = dwconv_backward.run(emulator(), p, dy, variant)
            assert torch.equal(found.dx, dx), variant
            assert torch.equal(found.dweight, dweight), variant


@both_layouts
def test_without_affine_and_in_parts(channels_last):
    """What is not asked for is not written, and what is does not change."""
    for affine, stride in ((False, 1), (True, 2)):
        p = problem(
            (2, 8, 7, 9), channels_last=channels_last, affine=affine, padding=1, stride=stride
        )
        dy = gradient_of_output(p)
        for variant in variants(p, dy):
            whole, _ = dwconv_backward.run(emulator(), p, dy, variant)
            assert_gradients(p, dy, whole)
            data, _ = dwconv_backward.run(emulator(), p, dy, variant, sums=False)
            sums, _ = dwconv_backward.run(emulator(), p, dy, variant, data=False)
            assert torch.equal(data.dx, whole.dx)
            for name in ("dweight", "dscale", "dshift"):
                assert torch.equal(getattr(sums, name), getattr(whole, name)), name


@both_layouts
@pytest.mark.parametrize("stride", [1, 2])
def test_many_chunks_add_up_and_twice_to_the_same_bits(channels_last, stride):
    p = problem((5, 8, 40, 36), channels_last=channels_last, padding=1, stride=stride)
    dy = gradient_of_output(p)
    for variant in variants(p, dy):
        found, _ = dwconv_backward.run(emulator(), p, dy, variant)
        assert_gradients(p, dy, found)
        again, _ = dwconv_backward.run(emulator(), p, dy, variant)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@every_dtype
@both_layouts
@pytest.mark.parametrize("offset", [2, 4, 8, 18])
def test_misaligned_slices(dtype, channels_last, offset):
    if offset % dtype.itemsize:
        pytest.skip("not where an element can lie")
    for stride in (1, 2):
        p = problem(
            (1, 16, 8, 8), dtype=dtype, channels_last=channels_last, stride=stride, padding=1
        )
        check(p, offset=offset)


@every_dtype
@both_layouts
@pytest.mark.parametrize("activation", ["relu6", "silu"])
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 2)])
def test_no_worse_than_native(dtype, channels_last, activation, kernel, stride):
    """Against float64, in the norm; native rounds z, dz and dconv to the dtype."""
    p = problem(
        (2, 16, 13, 13), (kernel, kernel), dtype=dtype, channels_last=channels_last,
        padding="same", stride=stride, activation=activation,
    )  # fmt: skip
    dy = gradient_of_output(p)
    wide = [t.double() for t in p.tensors]
    exact = gradients(Problem(*wide, p.constants), dy.double(), "native")
    native = gradients(p, dy, "native")
    found, answer = dwconv_backward.run(emulator(), p, dy, "auto")
    for name, mine, theirs, right in zip(
        ("dx", "dweight", "dscale", "dshift"), found, native, exact, strict=True
    ):
        ours, other = ((t.double() - right).norm() / right.norm() for t in (mine, theirs))
        # Where both sum in float32, the order of the terms decides.
        assert ours <= 1.1 * other + 2e-7, (name, answer.text, ours, other)


# The operator inside autograd: its kernels here are the emulated ones.


@pytest.fixture
def emulated_operator(monkeypatch):
    """CPU tensors take the fused backward; yields the list of (data, sums) that it was asked."""
    asked = []

    def backward(
        dy, x, weight, scale, shift, stride, padding, dilation, activation, slope, data, sums
    ):
        asked.append((data, sums))
        layout = registration.layout_of(x)
        constants = {
            "stride": stride, "padding": padding or "same", "dilation": dilation,
            "activation": activation, "slope": slope,
        }  # fmt: skip
        p = Problem(x.contiguous(memory_format=layout), weight, scale, shift, constants)
        dy = dy.contiguous(memory_format=layout)
        found, _ = dwconv_backward.run(emulator(), p, dy, data=data, sums=sums)
        none = (x.new_empty(0), x.new_empty(0), torch.empty(0), torch.empty(0))
        return tuple(t if t is not None else n for t, n in zip(found, none, strict=True))

    monkeypatch.setattr(ops, "_has_fused_backward", lambda x: True)
    with torch.library._scoped_library("mnet_kernels", "IMPL") as library:
        library.impl("dwconv_bn_act_backward", backward, "CPU")
        yield asked


@both_layouts
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("constants", [
    {"padding": 1}, {"stride": 2, "padding": "same"}, {"padding": (0, 1), "stride": (2, 1)},
], ids=str)  # fmt: skip
def test_autograd_takes_the_operator(emulated_operator, channels_last, affine, constants):
    p = problem((2, 8, 7, 9), channels_last=channels_last, affine=affine, **constants)
    dy = torch.randn_like(p.run("native"))
    assert_gradients(p, dy, gradients(p, dy))
    assert emulated_operator == [(True, True)]
    y = ops.dwconv_bn_act(*(None if t is None else t.requires_grad_() for t in p.tensors),
                          **p.constants)  # fmt: skip
    y.sum().backward()  # a gradient that is one number, expanded
    assert_gradients(p, torch.ones_like(y), [t if t is None else t.grad for t in p.tensors])
    assert p.x.grad.stride() == p.x.stride()


@pytest.mark.parametrize("needed", [0, 1, 2, 3])
def test_only_what_is_needed_is_computed(emulated_operator, needed):
    p = problem((2, 8, 7, 9), padding=1)
    dy = torch.randn_like(p.run("native"))
    p.tensors[needed].requires_grad_()
    p.run().backward(dy)
    assert [t.grad is not None for t in p.tensors] == [i == needed for i in range(4)]
    assert_gradients(p, dy, [t.grad for t in p.tensors])
    assert emulated_operator == [(needed == 0, needed != 0)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_are_plain_pytorchs(emulated_operator, activation):
    p = problem((1, 4, 5, 6), padding=1, activation=activation, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in p.tensors]
    assert torch.autograd.gradgradcheck(
        lambda *t: ops.dwconv_bn_act(*t, **p.constants), inputs, nondet_tol=0
    )
    assert emulated_operator == []


@both_layouts
def test_the_operator_and_its_fake(emulated_operator, channels_last):
    p = problem((2, 8, 7, 9), channels_last=channels_last, stride=2, padding=1)
    dy = torch.randn_like(p.run("native"))
    for wanted in ((True, True), (True, False), (False, True)):
        opcheck(
            torch.ops.mnet_kernels.dwconv_bn_act_backward.default,
            (dy, *p.tensors, [2, 2], [1, 1], [1, 1], "relu6", 0.0, *wanted),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiled(emulated_operator):
    p = problem((2, 8, 7, 9), padding=1)
    inputs = [t.clone().requires_grad_() for t in p.tensors]
    call = torch.compile(
        lambda *t: ops.dwconv_bn_act(*t, padding=1), backend="aot_eager", fullgraph=True
    )
    y = call(*inputs)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert emulated_operator == [(True, True)]
    assert_gradients(p, dy, [t.grad for t in inputs])


# Under the sanitizers: out-of-bounds and misaligned accesses, undefined arithmetic; races.


@under_sanitizers
def test_under_a_sanitizer(sanitizer, path, channels_last, dtype):
    kernel, stride = path
    for size in [(1, 1), (5, 6)] if sanitizer == "address" else [(5, 6)]:
        for channels in (3, 16) if sanitizer == "address" else (16,):
            p = problem(
                (2, channels, *size), (kernel, kernel), dtype=dtype, channels_last=channels_last,
                stride=stride, padding=kernel // 2,
            )  # fmt: skip
            check(p, sanitizer)


@both_layouts
@pytest.mark.parametrize("kernel,constants", ANY, ids=str)
def test_the_general_kernels_under_address_sanitizer(channels_last, kernel, constants):
    p = problem((2, 3, 11, 12), kernel, multiplier=2, channels_last=channels_last, **constants)
    check(p, "address")
