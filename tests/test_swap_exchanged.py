"""swapped models whose modules or weights were exchanged for others afterwards."""

import copy
import pickle

import pytest
import torch
from networks import assert_same, dw_bn, image, randomize, two_layers
from torch import nn

from mnet_kernels.nn import FusedConv2d
from mnet_kernels.swap import explain, restore, sites, swap


def network():
    """Depthwise, dense, pooled, a Linear: one run on the CPU."""
    layers = [*dw_bn(16, nn.ReLU()), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Hardswish()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16)]
    return randomize(nn.Sequential(*layers, *head))


def called(fast, x):
    with torch.no_grad():
        fast(x)
    return fast


# --- modules --------------------------------------------------------------------------------


EXCHANGES = {
    "activation": (2, nn.SiLU()),
    "norm": (4, randomize(nn.BatchNorm2d(16), seed=3)),
    "convolution": (0, nn.Conv2d(16, 16, 5, padding=2, groups=16)),
    "head": (8, nn.Linear(16, 3)),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_swapping_anew_and_restoring_keep_what_was_exchanged(name):
    at, module = EXCHANGES[name]
    model, x = network(), image(2, 16, 7, 9)
    expected = copy.deepcopy(model)
    expected[at] = copy.deepcopy(module)
    fast = called(swap(model), x)
    fast[at] = copy.deepcopy(module)
    assert_same(expected, swap(fast), x)
    assert restore(fast) is model
    assert model[at] is fast[at]
    assert not any(isinstance(m, FusedConv2d) for m in model.modules())
    assert_same(expected, model, x)


def test_swapping_anew_after_adding_and_removing():
    model = nn.Sequential(network()[:5], nn.ReLU(), nn.Sigmoid())
    expected, x = copy.deepcopy(model), image(2, 16, 7, 9)
    fast = called(swap(model), x)
    for network_ in (expected, fast):
        network_[0] = network_[0][:3]  # a Sequential of its own around what was there
        network_.append(nn.Softplus())
        del network_[2]
    assert len(explain(fast).rows) == len(list(sites(fast))) == 1
    again = pickle.loads(pickle.dumps(fast))
    for swapped in (fast, again):
        assert_same(expected, swap(swapped), x)
    assert not any(isinstance(m, FusedConv2d) for m in restore(fast).modules())


def test_swapping_anew_keeps_settings_and_modes():
    model = two_layers()
    fast = swap(model).train()
    fast[0][1].eps, fast[0][1].momentum = 0.25, 0.5
    again = swap(fast)
    assert (again[0][1].eps, again[0][1].momentum) == (0.25, 0.5)
    assert again.training and again[0][1].training and not model.training


# --- weights --------------------------------------------------------------------------------


MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]
TRANSPOSED = {0: (2, 3), 3: (0, 1), 8: (0, 1)}  # square dimensions, by the module's position


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", TRANSPOSED)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_view_of_the_same_memory_is_another_weight(at, in_place, mode):
    model, x = network(), image(2, 16, 7, 9)
    fast = swap(model)
    with mode():
        before = fast(x)
    weight = fast[at].weight
    if in_place:
        with torch.no_grad():
            weight.transpose_(*TRANSPOSED[at])
    else:
        weight.data = weight.data.transpose(*TRANSPOSED[at])
    with mode():
        after = fast(x)
    torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, rtol=1e-3)


def test_a_view_of_the_same_memory_is_another_mean():
    model, x = network(), image(2, 16, 7, 9)
    fast = called(swap(model), x)
    for norm in (fast[1], fast[4]):
        norm.running_mean.data = norm.running_mean.data[:1].expand(16)
    assert_same(model, fast, x)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("whole", [True, False])
def test_weights_of_another_kernel_size(at, whole):
    """Native takes the size of the kernel from the weight."""
    model, x = network(), image(2, 16, 7, 9)
    model = model if whole else model[:5]
    fast = called(swap(model), x)
    fast[at].weight.data = nn.functional.pad(fast[at].weight.data, (1, 1, 1, 1)) + 0.1
    assert_same(model, fast, x)
    (row,) = [row for row in explain(fast).rows if row.module == str(at)]
    assert (row.backend, row.reason) == ("native", "its weight has been given another shape")


@pytest.mark.parametrize("at", [0, 3, 8])
@pytest.mark.parametrize("change", [lambda w: torch.cat([w, w], 1), lambda w: w[:, :1] * 2])
def test_weights_for_other_channels_are_native_errors(at, change):
    model, x = network(), image(2, 16, 7, 9)
    fast = called(swap(model), x)
    weight = change(fast[at].weight.detach())
    if weight.shape == fast[at].weight.shape:
        return
    fast[at].weight = model[at].weight = nn.Parameter(weight)
    errors = []
    for network_ in (model, fast):
        with pytest.raises(RuntimeError) as error, torch.no_grad():
            network_(x)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
