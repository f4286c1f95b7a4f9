"""SeparableConv: one pass on packed weights, which are never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mnet_kernels import SeparableConv, ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def module(**options) -> SeparableConv:
    layer = SeparableConv(**{"in_channels": 12, "out_channels": 20, "stride": 2} | options)
    for norm in (layer.bn_dw, layer.bn_pw):
        torch.nn.init.uniform_(norm.running_mean, -1, 1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        torch.nn.init.uniform_(norm.bias, -1, 1)
    return layer.eval()


def native(layer: SeparableConv, x: Tensor) -> Tensor:
    y = layer.conv_pw.forward_native(layer.conv_dw.forward_native(x))
    return y + x if layer.residual else y


@pytest.fixture
def packings(monkeypatch):
    """Counts how often a dense weight is packed."""
    packed = []
    pack = ops.pack_conv_weight
    monkeypatch.setattr(ops, "pack_conv_weight", lambda w: packed.append(w) or pack(w))
    return packed


@pytest.mark.parametrize("channels_last", [False, True])
def test_module(packings, channels_last):
    x = torch.randn(2, 12, 11, 14)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    for layer in (
        module(),
        module(out_channels=12, stride=1, residual=True, pw_activation="identity"),
    ):
        expected = native(layer, x)
        packings.clear()
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(layer(x), expected)
        assert len(packings) == 1
        assert layer(x).is_contiguous() is not channels_last
        torch.testing.assert_close(layer(x), expected)  # with gradients: by the operator
        layer.train()
        x_train = x.clone()
        twin = copy.deepcopy(layer)
        torch.testing.assert_close(layer(x_train), native(twin, x_train))


def in_place(layer):
    layer.conv_pw.weight.mul_(1.5)


def optimiser(layer):
    with torch.enable_grad():
        layer(torch.randn(2, 12, 8, 8)).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()


def checkpoint(layer):
    layer.load_state_dict({k: v * 0.7 for k, v in layer.state_dict().items()})


def moved(layer):
    layer.to(torch.bfloat16)


def back_and_forth(layer):
    layer.double().conv_dw.weight.mul_(2)
    layer.float()


def exchanged(layer):
    layer.conv_pw.weight = torch.nn.Parameter(torch.randn(20, 12, 1, 1))


def statistics(layer):
    layer.bn_pw.running_var.mul_(3)


@pytest.mark.parametrize(
    "change", [in_place, optimiser, checkpoint, moved, back_and_forth, exchanged, statistics]
)
def test_no_stale_weights(packings, change):
    layer = module()
    x = torch.randn(2, 12, 9, 9).to(memory_format=torch.channels_last)
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
        assert len(packings) == 1
        change(layer)
        x = x.to(layer.conv_pw.weight.dtype)
        after = layer(x)
        assert torch.equal(layer(x), after)
        assert len(packings) == 2
        expected = native(layer, x)
    assert not torch.allclose(after.float(), before)
    slack = 1e-4 if x.dtype == torch.float32 else 0.1
    torch.testing.assert_close(after, expected, rtol=slack, atol=slack)


def test_module_inside_torch():
    layer, x = module(), torch.randn(2, 12, 9, 9)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
        program = torch.export.export(layer, (x,))
        assert any("separable_conv" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(copy.deepcopy(layer)(x), y)
        seen = []
        layer.conv_dw.register_forward_hook(lambda m, args, y: seen.append(y))
        torch.testing.assert_close(layer(x), y)
    assert len(seen) == 1
