"""swapped models: copied, pickled, restored, changed and trained afterwards."""

import copy
import pickle

import pytest
import torch
from networks import (
    ACTS,
    Residual,
    assert_same,
    dw_bn,
    fused,
    image,
    randomize,
    two_layers,
)
from torch import nn

from mnet_kernels.nn import FusedConv2d
from mnet_kernels.swap import explain, restore, sites, swap

# --- sharing, copying, going back -----------------------------------------------------------


def test_original_is_untouched_and_shared():
    model = two_layers()
    x = image(2, 8, 6, 6)
    with torch.no_grad():
        before = model(x)
    names = [(name, type(module)) for name, module in model.named_modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    fast = swap(model)
    fast(x)
    assert torch.equal(model(x), before)
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert restore(fast) is model
    ours, theirs = fast.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    assert all(ours[key] is theirs[key] for key in ours)
    assert isinstance(fast[0][0], nn.Conv2d) and isinstance(fast[0][1], nn.BatchNorm2d)
    assert type(fast) is type(model)


def test_modes_are_each_models_own():
    model = two_layers()
    fast = swap(model.train())
    assert fast.training and fast[0][1].training
    fast.eval()
    assert model.training and model[0][1].training


def test_deepcopy_stands_alone():
    fast = swap(two_layers())
    x = image(2, 8, 6, 6)
    before = fast(x)
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(fast(x), before)
    assert not copied(x).any()
    assert restore(copied) is not restore(fast)
    assert restore(copied)[0][0].weight is copied[0][0].weight


def test_save_and_load(tmp_path):
    fast = swap(two_layers())
    x = image(2, 8, 6, 6)
    before = fast(x)
    torch.save(fast, tmp_path / "fast.pt")
    loaded = torch.load(tmp_path / "fast.pt", weights_only=False)
    assert torch.equal(loaded(x), before)
    assert len(list(sites(loaded))) == 2
    assert not any(isinstance(m, FusedConv2d) for m in restore(loaded).modules())


def test_folds_are_not_saved():
    fast = swap(two_layers())
    size = len(pickle.dumps(fast))
    with torch.no_grad():
        fast(image(2, 8, 6, 6))
    assert len(pickle.dumps(fast)) == size


def test_references_between_modules_lead_to_the_copy():
    class Web(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = dw_bn(act=nn.ReLU())
            self.order = [self.block]
            self.run = self._run
            self.note = torch.zeros(3)

        def _run(self, x):
            return self.order[0](x)

        def forward(self, x):
            return self.run(x)

    model = randomize(Web())
    fast = swap(model)
    assert fast.order[0] is fast.block and fast.run.__self__ is fast
    assert fast.note is model.note
    assert len(fused(fast)) == 1
    assert_same(model, fast, image(2, 8, 6, 6))


def test_restore_brings_what_was_exchanged():
    model = two_layers()
    fast = swap(model).double()
    x = image(2, 8, 6, 6).double()
    torch.testing.assert_close(restore(fast)(x), fast(x))


def test_swapping_a_swapped_model():
    model = two_layers()
    fast = swap(swap(model))
    assert restore(fast) is model
    outer = nn.Sequential(fast, dw_bn())
    assert [row.reason for row in explain(swap(outer.eval())).rows] == ["fused already"] * 2 + [""]
    assert_same(model, fast, image(2, 8, 6, 6))


# --- nothing is stale -----------------------------------------------------------------------


def natively(fast, x):
    """The same model run module by module."""
    native = copy.deepcopy(fast)
    for _, module in sites(native):
        module.fusion.declined = "for comparison"
    return native(x)


def step(fast):
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.5)
    fast(image(2, 8, 6, 6)).square().mean().backward()
    optimizer.step()


def load_other(fast):
    fast.load_state_dict(randomize(two_layers(), seed=5).state_dict())


def load_assigned(fast):
    fast.load_state_dict(randomize(two_layers(), seed=5).state_dict(), assign=True)


def train_a_little(fast):
    fast.train()
    fast(image(2, 8, 6, 6, seed=3) * 4)
    fast.eval()


def each(action):
    def change(fast):
        with torch.no_grad():
            for layer in fast:
                action(layer)

    return change


CHANGES = {
    "load_state_dict": load_other,
    "load_state_dict_assign": load_assigned,
    "optimizer": step,
    "training": train_a_little,
    "eps": each(lambda layer: setattr(layer[1], "eps", 0.5)),
    "mean": each(lambda layer: layer[1].running_mean.add_(1)),
    "mean_data": each(lambda layer: layer[1].running_mean.data.add_(1)),
    "one_element_data": each(lambda layer: layer[1].bias.data[3:4].add_(1)),
    "gamma_new_data": each(lambda layer: setattr(layer[1].weight, "data", torch.rand(8))),
    "weight": each(lambda layer: layer[0].weight.mul_(2)),
    "weight_data": each(lambda layer: layer[0].weight.data.mul_(2)),
    "weight_new_data": each(
        lambda layer: setattr(layer[0].weight, "data", layer[0].weight.data * 2)
    ),
    "new_parameter": each(lambda layer: setattr(layer[1], "bias", nn.Parameter(torch.rand(8)))),
    "norm_without_affine": each(lambda layer: layer[1].register_parameter("weight", None)),
    "new_buffer": each(lambda layer: setattr(layer[1], "running_var", torch.rand(8) + 1)),
    "bias": lambda fast: fast[1][0].bias.data.add_(1),
    "channels_last": lambda fast: fast.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", CHANGES)
def test_no_stale_fold(name, mode):
    fast = swap(two_layers())
    x = image(2, 8, 6, 6)
    with mode():
        before = fast(x), fast(x)[0]  # fills whatever there is to fill
    CHANGES[name](fast)
    with mode():
        after = fast(x)
    torch.testing.assert_close(after, natively(fast, x), rtol=1e-4, atol=1e-5)
    assert name == "channels_last" or not torch.allclose(after, before[0], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_conversion(dtype):
    fast = swap(two_layers())
    fast(image(2, 8, 6, 6))
    fast.to(dtype)
    x = image(2, 8, 6, 6).to(dtype)
    y = fast(x)
    assert y.dtype == dtype
    assert_same(restore(fast), fast, x)


def test_converting_one_site():
    fast = swap(two_layers())
    x = image(2, 8, 6, 6)
    site = copy.deepcopy(fast[0]).double()[0]
    for y in (site.forward_native(x.double()), site(x.double())):
        torch.testing.assert_close(y, fast[0](x).double(), rtol=1e-4, atol=1e-5)


def test_converting_convolutions_leaves_their_norms():
    fast = swap(two_layers())
    for module in fast.modules():
        if isinstance(module, nn.Conv2d):
            module.to(torch.bfloat16)
    assert {t.dtype for name, t in fast.state_dict().items() if ".1." in name} == {
        torch.float32,
        torch.int64,
    }
    x = image(2, 8, 6, 6).to(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), restore(fast)(x), rtol=0.05, atol=0.05)


def test_inference_tensors():
    with torch.inference_mode():
        fast = swap(two_layers())
        x = image(2, 8, 6, 6)
        fast(x)
        fast[0][1].running_mean.add_(1)
        torch.testing.assert_close(fast(x), restore(fast)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_large_weight_of_a_dense_convolution(kernel, layout):
    model = randomize(nn.Sequential(nn.Conv2d(256, 256, kernel), nn.BatchNorm2d(256)))
    fast = swap(model.to(memory_format=layout))
    x = image(1, 256, 3, 3)
    for edit in (
        lambda w: w.data.mul_(2),
        lambda w: w.detach()[-1].mul_(2),
        lambda w: w.data[128:].mul_(2),
        lambda w: w.data[32:96].mul_(2),
        lambda w: w.data[:, 128:].mul_(2),
        lambda w: w.data[:, 32:96].mul_(2),
    ):
        with torch.no_grad():
            fast(x)
            edit(fast[0].weight)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_fold_made_in_inference_mode_serves_gradients():
    fast = swap(two_layers()).requires_grad_(False)
    x = image(2, 8, 6, 6)
    with torch.inference_mode():
        fast(x)
    fast(x.requires_grad_()).sum().backward()
    assert x.grad.any()


# --- training -------------------------------------------------------------------------------


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    return {"y": y.detach(), "x": x.grad, **found}


@pytest.mark.parametrize("make", [two_layers, lambda: nn.Sequential(Residual())])
def test_training_with_backend_native_is_native_to_the_bit(make):
    model = randomize(make()).train()
    fast = swap(copy.deepcopy(model), backend="native")
    x = image(2, 8, 6, 6)
    torch.testing.assert_close(gradients(fast, x), gradients(model, x), rtol=0, atol=0)
    torch.testing.assert_close(fast.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("groups", [1, 8])
def test_training_with_frozen_statistics(groups, act):
    model = randomize(dw_bn(act=copy.deepcopy(ACTS[act]), groups=groups, bias=True)).double()
    fast = swap(model)
    for network in (model.train(), fast.train()):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    x = image(2, 8, 6, 6).double()
    assert all(m.why_native(x.device, x.dtype) is None for _, m in sites(fast))
    torch.testing.assert_close(gradients(fast, x), gradients(model, x))


def test_each_norm_has_its_own_mode():
    fast = swap(two_layers()).eval()
    fast[1][1].train()
    why = [m.why_native("cpu", torch.float32) for _, m in sites(fast)]
    assert why[0] is None and "training mode" in why[1]
