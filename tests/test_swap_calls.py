"""swapped models called in unusual ways: the answers and the errors of native."""

import copy

import pytest
import torch
from networks import assert_same, dw_bn, image, network, randomize, two_layers
from torch import nn
from torch.autograd import forward_ad

from mnet_kernels import ops
from mnet_kernels.swap import explain, restore, swap

# --- layout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_one_channel_images_keep_their_layout(kernel, training, gradients):
    """With one channel a tensor is contiguous and channels_last; .view asks for the first."""
    model = network(
        lambda self, x: self.norm(self.conv(x)).relu().view(x.size(0), -1),
        conv=nn.Conv2d(1, 16, kernel), norm=nn.BatchNorm2d(16),
    )  # fmt: skip
    fast, x = swap(copy.deepcopy(model)), image(4, 1, 8, 8)
    for net in (model, fast):
        net.train(training)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_conv_bn_act_of_one_channel_is_contiguous():
    x, weight = image(2, 1, 5, 6), image(8, 1, 3, 3)
    assert ops.conv_bn_act(x, weight, padding=1).is_contiguous()


# --- what native refuses --------------------------------------------------------------------

REFUSED = {
    "channels": image(2, 7, 6, 6),
    "integers": torch.ones(2, 8, 6, 6, dtype=torch.int64),
    "sparse": image(2, 8, 6, 6).to_sparse(),
    "no tensor": "x",
    "nothing": None,
    "two dimensions": image(8, 6),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("make", [two_layers, lambda: two_layers()[::-1], lambda: two_layers()[1:]])
def test_errors_are_those_of_native(name, make):
    model = make()
    fast = swap(model)
    errors = []
    for net in (model, fast):
        with pytest.raises((RuntimeError, TypeError)) as error, torch.no_grad():
            net(REFUSED[name])
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


# --- devices, dtypes, modes -----------------------------------------------------------------


def test_on_meta():
    real = two_layers()
    model = copy.deepcopy(real).to("meta")
    fast, x = swap(model), image(2, 8, 6, 6).to("meta")
    for training in (True, False):
        assert fast.train(training)(x).shape == model(x).shape
    fast.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert_same(real, fast, image(2, 8, 6, 6))


def test_defaults_of_device_and_dtype_change_nothing():
    model, x = two_layers(), image(2, 8, 6, 6)
    expected = [row.backend for row in explain(swap(model)).rows]
    with torch.device("meta"):
        fast = swap(model)
        with torch.no_grad():
            fast(x)
    assert [row.backend for row in explain(fast).rows] == expected
    assert_same(model, fast, x)
    torch.set_default_dtype(torch.float64)
    try:
        fast = swap(model)
        assert [row.backend for row in explain(fast).rows] == expected
        assert_same(model, fast, x)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("gradients", [False, True])
def test_forward_mode_differentiation(gradients):
    model, x = two_layers(), image(2, 8, 6, 6)
    fast, direction = swap(model), image(2, 8, 6, 6, seed=4)
    found = []
    for net in (model, fast):
        with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
            found.append(forward_ad.unpack_dual(net(forward_ad.make_dual(x, direction))))
    torch.testing.assert_close(found[1].primal, found[0].primal, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].tangent, found[0].tangent, rtol=1e-4, atol=1e-5)


# --- parts without Python code --------------------------------------------------------------


def test_scripted_parts_stay_as_they_are():
    first = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    model = nn.Sequential(torch.jit.script(first), dw_bn(act=nn.ReLU())).eval()
    randomize(model[1])
    fast, x = swap(model), image(2, 3, 8, 8)
    assert [(row.module, row.backend) for row in explain(fast).rows] == [("1.0", "cpu")]
    assert_same(nn.Sequential(first, model[1]), fast, x)
    assert_same(nn.Sequential(first, model[1]), restore(fast), x)
    assert_same(nn.Sequential(first, model[1]), swap(fast), x)
