"""swap and explain: bad input, and the rest of torch (compile, export, autocast)."""

import copy

import pytest
import torch
from networks import (
    Residual,
    dw_bn,
    image,
    randomize,
    two_layers,
)
from torch import nn
from torch._subclasses import FakeTensorMode

from mnet_kernels.nn import DepthwiseConvBNAct
from mnet_kernels.swap import explain, restore, sites, swap

# --- bad input ------------------------------------------------------------------------------


def fake():
    with FakeTensorMode():
        return two_layers()


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self._orig_mod = nn.ReLU()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: swap([m]),
            TypeError,
            "swap: model: expected a torch.nn.Module, got builtins.list",
        ),
        (lambda m: swap(None), TypeError, "got builtins.NoneType"),
        (
            lambda m: swap(torch.jit.script(m)),
            TypeError,
            "swap: model: expected a Module in Python",
        ),
        (lambda m: swap(nn.LazyConv2d(4, 3)), TypeError, "expected parameters with shapes"),
        (lambda m: swap(fake()), TypeError, "expected tensors with memory"),
        (lambda m: swap(Compiled()), TypeError, "swap: model: expected one not yet compiled"),
        (lambda m: swap(m, "gpu"), ValueError, "swap: backend: expected one of cpu,"),
        (
            lambda m: swap(m, example_inputs=[1]),
            TypeError,
            "swap: example_inputs: expected a Tensor",
        ),
        (
            lambda m: swap(m, example_inputs=()),
            TypeError,
            "swap: example_inputs: expected a Tensor",
        ),
        (
            lambda m: swap(m, example_inputs=image(1, 8, 4, 4), decisions="x"),
            ValueError,
            "expected example_inputs or decisions, got both",
        ),
        (explain, TypeError, "explain: expected a model made by swap, got torch.nn.modules"),
        (restore, TypeError, "restore: expected a model made by swap"),
        (lambda m: list(sites(m)), TypeError, "sites: expected a model made by swap"),
        (
            lambda m: explain(3),
            TypeError,
            "explain: expected a model made by swap, got builtins.int",
        ),
        (
            lambda m: DepthwiseConvBNAct(8, activation="gelu"),
            ValueError,
            "activation: expected one of",
        ),
        (lambda m: DepthwiseConvBNAct(8, padding="valid"), ValueError, "padding: expected"),
        (lambda m: DepthwiseConvBNAct(8, backend="x"), ValueError, "backend: expected one of"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error) as caught:
        call(two_layers())
    assert message in str(caught.value)


def test_inputs_that_do_not_fit_are_natives_own_error():
    model = two_layers()
    fast = swap(model)
    for x in (
        image(2, 7, 6, 6),
        image(2, 8, 6, 6).double(),
        image(8),
        torch.ones(2, 8, 6, 6).int(),
    ):
        with pytest.raises(Exception) as ours:
            fast(x)
        with pytest.raises(type(ours.value)):
            model(x)


def test_a_failing_example_leaves_nothing_behind():
    model = two_layers()
    with pytest.raises(RuntimeError):
        swap(model, example_inputs=image(2, 7, 6, 6))
    assert type(model[0][0]) is nn.Conv2d and not model[0][0]._forward_pre_hooks


# --- with the rest of torch -----------------------------------------------------------------


def test_compile():
    model = randomize(nn.Sequential(Residual(), dw_bn(groups=1, act=nn.SiLU()), nn.Flatten()))
    fast = swap(model)
    x = image(2, 8, 6, 6)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fast(x), rtol=1e-4, atol=1e-5)
        fast[0].bn1.running_mean.add_(1)
        torch.testing.assert_close(compiled(x), fast(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    fast = swap(randomize(nn.Sequential(Residual(), dw_bn(groups=1))))
    x = image(2, 8, 6, 6)
    exported = torch.export.export(fast, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), fast(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_jit_trace():
    fast = swap(two_layers())
    x, other = image(2, 8, 6, 6), image(3, 8, 7, 7)
    traced = torch.jit.trace(fast, x)
    torch.testing.assert_close(traced(other), fast(other))


def test_functional_call():
    fast = swap(two_layers())
    other = randomize(two_layers(), seed=7).state_dict()
    x = image(2, 8, 6, 6)
    with torch.no_grad():
        fast(x)
        y = torch.func.functional_call(fast, other, (x,))
        fast.load_state_dict(other)
        torch.testing.assert_close(y, fast(x))
    tangent = torch.func.grad(lambda p: torch.func.functional_call(fast, p, (x,)).sum())
    assert tangent(dict(fast.named_parameters()))["0.1.bias"].any()


def test_autocast():
    model = two_layers()
    fast = swap(model)
    x = image(2, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        native, ours = model(x), fast(x)
    assert ours.dtype == native.dtype
    torch.testing.assert_close(ours, native, rtol=0.05, atol=0.05)


# --- the module to build with ----------------------------------------------------------------


@pytest.mark.parametrize("padding", ["same", 1, (0, 2)])
@pytest.mark.parametrize("act", ["identity", "relu6", "leaky_relu", "silu"])
def test_depthwise_conv_bn_act(act, padding):
    module = DepthwiseConvBNAct(
        4, (3, 5), stride=2, padding=padding, depth_multiplier=2, activation=act, slope=0.3
    )
    assert list(module.state_dict()) == [
        "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var",
        "bn.num_batches_tracked",
    ]  # fmt: skip
    randomize(module)
    x = image(2, 4, 9, 10)
    native = module.conv.forward_native(x)
    if padding == "same":
        assert native.shape == (2, 8, 5, 5)
    torch.testing.assert_close(module(x), native, rtol=1e-5, atol=1e-5)
    module, x = module.double().train(), x.double()
    twin = copy.deepcopy(module)
    torch.testing.assert_close(module(x), twin.conv.forward_native(x), rtol=1e-12, atol=1e-12)
    assert module.bn.num_batches_tracked == 1
