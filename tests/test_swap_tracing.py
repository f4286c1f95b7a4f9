"""swap: shared modules, forwards that cannot be traced, functions that are no activations."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import (
    Residual,
    assert_same,
    dw_bn,
    fused,
    image,
    network,
    randomize,
    reasons,
)
from torch import nn

from mnet_kernels.swap import swap


def test_norm_result_used_twice_leaves_the_activation():
    model = network(lambda self, x: F.relu(y := self.block(x)) + y, block=dw_bn())
    fast = swap(model)
    (fusion,) = fused(fast).values()
    assert (fusion.norm is fast.block[1], fusion.activation) == (True, "identity")
    assert "used 2 times" in reasons(fast)["block.0"]
    assert_same(model, fast, image(2, 8, 6, 6))


def test_module_called_twice_with_the_same_neighbours():
    model = network(
        lambda self, x: self.act(self.block(self.act(self.block(x)))), block=dw_bn(), act=nn.ReLU()
    )
    fast = swap(model)
    (fusion,) = fused(fast).values()
    assert fusion.activation == "relu"
    assert_same(model, fast, image(2, 8, 6, 6))


def test_one_module_under_two_names_stays_one():
    block = dw_bn(act=nn.ReLU())
    model = randomize(nn.Sequential(block, nn.Sequential(block)))
    fast = swap(model)
    assert fast[0] is fast[1][0] and fast[0] is not block
    assert_same(model, fast, image(2, 8, 6, 6))


# --- one activation module for all, functional ones -----------------------------------------


def test_shared_activation_module():
    model = randomize(nn.Sequential(Residual(), Residual()))
    fast = swap(model)
    assert [f.activation for f in fused(fast).values()] == ["relu", "identity"] * 2
    x = image(2, 8, 6, 6)
    assert_same(model, fast, x)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert "forward" in copied[0].__dict__ and copied[0].forward.owner is copied[0]
        torch.testing.assert_close(copied(x), fast(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (
            lambda self, x: F.dropout(F.relu(self.block(x)), 0.5, self.training),
            "differs between training and eval",
        ),
        (lambda self, x, gain=1: F.relu(self.block(x)) * gain, "has optional arguments"),
        (lambda self, x: F.relu(self.block(x)) + torch.ones(1), "makes tensors"),
    ],
)
def test_activation_left_native(forward, reason):
    model = network(forward, block=dw_bn())
    fast = swap(model)
    (fusion,) = fused(fast).values()
    assert (fusion.norm is fast.block[1], fusion.activation) == (True, "identity")
    assert reasons(fast)["block.0"].startswith("activation left native")
    assert reason in reasons(fast)["block.0"]
    assert set(vars(fast)) - {"_mnet_swapped"} == set(vars(model))
    assert_same(model, fast, image(2, 8, 6, 6))


# --- models that cannot be traced whole ------------------------------------------------------


class Gate(nn.Module):
    """Data-dependent: chooses its way by the values."""

    def __init__(self):
        super().__init__()
        self.way1, self.way2 = dw_bn(act=nn.ReLU()), dw_bn(act=nn.ReLU6())

    def forward(self, x):
        return self.way1(x) if x.mean() > 0 else self.way2(x)


def test_data_dependent_control_flow():
    model = randomize(nn.Sequential(dw_bn(act=nn.SiLU()), Gate(), dw_bn(act=nn.SiLU())))
    fast = swap(model)
    assert {path: f.activation for path, f in fused(fast).items()} == {
        "0.0": "silu", "1.way1.0": "relu", "1.way2.0": "relu6", "2.0": "silu"
    }  # fmt: skip
    assert "cannot be traced" in reasons(fast)["1"]
    for sign in (1, -1):
        assert_same(model, fast, image(2, 8, 6, 6) + sign)


def test_untraceable_forward_without_source():
    """Nothing may be assumed about what it does with its children."""
    model = network(
        lambda self, x: self.block(x) if x.mean() > 0 else self.block[0](x), block=dw_bn()
    )
    fast = swap(model)
    assert not fused(fast)
    assert "does more with it" in reasons(fast)["block.0"]
    for sign in (1, -1):
        assert_same(model, fast, image(2, 8, 6, 6) + sign)


class Taps(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = dw_bn(act=nn.ReLU())
        self.tapped = dw_bn(act=nn.ReLU())
        self.blocks = nn.ModuleList([dw_bn(act=nn.ReLU()), Residual()])
        self.layers = dw_bn(act=nn.ReLU())
        self.seen = nn.ModuleList([dw_bn(act=nn.ReLU())])

    def forward(self, x):
        x = self.stem(x)
        return self._rest(x)

    def _rest(self, x):
        if x.sum() > 0:
            x = self.tapped[0](x)
        for index, block in enumerate(self.blocks):
            x = block(x) + index
        kept = []
        for layer in self.layers:
            x = layer(x)
            kept.append(x)
        for read in self.seen:
            x = x + read(x) * read[0].weight.sum()
        return x + kept[0]

    def features(self, x):  # not used by forward: says nothing about it
        return self.stem[0](x)


def test_source_tells_what_is_only_called():
    model = randomize(Taps())
    fast = swap(model)
    # Of what is called item by item, depthwise convolutions alone.
    assert {path: f.norm is not None for path, f in fused(fast).items()} == {
        "stem.0": True, "tapped.0": False, "blocks.0.0": True, "blocks.1.conv1": True,
        "blocks.1.conv2": True, "layers.0": False,
    }  # fmt: skip
    for sign in (1, -1):
        assert_same(model, fast, image(2, 8, 6, 6) + sign, depth=8)


def test_reaching_into_what_cannot_be_traced():
    model = network(lambda self, x: self.gate(x) + self.gate.way1[0](x), gate=Gate())
    fast = swap(model)
    assert set(fused(fast)) == {"gate.way2.0"}
    assert "traced apart" in reasons(fast)["gate.way1.0"]
    for sign in (1, -1):
        assert_same(model, fast, image(2, 8, 6, 6) + sign)


def test_shared_between_parts_traced_apart():
    gates = Gate(), Gate()
    gates[1].way1[0] = gates[0].way1[0]  # one convolution before two norms
    model = randomize(nn.Sequential(*gates))
    fast = swap(model)
    assert set(fused(fast)) == {"0.way2.0", "1.way2.0"}
    for sign in (1, -1):
        assert_same(model, fast, image(2, 8, 6, 6) + sign)


class MostlyReLU(nn.Module):
    def forward(self, x):
        return torch.where(torch.rand(()) < 1e-4, x, F.relu(x))


@pytest.mark.parametrize(
    "module",
    [
        nn.RReLU(),
        nn.Dropout(0.2),
        torchvision.ops.StochasticDepth(0.01, "row"),
        MostlyReLU(),
        nn.PReLU(),
        nn.ELU(),
    ],
)
def test_random_or_learned_functions_are_no_activations(module):
    model = randomize(nn.Sequential(*dw_bn(), module, nn.ReLU()))
    state = torch.get_rng_state()
    fast = swap(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [f.activation for f in fused(fast).values()] == ["identity"]
