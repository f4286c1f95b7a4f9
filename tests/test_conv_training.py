"""conv_bn_act_training, forward and backward, against float64 autograd of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rulers import Problem
from torch import nn
from torch.library import opcheck
from training_rulers import EPS, MOMENTUM, NAMES, Call, Training, assert_correct, run

from mnet_kernels import _C
from mnet_kernels import conv_training as module
from mnet_kernels.conv_training import conv_bn_act_training
from mnet_kernels.reference import ACTIVATIONS

poisoned = pytest.mark.usefixtures("poisoned_memory")
LAST = torch.channels_last


def call(shape, outputs, *, affine=True, mean=0.0, std=1.0, activation="relu", slope=0.01) -> Call:
    x = (torch.randn(shape) * std + mean).to(memory_format=LAST)
    weight = torch.randn(outputs, shape[1], 1, 1) / shape[1] ** 0.5
    given = (torch.rand(outputs) + 0.5, torch.randn(outputs)) if affine else (None, None)
    running = torch.randn(outputs), torch.rand(outputs) + 0.5
    dy = torch.randn(shape[0], outputs, *shape[2:]).to(memory_format=LAST)
    return Call(x, weight, *given, *running, dy, {"activation": activation, "slope": slope})


def dense(p: Problem, x, weight):
    return F.conv2d(x, weight)


def check(p: Call, wanted=NAMES, training: Training | None = None) -> None:
    outcome = run(p, wanted=wanted, operator=conv_bn_act_training)
    assert outcome.y.is_contiguous(memory_format=LAST)
    training = training or Training(Problem(*p.tensors, p.constants), EPS, dense)
    assert_correct(p, outcome, training)


@poisoned
@pytest.mark.parametrize(
    "shape,outputs",
    [
        ((2, 3, 1, 2), 5),
        ((1, 16, 7, 7), 16),
        ((2, 33, 6, 5), 47),
        ((3, 64, 17, 19), 130),  # several blocks
        ((2, 100, 3, 3), 7),
        ((2, 1024, 2, 2), 36),  # rows that share cache sets
        ((1, 8, 50, 101), 1024),  # several blocks of a slab
        ((1, 96, 40, 30), 1024),  # several chunks
    ],
    ids=str,
)
def test_shapes(shape, outputs):
    """On every instruction set, against one reference: the large ones take a second."""
    p = call(shape, outputs, activation="relu6")
    training = Training(Problem(*p.tensors, p.constants), EPS, dense)
    for name in _C.build_info()["instruction_sets"]:
        _C.set_instruction_set(name)
        try:
            check(p, training=training)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        finally:
            _C.set_instruction_set(_C.build_info()["instruction_sets"][0])


@poisoned
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(instruction_set, activation):
    p = call((2, 9, 5, 4), 70, activation=activation, slope=0.2)
    p.gamma.mul_(3)  # reach all branches
    check(p)


@poisoned
def test_without_gamma_and_beta():
    check(call((2, 19, 5, 6), 24, affine=False))


@poisoned
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("gamma",), ("beta", "x")], ids=str)
def test_only_what_is_needed(wanted):
    check(call((2, 19, 5, 6), 24), wanted)


@poisoned
def test_strides():
    """Of x, of the incoming gradient, of the weight, of the vectors."""
    p = call((2, 19, 5, 6), 24)
    p.x = torch.randn(2, 21, 7, 8)[:, 1:-1, 1:-1, 1:-1]
    p.dy = torch.randn(2, 24, 5, 6)
    p.weight = p.weight.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    p.gamma = torch.rand(48)[::2]
    check(p)
    p.x = torch.randn(2, 19, 5, 6)
    p.dy = torch.randn(1).expand(2, 24, 5, 6)
    check(p)


def test_the_same_bits_whatever_the_threads():
    p = call((3, 48, 33, 20), 72, activation="silu")
    outcomes = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        outcomes.append(run(p, operator=conv_bn_act_training))
    first, *others = outcomes
    for other in others:
        assert torch.equal(first.y, other.y)
        assert torch.equal(first.running_var, other.running_var)
        assert all(torch.equal(g, other.gradients[name]) for name, g in first.gradients.items())


def native(x, weight, gamma, beta, mean, var, *, momentum, eps, activation, slope):
    z = F.batch_norm(F.conv2d(x, weight), mean, var, gamma, beta, True, momentum, eps)
    return ACTIVATIONS[activation](z, slope)


def test_no_less_accurate_than_native():
    p = call((4, 64, 14, 14), 96, activation="silu")
    exact = run(p.wide(), operator=native)
    ours, theirs = (run(p, operator=operator) for operator in (conv_bn_act_training, native))

    def rms(of, name):
        got, right = ((o.y if name == "y" else o.gradients[name]).double() for o in (of, exact))
        return (got - right).square().mean().sqrt().item()

    for name in ("y", *NAMES):
        assert rms(ours, name) <= 1.05 * rms(theirs, name), name


def test_small_spread_about_a_large_mean():
    """Sums of squares would lose everything."""
    p = call((4, 16, 20, 21), 24, mean=1e3, std=1e-2, activation="identity")
    p.weight.abs_()
    check(p)


def test_like_batch_norm_2d():
    """Three steps beside nn.BatchNorm2d: running statistics too."""
    conv, bn = nn.Conv2d(18, 20, 1, bias=False), nn.BatchNorm2d(20, momentum=MOMENTUM)
    running = bn.running_mean.clone(), bn.running_var.clone()
    for _ in range(3):
        x = torch.randn(3, 18, 9, 9).to(memory_format=LAST)
        y = conv_bn_act_training(
            x, conv.weight, bn.weight, bn.bias, *running, momentum=MOMENTUM, activation="relu6"
        )
        torch.testing.assert_close(y, F.relu6(bn(conv(x))), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(running, (bn.running_mean, bn.running_var), rtol=1e-6, atol=1e-6)


def test_empty_batch():
    running = torch.randn(6), torch.rand(6)
    before = [t.clone() for t in running]
    x, weight = torch.randn(0, 4, 5, 6, requires_grad=True), torch.randn(6, 4, 1, 1)
    y = conv_bn_act_training(x, weight.requires_grad_(), None, None, *running)
    y.sum().backward()
    assert y.shape == (0, 6, 5, 6) and x.grad.shape == x.shape
    assert not weight.grad.any()
    assert all(torch.equal(a, b) for a, b in zip(before, running, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_the_weights_gradient_has_its_strides(layout):
    """DistributedDataParallel warns of others."""
    weight = torch.randn(6, 4, 1, 1).to(memory_format=layout).requires_grad_()
    conv_bn_act_training(torch.randn(2, 4, 3, 3), weight).sum().backward()
    assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("name", NAMES)
def test_the_ruler_sees_what_is_wrong_on_large_planes(name):
    """Sums over 100,000 pixels by a ten thousandth."""
    p = call((4, 5, 160, 160), 3, activation="silu")
    check(p)
    outcome = run(p, operator=conv_bn_act_training)
    outcome.gradients[name].mul_(1 + 1e-4)
    with pytest.raises(AssertionError, match=rf"^{name}: .* elements are off"):
        assert_correct(p, outcome, Training(Problem(*p.tensors, p.constants), EPS, dense))


# ---- inside torch ----
def test_opcheck():
    p = call((2, 6, 9, 8), 10)
    constants = ("silu", 0.01, EPS)
    opcheck(module._training, (*(t.requires_grad_() for t in p.tensors), *constants))
    with torch.no_grad():
        tensors = [t.detach() for t in p.tensors]
        tensors[1] = tensors[1].to(memory_format=LAST)
        y, z, mean, var = module._training(*tensors, *constants)
        x, *others = tensors
        for wanted in ((True, True), (True, False), (False, True)):
            args = (torch.randn_like(y), x, z, *others, mean, var, *constants, *wanted)
            opcheck(module._training_backward, args)


def test_second_derivatives_are_plain_pytorchs():
    p = call((2, 5, 3, 4), 6, activation="silu")
    found = []
    for operator in (conv_bn_act_training, native):
        leaves = [t.detach().clone().requires_grad_() for t in p.tensors]
        y = operator(*leaves, None, None, momentum=0.1, eps=EPS, **p.constants)
        (dx,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), leaves))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_compile_of_a_training_step():
    def step(x, weight, gamma, beta, mean, var):
        y = conv_bn_act_training(x * 2, weight, gamma, beta, mean, var, activation="relu6")
        return y.square().sum()

    results = []
    for run_step in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        leaves = [torch.randn(3, 8, 6, 6).to(memory_format=LAST), torch.randn(12, 8, 1, 1)]
        leaves = [t.requires_grad_() for t in (*leaves, torch.rand(12), torch.randn(12))]
        running = torch.zeros(12), torch.ones(12)
        for _ in range(2):
            run_step(*leaves, *running).backward()
        results.append([t.grad for t in leaves] + list(running))
    torch.testing.assert_close(results[0], results[1])


def test_backward_keeps_its_input_and_one_tensor_more():
    leaves = [torch.randn(2, 64, 16, 16).to(memory_format=LAST), torch.randn(48, 64, 1, 1)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conv_bn_act_training(*(t.requires_grad_() for t in leaves))
    assert sorted(t.numel() for t in kept if t.numel() > 64 * 48) == [2 * 48 * 256, 2 * 64 * 256]


# ---- bad input ----
X, WEIGHT, ONES = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 1, 1), torch.ones(6)


@pytest.mark.parametrize(
    "change,sentence",
    [
        (dict(x=X[0]), r"x: expected 4 dimensions \(N, C, H, W\), got shape \(4, 8, 8\)"),
        (
            dict(x=X.double(), weight=WEIGHT.double()),
            "x: expected float32 on the CPU, got float64 on cpu",
        ),
        (dict(weight=torch.randn(6, 4, 3, 1)), r"weight: expected a 1x1 kernel, .*\(6, 4, 3, 1\)"),
        (dict(weight=torch.randn(6, 3, 1, 1)), r"weight: expected shape \(C_out, 4, Kh, Kw\)"),
        (dict(gamma=torch.ones(3)), r"gamma: expected shape \(6,\), .*got shape \(3,\)"),
        (dict(beta=ONES.half()), r"beta: expected float32 \(x is float32\), got float16"),
        (dict(running_mean=ONES[:3]), r"running_mean: expected shape \(6,\), .*got shape \(3,\)"),
        (dict(running_var=None), r"running_var: expected a Tensor beside the other one, got None"),
        (dict(momentum=float("nan")), r"momentum: expected a finite number, got nan"),
        (dict(eps=-1.0), r"eps: expected a finite number, at least 0, got -1"),
        (dict(activation="gelu"), r"activation: expected one of identity, .*'gelu'"),
        (dict(x=X[:1, :, :1, :1]), r"x: expected more than one value a channel in training"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else v.split(":")[0],
)
def test_bad_input(change, sentence):
    running = torch.zeros(6), torch.ones(6)
    arguments = dict(x=X, weight=WEIGHT, gamma=ONES, beta=ONES) | change
    arguments = dict(running_mean=running[0], running_var=running[1]) | arguments
    with pytest.raises(RuntimeError, match="^conv_bn_act_training: " + sentence) as caught:
        conv_bn_act_training(**arguments)
    assert "\n" not in str(caught.value)
    assert not running[0].any() and (running[1] == 1).all()  # nothing has changed


def test_bad_gradient():
    y, z, mean, var = module._training(X, WEIGHT, None, None, "relu", 0.01, 1e-5)
    rest = (WEIGHT, None, None, mean, var, "relu", 0.01, 1e-5, True, True)
    for dy, of_z, sentence in (
        (y[:1], z, r"dy: expected the output's shape \(2, 6, 8, 8\), got shape \(1, 6, 8, 8\)"),
        (y.double(), z, r"dy: expected x's dtype float32, got float64"),
        (y, z[:1], r"z: expected what conv_bn_act_training returned, got shape \(1, 6, 8, 8\)"),
    ):
        with pytest.raises(RuntimeError, match="conv_bn_act_training_backward: " + sentence):
            module._training_backward(dy, X, of_z, *rest)
