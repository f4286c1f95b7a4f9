"""Classifiers inside a run, whole networks in one call, and when that is taken."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import image, network, randomize
from test_gates import check_accuracy, gated
from test_sequences import both_dtypes, calls, finish, one_by_one, runs, unit  # noqa: F401
from torch import nn
from torchvision.models import efficientnet_b0, mobilenet_v2, mobilenet_v3_small
from torchvision.ops import StochasticDepth

from mnet_kernels import models
from mnet_kernels.swap import explain, swap


def head_of_linears(channels=60):
    return [
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 70), nn.Hardswish(inplace=True),
        nn.Dropout(0.2, inplace=True), nn.Linear(70, 333, bias=False),
    ]  # fmt: skip


def head_of_convolutions(channels=60):
    return [
        nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(0.1), nn.Conv2d(channels, 333, 1), nn.Flatten()
    ]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    "head,stages", [(head_of_linears, 11), (head_of_convolutions, 10)], ids=["linear", "conv"]
)
@both_dtypes
def test_a_whole_network_in_one_call(calls, head, stages, batch, dtype):  # noqa: F811
    model = randomize(nn.Sequential(*gated(), *head())).to(dtype)
    fast = swap(model)
    assert runs(fast) == {"": [(0, len(model), stages)]}
    check_accuracy(model, fast, image(batch, 3, 12, 15).to(dtype))
    assert len(calls) == 1


def test_a_head_may_end_in_a_sigmoid(calls):  # noqa: F811
    model = randomize(nn.Sequential(*gated(), *head_of_linears(), nn.Sigmoid()))
    fast = swap(model)
    assert runs(fast) == {"": [(0, len(model), 12)]}
    check_accuracy(model, fast, image(2, 3, 12, 15))
    assert len(calls) == 1


@pytest.mark.parametrize("pad", [(0, 0, 0, 0), (1, 1, 1, 1)])
def test_a_padded_mean_is_no_mean(pad):
    """A 1x1 convolution that takes padding over gives more than one pixel."""
    size = (1 + sum(pad[:2])) * (1 + sum(pad[2:]))
    model = randomize(nn.Sequential(
        unit(3, 8), nn.AdaptiveAvgPool2d(1), nn.ZeroPad2d(pad), unit(8, 6), nn.Flatten(),
        nn.Linear(6 * size, 4),
    ))  # fmt: skip
    check_accuracy(model, swap(model), image(2, 3, 9, 8))


def test_a_sum_that_broadcasts_is_no_residual():
    """Over height and width: a convolution as large as its map, added to the map."""
    context = network(lambda self, x: x + self.f(x), f=unit(8, 8, (9, 8), act=None))
    model = randomize(finish(unit(3, 8), context, unit(8, 8)))
    check_accuracy(model, swap(model), image(2, 3, 9, 8))


class Net(nn.Module):
    """A body and a classifier with something between them that no run takes in."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*gated())
        self.classifier = nn.Sequential(*head_of_linears()[2:])

    def forward(self, x):
        return self.classifier(F.adaptive_avg_pool2d(self.body(x), 1).flatten(1) * 2)


@pytest.fixture
def net():
    return randomize(Net())


@both_dtypes
def test_a_classifier_by_itself(net, calls, dtype):  # noqa: F811
    net = net.to(dtype)
    fast = swap(net)
    assert runs(fast) == {"body": [(0, 3, 8)], "classifier": [(0, 4, 2)]}
    check_accuracy(net, fast, image(3, 3, 12, 15).to(dtype))
    assert len(calls) == 2
    with torch.no_grad():
        tokens = torch.randn(2, 7, 60, dtype=dtype)  # Linear takes more than (N, C)
        assert torch.equal(fast.classifier(tokens), net.classifier(tokens))
    assert len(calls) == 2


def test_networks_without_a_run_keep_their_linears():
    assert runs(swap(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval())) == {}


@pytest.mark.parametrize(
    "make,layers",
    [
        (lambda: models.mobilenet_v1(0.25, 500), {"": 28}),
        (lambda: mobilenet_v2(num_classes=500, width_mult=0.35), {"": 53}),
        (lambda: mobilenet_v3_small(num_classes=500), {"": 54}),
        (lambda: efficientnet_b0(num_classes=500), {"": 82}),
    ],
)
@both_dtypes
def test_real_networks(make, layers, dtype):
    model = randomize(make()).to(dtype)
    fast = swap(model)
    x = image(3, 3, 64, 96).to(dtype)
    check_accuracy(model, fast, x)
    told = str(explain(fast))
    for path, count in layers.items():
        assert f"{path or 'the model'}: {count} layers in one call each" in told


# ---- when it is taken --------------------------------------------------------------------------


def hook(net):
    seen = []
    net.body[1][1].fc1.register_forward_hook(lambda m, args, y: seen.append(y))
    return lambda: len(seen) == 1


def drop(net):
    net.classifier[2].train()


def parametrise(net):
    nn.utils.parametrize.register_parametrization(net.classifier[0], "weight", nn.Tanh())
    nn.utils.parametrize.register_parametrization(net.body[1][1].fc1, "weight", nn.Tanh())


def other_activation(net):
    net.body[1][1].activation = nn.Tanh()
    net.classifier[1] = nn.Tanh()


@pytest.mark.parametrize(
    "change,left", [(hook, 1), (drop, 1), (parametrise, 0), (other_activation, 0)]
)
def test_not_taken_where_somebody_could_tell(net, calls, change, left):  # noqa: F811
    fast = swap(net)
    x = image(2, 3, 12, 13)
    with torch.no_grad():
        fast(x)
        del calls[:]
        check = change(fast)
        torch.manual_seed(7)
        y = fast(x)
    assert len(calls) == left
    assert check is None or check()
    if change is not drop:
        other = copy.deepcopy(net)
        change(other)
        with torch.no_grad():
            torch.testing.assert_close(y, other(x), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_weight(net, calls):  # noqa: F811
    fast = swap(net)
    x = image(2, 3, 12, 13)
    fast(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in fast.named_parameters()}
    net.zero_grad()
    net(x).square().sum().backward()
    assert not calls
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("module", ["body.1.1.fc1", "body.1.1.fc2", "classifier.0", "classifier.3"])
@pytest.mark.parametrize("how", ["in place", "data", "load", "exchange"])
def test_no_stale_weights(net, calls, module, how):  # noqa: F811
    fast = swap(net)
    x = image(2, 3, 12, 13)
    with torch.no_grad():
        before = fast(x)
        layer = fast.get_submodule(module)
        if how == "in place":
            layer.weight.mul_(-3)
        elif how == "data":
            layer.weight.data[0].fill_(2.0)
        elif how == "load":
            layer.load_state_dict({k: v * -2 for k, v in layer.state_dict().items()})
        else:
            layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        y = fast(x)
        assert len(calls) == 4
        assert not torch.allclose(y, before)
        torch.testing.assert_close(y, one_by_one(fast, x), rtol=1e-4, atol=1e-5)


def test_copies_and_files(net, calls):  # noqa: F811
    fast = swap(net)
    x = image(2, 3, 12, 13)
    with torch.no_grad():
        y = fast(x)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(other(x), y)
            other.classifier[0].weight.zero_()
            assert not torch.equal(other(x), y)
            assert torch.equal(fast(x), y)
    assert len(calls) == 14


def test_explain_tells(net):
    fast = swap(net)
    row = {row.module: row for row in explain(fast).rows}["body.1.1.fc2"]
    assert (row.pattern, row.backend) == ("conv_pw 1x1 + hardsigmoid", "cpu")
    assert "in one call with" in row.reason
    row = {row.module: row for row in explain(swap(net.double())).rows}["body.1.1.fc2"]
    assert (row.backend, row.reason) == ("native", "no normalisation follows")


def test_stochastic_depth_rests_in_eval_alone(calls):  # noqa: F811
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.drop = unit(20, 20, act=None), StochasticDepth(0.5, "row")

        def forward(self, x):
            return self.drop(self.f(x)) + x

    model = randomize(finish(unit(3, 20), Residual(), unit(20, 20)))
    fast = swap(model)
    assert runs(fast) == {"": [(0, 3, 3)]}
    x = image(4, 3, 8, 9)
    check_accuracy(model, fast, x)
    assert len(calls) == 1
    fast[1].drop.train()
    with torch.no_grad():
        drawn = {fast(x).sum().item() for _ in range(8)}
    assert len(calls) == 1 and len(drawn) > 1
