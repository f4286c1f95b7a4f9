"""Swapped models in training mode: what is served and what stays native, as `explain` tells."""

# ruff: noqa: F811 (fixtures)
import copy

import pytest
import torch
from networks import dw_bn, image, randomize, reasons
from test_training_swap import assert_alike, batch, both, calls  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize, prune

from mnet_kernels.nn import training
from mnet_kernels.swap import explain, swap


def test_dense_convolutions_are_native_and_the_table_says_so(calls):
    native, fast = both(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn(groups=1)))
    assert_alike(native, fast, batch())
    assert len(calls) == 2
    reason = (
        "convolutions but depthwise, plain 1x1 and small first ones are native in training mode"
    )
    for mode, rows in (
        (True, [("cpu", ""), ("native", reason)]),
        (False, [("cpu", ""), ("folded", "")]),
    ):
        explanation = explain(fast.train(mode))
        assert [(row.backend, row.reason) for row in explanation.rows] == rows
        assert [row.training for row in explanation.rows] == ["cpu", "native"]
        assert [row.why_native_training for row in explanation.rows] == ["", reason]
    text = str(explanation)
    assert "2 of 2 rows run fused, 1 in training." in text
    assert f"Native in training, 1 rows: {reason}." in text


def pointwise(**options):
    return dw_bn(groups=1, **{"kernel_size": 1, "padding": 0, **options})


POINTWISE = {
    "served": ({}, torch.float32, True),
    "with a bias": ({"bias": True}, torch.float32, True),
    "strided": ({"stride": 2}, torch.float32, False),
    "padded": ({"padding": 1}, torch.float32, False),
    "float64": ({}, torch.float64, False),
    "bfloat16": ({}, torch.bfloat16, False),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_1x1_convolutions_in_float32(name, monkeypatch):
    options, dtype, served = POINTWISE[name]
    calls, operator = [], training.conv_bn_act_training
    monkeypatch.setattr(
        training, "conv_bn_act_training", lambda *t, **c: calls.append(t) or operator(*t, **c)
    )
    model = nn.Sequential(dw_bn(act=nn.ReLU6()), *pointwise(**options), nn.ReLU(), nn.Flatten())
    native = randomize(model).to(dtype).train()
    fast = swap(copy.deepcopy(native)).train()
    row = explain(fast).rows[1]
    assert (row.training == "cpu", bool(row.why_native_training)) == (served, not served)
    if dtype == torch.bfloat16:  # rounding decides the rest
        fast(batch().to(dtype))
    else:
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        assert_alike(native, fast, batch().to(dtype), tolerance=tolerance)
    assert bool(calls) == served
    assert all(t[0].is_contiguous(memory_format=torch.channels_last) for t in calls)


FIRST = {
    "strided": (dict(out_channels=24, stride=2, padding=1), True),
    "of a bias": (dict(out_channels=24, stride=2, bias=True), True),
    "of uneven sizes": (
        dict(in_channels=2, kernel_size=(3, 2), stride=(1, 2), padding=(0, 1)),
        True,
    ),
    "1x1, strided": (dict(kernel_size=1, stride=2), True),
    "of large patches": (dict(out_channels=8, stride=1, padding=1), False),
    "dilated": (dict(out_channels=40, dilation=2), False),
    "of many channels": (dict(in_channels=8, out_channels=64, stride=2), False),
}


@pytest.mark.parametrize("name", FIRST)
def test_first_convolutions_in_float32(name, monkeypatch):
    options, served = FIRST[name]
    options = {"in_channels": 3, "out_channels": 12, "kernel_size": 3, "bias": False, **options}
    found, operator = [], training.conv_bn_act_training
    monkeypatch.setattr(
        training, "conv_bn_act_training", lambda *t, **c: found.append(t) or operator(*t, **c)
    )
    model = nn.Sequential(
        nn.Conv2d(**options), nn.BatchNorm2d(options["out_channels"]), nn.ReLU6(), nn.Flatten()
    )
    native = randomize(model).train()
    fast = swap(copy.deepcopy(native)).train()
    assert (explain(fast).rows[0].training == "cpu") == served
    x = image(3, options["in_channels"], 11, 9)
    for _ in range(2):
        results = []
        for module in (native, fast):
            y = module(x)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            results.append([y, *(p.grad for p in module.parameters()), *module.buffers()])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert len(found) == (2 if served else 0)
    assert_alike(native, fast, x, tolerance=1e-4)  # x has a gradient: native
    assert len(found) == (2 if served else 0)


def test_1x1_convolutions_whose_layout_is_seen_stay_native_in_others(monkeypatch):
    monkeypatch.delattr(training, "conv_bn_act_training")
    native = randomize(pointwise()).train()
    fast = swap(copy.deepcopy(native)).train()
    x = batch().float()
    assert_alike(native, fast, x, tolerance=1e-5)
    assert fast(x).is_contiguous()


def test_dense_convolutions_take_their_layout_where_nobody_sees_it(calls):
    native, fast = both(
        nn.Sequential(dw_bn(groups=1, act=nn.ReLU()), dw_bn(act=nn.ReLU6()), nn.Flatten())
    )
    assert_alike(native, fast, batch())
    assert calls[0][0].is_contiguous(memory_format=torch.channels_last)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [
        lambda conv: parametrize.register_parametrization(conv, "weight", Doubled()),
        lambda conv: nn.utils.parametrizations.weight_norm(conv),
        lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
    ],
    ids=["parametrization", "weight norm", "pruned"],
)
def test_computed_weights(change, when, calls):
    native = randomize(dw_bn(act=nn.ReLU())).double().train()
    fast = copy.deepcopy(native)
    for step in ("swap", "change") if when == "after" else ("change", "swap"):
        if step == "swap":
            fast = swap(fast)
        else:
            change(native[0]), change(fast[0])
    assert all(reasons(fast).values())
    assert_alike(native, fast, batch())
    assert not calls
    torch.testing.assert_close(fast.eval()(batch()), native.eval()(batch()))


def test_one_value_a_channel_and_none_are_the_norms_own_error(calls):
    native, fast = both(dw_bn())
    for shape in ((1, 8, 1, 1), (0, 8, 4, 4)):
        outcomes = []
        for model in (native, fast):
            try:
                outcomes.append(model(batch(*shape)).shape)
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]
    assert not calls
    torch.testing.assert_close(fast.state_dict(), native.state_dict(), equal_nan=True)


def test_where_no_backend_serves_it_is_native_and_says_so(calls):
    native = randomize(dw_bn()).double().train()
    fast = swap(copy.deepcopy(native), backend="triton")
    assert_alike(native, fast, batch())
    assert not calls and "triton" in reasons(fast)["0"]
