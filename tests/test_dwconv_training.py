"""dwconv_bn_act_training, forward and backward, against float64 autograd of the reference."""

from __future__ import annotations

import re

import pytest
import rulers
import torch
from torch import nn
from torch.library import opcheck
from training_rulers import NAMES, assert_correct, forward, problem, run

from mnet_kernels import backends, dwconv_bn_act_training
from mnet_kernels import dwconv_training as module
from mnet_kernels.reference import ACTIVATIONS

DTYPES = rulers.DTYPES
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
poisoned = pytest.mark.usefixtures("poisoned_memory")


@poisoned
@every_dtype
@both_layouts
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_fast_paths(instruction_set, dtype, channels_last, kernel, stride):
    """Planes of one pixel and less than a tile up to several; channels below, at and above a
    vector."""
    for channels, size in [(3, (1, 2)), (16, (7, 7)), (19, (6, 16)), (36, (13, 5))]:
        p = problem(
            (2, channels, *size), (kernel, kernel), dtype=dtype, channels_last=channels_last,
            stride=stride, padding=kernel // 2, activation="relu6",
        )  # fmt: skip
        assert_correct(p, run(p))


@poisoned
@both_layouts
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize(
    "kernel,constants",
    [
        ((1, 1), {"stride": 2}),
        ((2, 3), {"padding": (1, 2)}),
        ((4, 4), {"stride": 4}),
        ((3, 3), {"stride": (1, 2), "padding": (2, 0)}),
        ((3, 5), {"dilation": (3, 2), "padding": (3, 4), "stride": (2, 3)}),
        ((3, 3), {"padding": (3, 0, 1, 2)}),
        ((3, 3), {"stride": 2, "padding": (0, 0, 1, 1)}),
        ((3, 3), {"stride": 2}),
        ((3, 3), {"stride": 2, "padding": (5, 3, 0, 4)}),
        ((5, 5), {"stride": 2, "padding": "same"}),
        ((7, 7), {"padding": 3}),
        ((1, 11), {"padding": (0, 5)}),
        ((8, 8), {"padding": 4, "stride": (1, 3)}),
        ((2, 2), {"stride": 5, "padding": 1}),
    ],
    ids=str,
)
def test_any_kernel_stride_dilation_padding(channels_last, multiplier, kernel, constants):
    p = problem(
        (2, 17, 9, 8), kernel, multiplier=multiplier, channels_last=channels_last, **constants
    )
    assert_correct(p, run(p))


@poisoned
@both_layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(instruction_set, channels_last, activation):
    for kernel in (3, 2):  # contiguous: by rows, by planes
        p = problem(
            (2, 17, 5, 9), (kernel, kernel), channels_last=channels_last, padding=1,
            activation=activation, slope=0.2,
        )  # fmt: skip
        p.gamma.mul_(3)  # reach all branches
        assert_correct(p, run(p))


@poisoned
@both_layouts
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_rows_and_columns_of_every_phase(channels_last, kernel, stride):
    """Whole vectors of channels; every position of the first input pixel among the taps."""
    for first in range(kernel):
        p = problem(
            (3, 32, 9 + first, 14 - first), (kernel, kernel), channels_last=channels_last,
            stride=stride, padding=(first, kernel - 1 - first, 1, first),
        )  # fmt: skip
        assert_correct(p, run(p))


@poisoned
@both_layouts
@pytest.mark.parametrize("shape", [(3, 17, 40, 37), (1, 16, 70, 33), (70, 8, 4, 5)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_many_blocks_of_pixels(channels_last, shape, threads):
    torch.set_num_threads(threads)
    p = problem(shape, channels_last=channels_last, padding=1)
    assert_correct(p, run(p))


@poisoned
@pytest.mark.parametrize(
    "kernel,constants",
    [
        ((7, 7), {"padding": 3}),
        ((3, 3), {"dilation": (2, 4), "padding": (2, 4)}),
        ((5, 2), {"stride": (1, 3), "dilation": (3, 2), "padding": (0, 7, 5, 1)}),
        ((1, 1), {}),
        ((9, 1), {"stride": (3, 2), "padding": (4, 0)}),
        ((33, 1), {"padding": (16, 0)}),  # by planes
    ],
    ids=str,
)
def test_general_rows_in_many_blocks(instruction_set, kernel, constants):
    """Several bands of an image, several chunks of channels, the last vector not whole."""
    for shape, dtype in (((2, 67, 43, 31), torch.float32), ((3, 35, 36, 40), torch.bfloat16)):
        p = problem(shape, kernel, dtype=dtype, channels_last=True, activation="relu6", **constants)
        assert_correct(p, run(p))


@both_layouts
@pytest.mark.parametrize("kernel", [3, 2])
def test_small_spread_about_a_large_mean(channels_last, kernel):
    """Sums of squares would lose everything. No worse than native, of which each step rounds."""
    p = problem(
        (4, 16, 20, 21), (kernel, kernel), channels_last=channels_last, mean=1e3, std=1e-2,
        activation="identity",
    )  # fmt: skip
    p.weight.abs_()
    exact, ours, native = run(p.wide(), "native"), run(p), run(p, "native")
    assert_correct(p, ours)
    for name in ("y", "running_mean", "running_var"):
        right = getattr(exact, name)
        error, theirs = ((getattr(o, name).double() - right).abs().mean() for o in (ours, native))
        assert error <= 1.05 * theirs + 2**-24 * right.abs().mean(), name


@both_layouts
@every_dtype
@pytest.mark.parametrize("shape", [(4, 32, 14, 14), (16, 96, 7, 7)], ids=str)
def test_no_less_accurate_than_native(channels_last, dtype, shape):
    """Which sums contiguous planes of float32 in float64."""
    if dtype == torch.float64:
        pytest.skip("native is the truth")
    p = problem(shape, dtype=dtype, channels_last=channels_last, padding=1, activation="silu")
    exact, ours, native = run(p.wide(), "native"), run(p), run(p, "native")

    def rms(of, name):
        got, right = ((o.y if name == "y" else o.gradients[name]).double() for o in (of, exact))
        return (got - right).square().mean().sqrt().item()

    for name in ("y", *NAMES):
        assert rms(ours, name) <= 1.05 * rms(native, name), name


@both_layouts
@pytest.mark.parametrize("kernel", [3, 2])
def test_the_same_bits_whatever_the_threads(channels_last, kernel):
    p = problem((5, 64, 33, 40), (kernel, kernel), channels_last=channels_last, activation="silu")
    outcomes = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        outcomes.append(run(p))
    first, *others = outcomes
    for other in others:
        assert torch.equal(first.y, other.y)
        assert torch.equal(first.running_var, other.running_var)
        assert all(torch.equal(g, other.gradients[name]) for name, g in first.gradients.items())


@poisoned
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("gamma",), ("beta", "x")], ids=str)
def test_only_what_is_needed(wanted):
    p = problem((2, 19, 5, 6), channels_last=True)
    assert_correct(p, run(p, wanted=wanted))


@poisoned
def test_without_gamma_and_beta():
    p = problem((2, 19, 5, 6), affine=False)
    assert_correct(p, run(p))


@poisoned
@both_layouts
def test_strides(channels_last):
    """Of x, of the incoming gradient, of the weight, of the vectors."""
    p = problem((2, 19, 5, 6), channels_last=channels_last, padding=1)
    wide = torch.randn(2, 5, 6, 21)
    p.dy = wide[..., 1:20].permute(0, 3, 1, 2)
    p.weight = p.weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    p.gamma = torch.rand(38)[::2]
    assert_correct(p, run(p))
    p.x = torch.randn(2, 19, 7, 8)[:, :, 1:-1, 1:-1]
    p.dy = torch.randn(1).expand(2, 19, 5, 6)
    assert_correct(p, run(p))


@both_layouts
@pytest.mark.parametrize(
    "kernel,stride,size,multiplier",
    [(3, 2, 8, 1), (2, 4, 9, 1), (3, 2, 8, 2)],  # by rows; planes; where zeros of a plane meet it
)
def test_what_no_output_reads_does_not_matter(channels_last, kernel, stride, size, multiplier):
    p = problem(
        (2, 17, size, size), (kernel, kernel), channels_last=channels_last, stride=stride,
        multiplier=multiplier,
    )  # fmt: skip
    read = (p.dy.shape[2] - 1) * stride + kernel
    assert read < size
    outcomes = []
    for unread in (0.0, float("inf")):
        p.x[:, :, read:] = p.x[:, :, :, read:] = unread
        outcomes.append(run(p))
    first, second = outcomes
    assert torch.equal(first.y, second.y)
    assert all(torch.equal(g, second.gradients[name]) for name, g in first.gradients.items())


@both_layouts
def test_like_batch_norm_2d(channels_last):
    """Three steps beside nn.BatchNorm2d: running statistics too."""
    conv, bn = nn.Conv2d(18, 18, 3, groups=18, bias=False), nn.BatchNorm2d(18, momentum=0.2)
    running = bn.running_mean.clone(), bn.running_var.clone()
    for _ in range(3):
        x = torch.randn(3, 18, 9, 9)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        y = dwconv_bn_act_training(
            x, conv.weight, bn.weight, bn.bias, *running, momentum=0.2, activation="relu6"
        )
        torch.testing.assert_close(y, nn.functional.relu6(bn(conv(x))), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(running, (bn.running_mean, bn.running_var), rtol=1e-6, atol=1e-6)


def test_empty_batch():
    running = torch.randn(4), torch.rand(4)
    before = [t.clone() for t in running]
    x, weight = torch.randn(0, 4, 5, 6, requires_grad=True), torch.randn(4, 1, 3, 3)
    y = dwconv_bn_act_training(x, weight.requires_grad_(), None, None, *running)
    y.sum().backward()
    assert y.shape == (0, 4, 3, 4) and x.grad.shape == x.shape
    assert not weight.grad.any()
    assert all(torch.equal(a, b) for a, b in zip(before, running, strict=True))


# ---- inside torch ----
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "constants",
    [
        (1, 1, 1, "relu6", 0.01, 1e-5),
        ((1, 2), (), 2, "silu", 0.01, 1e-3),
        (2, 1, 1, "relu", 0.01, 1e-5),
    ],
    ids=["explicit", "same", "kept"],
)
def test_opcheck(channels_last, constants):
    p = problem((2, 6, 9, 8), channels_last=channels_last)
    tensors = [t.requires_grad_() for t in p.tensors]
    opcheck(module._training, (*tensors, *constants))
    with torch.no_grad():
        y, z, mean, var = module._training(*tensors, *constants)
        tensors = [t.detach() for t in tensors]
        for wanted in ((True, True), (True, False), (False, True)):
            args = (torch.randn_like(y), tensors[0], z, *tensors[1:], mean, var)
            opcheck(module._training_backward, (*args, *constants, *wanted))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", ["silu", "leaky_relu"])
def test_gradcheck(activation, channels_last):
    p = problem(
        (2, 2, 4, 5), multiplier=2, dtype=torch.float64, channels_last=channels_last,
        stride=2, padding=(0, 1, 2, 1), activation=activation, slope=0.2,
    )  # fmt: skip
    inputs = tuple(t.detach().clone().requires_grad_() for t in p.tensors)

    def call(*tensors):
        return dwconv_bn_act_training(*tensors, **p.constants)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_compile_of_a_training_step():
    def step(x, weight, gamma, beta, mean, var):
        y = dwconv_bn_act_training(
            x * 2, weight, gamma, beta, mean, var, padding=1, activation="relu6"
        )
        return y.square().sum()

    results = []
    for run_step in (step, torch.compile(step, fullgraph=True)):
        torch.manual_seed(0)
        leaves = [torch.randn(3, 8, 6, 6), torch.randn(8, 1, 3, 3), torch.rand(8), torch.randn(8)]
        leaves = [t.requires_grad_() for t in leaves]
        running = torch.zeros(8), torch.ones(8)
        for _ in range(2):
            run_step(*leaves, *running).backward()
        results.append([t.grad for t in leaves] + list(running))
    torch.testing.assert_close(results[0], results[1])


def test_autocast_and_grad_scaler():
    weight = torch.randn(8, 1, 3, 3, requires_grad=True)
    gamma = torch.ones(8, requires_grad=True)
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.float16):
        y = dwconv_bn_act_training(x, weight, gamma, padding=1)
        loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).mean()
    assert y.dtype == torch.float16
    scaler.scale(loss).backward()
    assert [t.grad.dtype for t in (x, weight, gamma)] == [torch.float32] * 3
    assert all(t.grad.isfinite().all() and t.grad.any() for t in (x, weight, gamma))


def test_vmap_takes_statistics_call_by_call():
    x, weight = torch.randn(3, 2, 4, 6, 6), torch.randn(4, 1, 3, 3)
    ys = torch.vmap(lambda x: dwconv_bn_act_training(x, weight))(x)
    torch.testing.assert_close(ys, torch.stack([dwconv_bn_act_training(t, weight) for t in x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, (1, 2), 2])
def test_what_backward_keeps(stride, dtype):
    """Its inputs, vectors, and the convolution where that is small and in float32."""
    leaves = [torch.randn(2, 64, 16, 16, dtype=dtype), torch.randn(64, 1, 3, 3, dtype=dtype)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dwconv_bn_act_training(*(t.requires_grad_() for t in leaves), stride=stride, padding=1)
    sizes = [t.numel() for t in kept if t.numel() > 64 * 9]
    size = leaves[0].numel()
    small = stride == 2 and dtype == torch.float32
    assert sizes == ([size, size // 4] if small else [size])
    assert kept[0].data_ptr() == leaves[0].data_ptr()


# ---- bad input ----
X, WEIGHT, ONES = torch.randn(2, 4, 8, 8), torch.randn(4, 1, 3, 3), torch.ones(4)
SERVING = [name for name in backends.NAMES if backends.why_not(name) is None]


@pytest.mark.parametrize("backend", [None, *SERVING])
@pytest.mark.parametrize(
    "change,sentence",
    [
        (dict(x=X[0]), r"x: expected 4 dimensions \(N, C, H, W\), got shape \(4, 8, 8\)"),
        (dict(weight=torch.randn(6, 1, 3, 3)), r"weight: expected shape \(4\*M, 1, Kh, Kw\)"),
        (dict(weight=WEIGHT.double()), r"weight: expected x's dtype float32, got float64"),
        (dict(gamma=torch.ones(3)), r"gamma: expected shape \(4,\), .*got shape \(3,\)"),
        (dict(beta=ONES.half()), r"beta: expected float32 \(x is float32\), got float16"),
        (dict(running_mean=ONES[:3]), r"running_mean: expected shape \(4,\), .*got shape \(3,\)"),
        (dict(running_var=ONES.double()), r"running_var: expected float32 .*, got float64"),
        (dict(running_var=None), r"running_var: expected a Tensor beside the other one, got None"),
        (dict(momentum=float("nan")), r"momentum: expected a finite number, got nan"),
        (dict(eps=-1.0), r"eps: expected a finite number, at least 0, got -1"),
        (dict(stride=0), r"stride: expected positive, got \(0, 0\)"),
        (dict(activation="gelu"), r"activation: expected one of identity, .*'gelu'"),
        (
            dict(x=X[:1, :, :1, :1], padding=1),
            r"x: expected more than one value a channel in training, "
            r"got an output of shape \(1, 4, 1, 1\)",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else v.split(":")[0],
)
def test_bad_input(backend, change, sentence):
    running = torch.zeros(4), torch.ones(4)
    call = dict(x=X, weight=WEIGHT, gamma=ONES, beta=ONES) | change
    call = dict(running_mean=running[0], running_var=running[1]) | call
    with pytest.raises(RuntimeError, match="^dwconv_bn_act_training: " + sentence) as caught:
        dwconv_bn_act_training(**call, backend=backend)
    assert "\n" not in str(caught.value)
    assert not running[0].any() and (running[1] == 1).all()  # nothing has changed


def test_bad_gradient():
    constants = (2, 1, 1, "relu", 0.01, 1e-5)
    y, z, mean, var = module._training(X, WEIGHT, None, None, *constants)
    rest = (WEIGHT, None, None, mean, var, *constants, True, True)
    for dy, of_z, sentence in (
        (y[:1], z, r"dy: expected the output's shape \(2, 4, 4, 4\), got shape \(1, 4, 4, 4\)"),
        (y.double(), z, r"dy: expected x's dtype float32, got float64"),
        (y, z[:1], r"z: expected what dwconv_bn_act_training returned, got shape \(1, 4, 4, 4\)"),
        (y, z.double(), r"z: expected what dwconv_bn_act_training returned, got float64"),
    ):
        with pytest.raises(RuntimeError, match="dwconv_bn_act_training_backward: " + sentence):
            module._training_backward(dy, X, of_z, *rest)


def test_backends_that_cannot_serve():
    for name in set(backends.NAMES) - set(SERVING):
        with pytest.raises(RuntimeError, match=re.escape(backends.why_not(name))):
            dwconv_bn_act_training(X, WEIGHT, backend=name)


def sees(p, name, wrong) -> None:
    outcome = run(p)
    wrong(outcome.y if name == "y" else outcome.gradients[name])
    with pytest.raises(AssertionError, match=rf"^{name}: .* elements are off"):
        assert_correct(p, outcome)


@pytest.mark.parametrize("name", ["y", *NAMES])
def test_the_ruler_sees_what_is_wrong(name):
    """An element by less than a thousandth; everything by a ten thousandth."""
    p = problem((2, 8, 6, 6), padding=1)
    sees(p, name, lambda t: t.view(-1)[0].add_(1e-3))
    sees(p, name, lambda t: t.mul_(1 + 1e-4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ["relu6", "silu"])
def test_the_ruler_sees_what_is_wrong_on_large_planes(activation, name):
    """Sums over 100,000 pixels by a ten thousandth. At a kink both derivatives would be right."""
    p = problem((4, 3, 160, 160), padding=1, activation=activation)
    z = forward(p.training)[-1]
    p.dy[(z.abs() < 1e-4) | ((z - 6).abs() < 1e-4)] = 0
    assert_correct(p, run(p))
    sees(p, name, lambda t: t.mul_(1 + 1e-4))
