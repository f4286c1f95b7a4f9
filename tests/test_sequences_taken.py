"""Runs of convolutions in one call: only where nobody can tell, and never with stale constants."""

# ruff: noqa: F811 (fixtures)
from __future__ import annotations

import copy
import io

import pytest
import torch
from networks import Forward, image, network, randomize
from test_sequences import Net, calls, net, one_by_one, unit  # noqa: F401
from torch import nn

from mnet_kernels.nn import FusedConv2d
from mnet_kernels.swap import explain, restore, swap


def hook_inside(fast):
    seen = []
    fast[2].conv[1].register_forward_hook(lambda m, args, y: seen.append(y))
    return lambda: len(seen)


def other_child(fast):
    fast[3] = copy.deepcopy(fast[4])


def other_child_inside(fast):
    fast[3].conv[0] = copy.deepcopy(fast[4].conv[0])


def pooled_forward(fast):
    block = fast[3]
    block.forward = lambda x: type(block).forward(block, x) * 2


def decline(fast):
    fast[2].conv[1][0].fusion.declined = "said so"


def one_norm_in_training(fast):
    fast[2].conv[1][1].train()


def double(fast):
    fast.double()


@pytest.mark.parametrize(
    "change",
    [
        hook_inside, other_child, other_child_inside, pooled_forward, decline,
        one_norm_in_training, double,
    ],
)  # fmt: skip
def test_not_taken_where_somebody_could_tell(net, calls, change):
    fast = swap(net)
    x = image(2, 3, 20, 20)
    with torch.no_grad():
        fast(x)
        assert len(calls) == 1
        check = change(fast)
        if change is double:
            x = x.double()
        y = fast(x)
    assert len(calls) == 1
    fast[0][1].eps = fast[0][1].eps  # nothing: the copy below starts from the same state
    if change is not one_norm_in_training:  # its statistics move at every call
        assert torch.equal(y, one_by_one(fast, x))
    assert check is None or check() >= 1


def test_not_taken_for_other_inputs(net, calls):
    fast = swap(net)
    x = image(2, 3, 20, 20)
    for other in (x.double(), x.half()):
        with pytest.raises(RuntimeError):
            fast(other)
    for wrong in (image(2, 4, 20, 20), image(3, 20, 20)):
        try:
            expected = net(wrong)
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error)):
                fast(wrong)
        else:
            torch.testing.assert_close(fast(wrong), expected)
    assert fast(x[:0]).shape == (0, 5)
    assert not calls


def test_gradients_go_one_by_one(net, calls):
    fast = swap(net)
    x = image(2, 3, 20, 20)
    fast(x).sum().backward()
    ours = {name: p.grad.clone() for name, p in fast.named_parameters()}
    net.zero_grad()
    net(x).sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-4)
    fast.requires_grad_(False)
    fast(x.requires_grad_()).sum().backward()
    assert not calls
    fast(x.detach())
    assert len(calls) == 1


def test_autocast_and_training_mode(net, calls):
    fast = swap(net)
    x = image(2, 3, 20, 20)
    with torch.no_grad(), torch.autocast("cpu"):
        assert fast(x).dtype == torch.bfloat16
    with torch.no_grad():
        fast.train()(x)
    assert not calls


def test_compile_export_and_trace(net, calls):
    fast = swap(net)
    x = image(2, 3, 20, 20)
    with torch.no_grad():
        expected = one_by_one(fast, x)
        assert torch.allclose(torch.compile(fast, backend="aot_eager", fullgraph=True)(x), expected)
        assert torch.allclose(torch.export.export(fast, (x,)).module()(x), expected)
        assert not calls
        traced = torch.jit.trace(fast, x, check_trace=False)
        assert torch.allclose(traced(x), expected)
        assert "conv_sequence" not in str(traced.inlined_graph)


def weight_in_place(fast):
    fast[2].conv[0][0].weight.mul_(1.5)


def weight_data(fast):
    fast[5][0].weight.data = fast[5][0].weight.data * 2


def weight_exchanged(fast):
    fast[1].conv[1][0].weight = nn.Parameter(torch.randn(20, 1, 3, 3))


def statistics(fast):
    fast[1].conv[1][1].running_var.data.mul_(3)


def eps(fast):
    fast[0][1].eps = 0.7


def stride(fast):
    fast[0][0].stride = (1, 1)


def checkpoint(fast):
    fast.load_state_dict(randomize(Net(), seed=9).state_dict())


@pytest.mark.parametrize(
    "change", [weight_in_place, weight_data, weight_exchanged, statistics, eps, stride, checkpoint]
)
def test_no_stale_constants(net, calls, change):
    fast = swap(net)
    x = image(2, 3, 20, 20)
    with torch.no_grad():
        before = fast(x)
        change(fast)
        after = fast(x)
    assert len(calls) == 2
    assert not torch.allclose(before, after)
    assert torch.equal(after, one_by_one(fast, x))


def test_copies_and_files(net, calls):
    fast = swap(net)
    x = image(1, 3, 20, 20)
    with torch.no_grad():
        y = fast(x)
        other = copy.deepcopy(fast)
        other[5][0].weight.zero_()
        assert not torch.equal(other(x), y)
        assert torch.equal(fast(x), y)
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded(x), y)
        assert len(calls) == 4
    assert not isinstance(restore(fast)[0][0], FusedConv2d)
    assert "forward" not in net.__dict__


def test_what_is_done_to_a_copy_is_seen(net, calls):
    fast = copy.deepcopy(swap(net))
    x = image(1, 3, 20, 20)
    with torch.no_grad():
        y = fast(x)
        block = fast[3]
        block.forward = lambda x: type(block).forward(block, x) * 2
        assert not torch.equal(fast(x), y)
        del block.forward
        fast[5][0].stride = (2, 2)
        after = fast(x)
    assert len(calls) == 2
    assert not torch.equal(after, y)
    assert torch.equal(after, one_by_one(fast, x))


def test_explain_tells(net):
    assert "the model: 14 layers in one call each" in str(explain(swap(net)))


def test_list_of_layers_called_otherwise(calls):
    """A forward that steps through a Sequential itself never meets the run."""
    layers = nn.Sequential(unit(3, 6), unit(6, 6), unit(6, 6))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3)) * 2

    model = network(forward, layers=layers)
    assert isinstance(model, Forward)
    fast = swap(model)
    x = image(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert not calls
