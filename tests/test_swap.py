"""swap, restore, explain on small networks built to hit one rule each."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from mnet_kernels import backends, decisions, ops
from mnet_kernels.nn import DepthwiseConvBNAct, FusedConv2d
from mnet_kernels.nn.fused import _found
from mnet_kernels.swap import explain, restore, sites, swap


def randomize(model, seed=0):
    """Statistics and affine parameters as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, low, high in [
                ("running_mean", -0.5, 0.5),
                ("running_var", 0.5, 2),
                ("weight", 0.5, 1.5),
                ("bias", -0.5, 0.5),
            ]:
                value = getattr(module, name, None)
                if value is not None and hasattr(module, "running_mean"):
                    value.uniform_(low, high, generator=generator)
    return model.eval()


def image(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fused(fast):
    return {path: module.fusion for path, module in sites(fast)}


def reasons(fast):
    return {row.module: row.reason for row in explain(fast).rows}


def assert_same(model, fast, x, depth=4):
    """No further from float64 than native is, twice over, or than one rounding a layer."""
    reference = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        native, ours = model(x), fast(x)
    assert (ours.shape, ours.dtype, ours.stride()) == (native.shape, native.dtype, native.stride())
    errors = [(y.double() - reference).abs().max().item() for y in (native, ours)]
    rounding = torch.finfo(x.dtype).eps * reference.abs().max().item()
    assert errors[1] <= max(2 * errors[0], depth * rounding)


def dw_bn(channels=8, act=None, **options):
    options = {"kernel_size": 3, "padding": 1, "groups": channels, "bias": False, **options}
    layers = [nn.Conv2d(channels, channels, **options), nn.BatchNorm2d(channels)]
    return nn.Sequential(*layers, *([] if act is None else [act]))


class Forward(nn.Module):
    """Named children, and a forward given as a function: the network under test in one line."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def network(forward, **children):
    """A module of a class of its own, with this forward."""
    module = Forward(**children)
    module.__class__ = type("Network", (Forward,), {"forward": forward})
    return randomize(module)


# --- what is found and what it computes -----------------------------------------------------


ACTS = {
    "identity": None,
    "relu": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(inplace=True),
    "hardsigmoid": nn.Hardsigmoid(),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2, 8], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("name", ACTS)
def test_conv_norm_act(name, groups, layout):
    model = randomize(dw_bn(act=copy.deepcopy(ACTS[name]), groups=groups, stride=2, bias=True))
    fast = swap(model)
    (fusion,) = fused(fast).values()
    assert fusion.norm is fast[1]
    assert fusion.activation == name
    if name == "leaky_relu":
        assert fusion.slope == pytest.approx(0.2)
    assert_same(model, fast, image(2, 8, 9, 11).to(memory_format=layout))


@pytest.mark.parametrize(
    "activate",
    [
        lambda x: F.relu(x),
        lambda x: F.relu(x, inplace=True),
        lambda x: torch.relu(x),
        lambda x: x.relu(),
        lambda x: x.relu_(),
        lambda x: F.relu6(x),
        lambda x: F.hardtanh(x, 0.0, 6.0),
        lambda x: x.clamp(0, 6),
        lambda x: torch.clamp(x, min=0, max=6),
        lambda x: F.hardswish(x),
        lambda x: F.silu(x),
        lambda x: F.leaky_relu(x, 0.3),
    ],
)
def test_functional_activation(activate):
    model = network(lambda self, x: activate(self.block(x)), block=dw_bn())
    fast = swap(model)
    (fusion,) = fused(fast).values()
    assert fusion.activation != "identity"
    assert_same(model, fast, image(2, 8, 9, 11))


@pytest.mark.parametrize("activate", [torch.tanh, F.gelu, lambda x: F.elu(x), torch.abs])
def test_unknown_activation_stays(activate):
    model = network(lambda self, x: activate(self.block(x)), block=dw_bn())
    fast = swap(model)
    assert [fusion.activation for fusion in fused(fast).values()] == ["identity"]
    assert_same(model, fast, image(2, 8, 9, 11))


PADDINGS = {
    "int": ({"padding": 2}, None, (0, 0, 0, 0)),
    "pair": ({"padding": (0, 2)}, None, (0, 0, 0, 0)),
    "same": ({"padding": "same", "kernel_size": 4, "stride": 1}, None, (0, 0, 0, 0)),
    "valid": ({"padding": "valid"}, None, (0, 0, 0, 0)),
    "module": ({"padding": 0}, nn.ZeroPad2d((0, 1, 2, 3)), (2, 0, 3, 1)),
    "both": ({"padding": 1}, nn.ZeroPad2d((0, 1, 0, 1)), (0, 0, 1, 1)),
    "function": ({"padding": 0}, lambda x: F.pad(x, [1, 0, 3, 2]), (3, 1, 2, 0)),
    "nonzero": ({"padding": 0}, nn.ConstantPad2d(1, 0.5), (0, 0, 0, 0)),
    "crop": ({"padding": 1}, nn.ZeroPad2d((0, -1, 0, 1)), (0, 0, 0, 0)),
    "reflect": ({"padding": 0}, nn.ReflectionPad2d(1), (0, 0, 0, 0)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("name", PADDINGS)
def test_padding(name, groups):
    options, pad, expected = PADDINGS[name]
    block = dw_bn(act=nn.ReLU(), groups=groups, **{"stride": 2, **options})
    if isinstance(pad, nn.Module):
        model = randomize(nn.Sequential(copy.deepcopy(pad), block))
    elif pad is not None:
        model = network(lambda self, x: self.block(pad(x)), block=block)
    else:
        model = randomize(block)
    fast = swap(model)
    (fusion,) = fused(fast).values()
    assert fusion.pad == expected
    assert_same(model, fast, image(2, 8, 9, 11))


class OwnHardswish(nn.Module):
    def forward(self, x):
        return x * (x + 3).clamp(0, 6) / 6


def test_activation_module_of_ones_own():
    model = randomize(nn.Sequential(dw_bn(act=OwnHardswish()), dw_bn(act=OwnHardswish())))
    fast = swap(model)
    assert [f.act for f in fused(fast).values()] == [fast[0][2], fast[1][2]]
    assert [f.activation for f in fused(fast).values()] == ["hardswish"] * 2
    assert_same(model, fast, image(2, 8, 5, 5))


def test_identity_between_is_passed_over():
    model = randomize(nn.Sequential(*dw_bn(), nn.Identity(), nn.Dropout(0.0), nn.ReLU()))
    fast = swap(model)
    (fusion,) = fused(fast).values()
    assert fusion.activation == "relu"
    assert_same(model, fast, image(2, 8, 5, 5))


def test_depthwise_alone_and_with_activation():
    conv = nn.Conv2d(8, 16, 7, padding=3, groups=8)
    model = randomize(
        nn.Sequential(conv, nn.GroupNorm(2, 16), copy.deepcopy(dw_bn(16)[0]), ACTS["silu"])
    )
    fast = swap(model)
    assert [f.activation for f in fused(fast).values()] == ["identity", "silu"]
    assert_same(model, fast, image(2, 8, 9, 9))


def test_dense_without_norm_is_left_alone():
    fast = swap(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 1), nn.Conv2d(1, 4, 3))
    )
    assert not fused(fast)
    assert reasons(fast) == {
        "0": "no normalisation follows",
        "2": "a Conv1d: only Conv2d is fused",
        "3": "no normalisation follows",
    }


@pytest.mark.parametrize("model", [nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3)])
def test_a_convolution_by_itself(model):
    fast = swap(model)
    assert len(fused(fast)) == (model.groups == 8)
    assert_same(model, fast, image(2, 8, 9, 9))


# --- what must not be fused -----------------------------------------------------------------


def alone(**options):
    return nn.Conv2d(8, 8, 1, **options)


class OddConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


def watch(module, args, output):
    assert isinstance(output, torch.Tensor)  # not the stand-in of a trace


def hooked(module):
    module.register_forward_hook(watch)
    return module


def old_weight_norm(conv):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated
        return weight_norm(conv)


class OddNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 1.5


NOT_FUSED = {
    "used twice": (
        lambda self, x: self.norm(y := self.conv(x)) + y,
        {"conv": alone(), "norm": nn.BatchNorm2d(8)},
        "its result is used 2 times",
    ),
    "two norms": (
        lambda self, x: self.norm(self.conv(x)) + self.other(self.conv(x)),
        {"conv": alone(), "norm": nn.BatchNorm2d(8), "other": nn.BatchNorm2d(8)},
        "its calls are followed by different things",
    ),
    "shared norm": (
        lambda self, x: self.norm(self.norm(self.conv(x))),
        {"conv": alone(), "norm": nn.BatchNorm2d(8)},
        "norm norm is also used elsewhere",
    ),
    "no statistics": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": alone(), "norm": nn.BatchNorm2d(8, track_running_stats=False)},
        "the norm keeps no running statistics",
    ),
    "odd conv": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": OddConv(8, 8, 1), "norm": nn.BatchNorm2d(8)},
        "its class OddConv changes what Conv2d does",
    ),
    "odd norm": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": alone(), "norm": OddNorm(8)},
        "the norm computes something other than BatchNorm and a known activation",
    ),
    "circular": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "norm": nn.BatchNorm2d(8)},
        "padding_mode is 'circular'",
    ),
    "hooked conv": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": hooked(alone()), "norm": nn.BatchNorm2d(8)},
        "Conv2d has hooks",
    ),
    "hooked norm": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": alone(), "norm": hooked(nn.BatchNorm2d(8))},
        "BatchNorm2d has hooks",
    ),
    "hook between": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": hooked(nn.Sequential(alone())), "norm": nn.BatchNorm2d(8)},
        "a hook would see what passes between",
    ),
    "old weight norm": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": old_weight_norm(alone()), "norm": nn.BatchNorm2d(8)},
        "Conv2d has hooks",
    ),
    "new weight norm": (
        lambda self, x: self.norm(self.conv(x)),
        {"conv": parametrizations.weight_norm(alone()), "norm": nn.BatchNorm2d(8)},
        "its class ParametrizedConv2d changes what Conv2d does",
    ),
    "training differs": (
        lambda self, x: self.norm(self.conv(x) * 2 if self.training else self.conv(x)),
        {"conv": alone(), "norm": nn.BatchNorm2d(8)},
        "used differently in training and in eval mode",
    ),
    "returned": (
        lambda self, x: (y := self.conv(x), self.norm(y)),
        {"conv": alone(), "norm": nn.BatchNorm2d(8)},
        "its result is used 2 times",
    ),
    "uncalled": (
        lambda self, x: F.conv2d(x, self.conv.weight),
        {"conv": alone(), "norm": nn.BatchNorm2d(8)},
        "not called in eval mode",
    ),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_not_fused(name):
    forward, children, reason = NOT_FUSED[name]
    model = network(forward, **children)
    fast = swap(model)
    assert not fused(fast)
    assert reason in reasons(fast).values()
    x = image(2, 8, 6, 6)
    for training in (False, True):  # and answers as before, in both modes
        model.train(training)
        fast.train(training)
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)


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


class Residual(nn.Module):
    """As in ResNet: one ReLU, also after the addition."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1, self.bn1 = dw_bn(channels)
        self.conv2, self.bn2 = dw_bn(channels, groups=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + x)


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


# --- sharing, copying, going back -----------------------------------------------------------


def two_layers():
    """A depthwise and a dense site."""
    return randomize(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn(groups=1, bias=True)))


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
    site = copy.deepcopy(fast[0][0]).double()
    for y in (site.forward_native(x.double()), site(x.double())):
        torch.testing.assert_close(y, fast[0](x).double(), rtol=1e-4, atol=1e-5)


def test_inference_tensors():
    with torch.inference_mode():
        fast = swap(two_layers())
        x = image(2, 8, 6, 6)
        fast(x)
        fast[0][1].running_mean.add_(1)
        torch.testing.assert_close(fast(x), restore(fast)(x), rtol=1e-4, atol=1e-5)


def test_the_large_weight_of_a_dense_convolution():
    model = randomize(nn.Sequential(nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256)))
    fast = swap(model)
    x = image(1, 256, 2, 2)
    for edit in (lambda w: w.data.mul_(2), lambda w: w.detach()[-1].mul_(2)):
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


# --- layout ---------------------------------------------------------------------------------


def layouts_freed(forward, **children):
    model = network(forward, stem=dw_bn(groups=1, act=nn.ReLU()), **children)
    fast = swap(model)
    assert_same(model, fast, image(2, 8, 6, 6))
    return fused(fast)["stem.0"].free_layout


def test_layout_is_free_where_nobody_sees_it():
    pool = nn.AdaptiveAvgPool2d(1)
    assert layouts_freed(lambda self, x: self.pool(self.stem(x)).flatten(1), pool=pool)
    assert layouts_freed(lambda self, x: torch.flatten(self.stem(x), 1))
    assert layouts_freed(lambda self, x: self.stem(x).mean([2, 3]))
    assert layouts_freed(
        lambda self, x: (y := self.stem(x), y * y.mean((2, 3), True))[1].mean((2, 3))
    )
    assert layouts_freed(lambda self, x: torch.cat([self.stem(x), x], 1).sigmoid().mean((-1, -2)))
    assert layouts_freed(lambda self, x: F.max_pool2d(F.gelu(self.stem(x)), 2).flatten(1))


class ViewingConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.view(len(x), -1).view(x.shape))


def test_layout_is_kept_where_somebody_might():
    viewing = ViewingConv(8, 8, 1)
    assert not layouts_freed(lambda self, x: self.other(self.stem(x)).flatten(1), other=viewing)
    assert not layouts_freed(lambda self, x: self.stem(x).flatten(end_dim=1))
    assert not layouts_freed(lambda self, x: self.stem(x).mean([x.dim() - 1, 2]).view(2, -1))
    assert not layouts_freed(lambda self, x: self.stem(x).mean(1, keepdim=True).view(2, -1))
    assert not layouts_freed(lambda self, x: self.stem(x))
    assert not layouts_freed(lambda self, x: self.stem(x).view(2, -1))
    assert not layouts_freed(lambda self, x: self.stem(x).flatten(2))
    assert not layouts_freed(lambda self, x: self.stem(x).sigmoid().view(2, -1))
    assert not layouts_freed(
        lambda self, x: (y := self.stem(x)).mean((2, 3)) + y.view(2, 8, -1)[:, :, 0]
    )
    assert not layouts_freed(lambda self, x: self.stem(x).as_strided((2, 3), (3, 1)))
    assert not layouts_freed(
        lambda self, x: self.other(self.stem(x)).flatten(1), other=hooked(nn.ReLU())
    )


def test_dense_site_runs_in_channels_last():
    model = nn.Sequential(dw_bn(groups=1), nn.Flatten()).eval()
    fast = swap(model)
    seen = []
    fast[0].register_forward_hook(lambda module, args, y: seen.append(y))
    fast(image(2, 8, 6, 6))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


# --- decisions and the table ----------------------------------------------------------------


def test_measured_decisions(monkeypatch, tmp_path):
    model = two_layers()
    times = iter([(1.0, 2.0), (3.0, 1.0)])
    monkeypatch.setattr(
        decisions, "_race", lambda ways, x: dict(zip(ways, next(times), strict=True))
    )
    x = image(2, 8, 6, 6)
    fast = swap(model.train(), example_inputs=x).eval()
    assert model.training and next(times, None) is None
    assert [row.reason for row in explain(fast).rows] == ["left native: measured 0.50x", ""]
    assert [row.backend for row in explain(fast).rows] == ["native", "folded"]
    assert_same(model.eval(), fast, x)
    explain(fast).save(tmp_path / "decisions.json")
    again = swap(model, decisions=tmp_path / "decisions.json")
    assert explain(again).rows == explain(fast).rows


@pytest.fixture
def _choices_forgotten():
    yield
    _found.cache_clear()


@pytest.mark.usefixtures("_choices_forgotten")
def test_the_fastest_of_several_backends_is_chosen(monkeypatch, tmp_path):
    """Where two can serve, as cuda and triton on a GPU: here triton is let on the CPU."""
    served = []

    def triton(*args):
        served.append("triton")
        return ops._dwconv_bn_act(*args)

    monkeypatch.setitem(backends._PREDICATES, "triton", lambda device, dtype: None)
    monkeypatch.setattr(ops, "_triton_dwconv_bn_act", triton)
    times = {"native": 3.0, "cpu": 2.0, "triton": 1.0}

    def race(ways, x):
        for call in ways.values():
            call(x)
        return {name: times.get(name, 1.0) for name in ways}

    monkeypatch.setattr(decisions, "_race", race)
    model, x = two_layers(), image(2, 8, 6, 6)
    fast = swap(model, example_inputs=x)
    row = explain(fast).rows[0]
    assert (row.backend, row.reason) == ("triton", "measured faster than the usual backend")
    del served[:]
    assert_same(model, fast, x)
    assert served == ["triton"]
    explain(fast).save(tmp_path / "decisions.json")
    assert explain(swap(model, decisions=tmp_path / "decisions.json")).rows == explain(fast).rows
    assert explain(swap(model, "cpu", example_inputs=x)).rows[0].backend == "cpu"
    times["native"] = 0.5
    assert explain(swap(model, example_inputs=x)).rows[0].reason == "left native: measured 0.50x"


def test_measuring_for_real_changes_nothing_else():
    model = two_layers()
    before = copy.deepcopy(model.state_dict())
    fast = swap(model, example_inputs=(image(2, 8, 6, 6),))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in fast.modules())
    assert_same(model, fast, image(2, 8, 6, 6))


GOOD = {
    "0.0": {"pattern": "conv_dw 3x3 + bn + relu6", "native": None},
    "1.0": {"pattern": "conv 3x3 + bn", "native": "slow"},
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ([], "expected an object, got list"),
        ({}, "the model has site '0.0', the other has not"),
        ({**GOOD, "x": GOOD["0.0"]}, "the file has site 'x', the other has not"),
        ({**GOOD, "0.0": None}, """site '0.0': expected "pattern" and "native", got None"""),
        ({**GOOD, "0.0": {"pattern": "conv"}}, "site '0.0': expected"),
        ({**GOOD, "0.0": GOOD["1.0"]}, "expected 'conv_dw 3x3 + bn + relu6', got 'conv 3x3 + bn'"),
        (
            {**GOOD, "1.0": {**GOOD["1.0"], "native": 1}},
            """site '1.0': "native": expected null or a reason, got 1""",
        ),
        (
            {**GOOD, "1.0": {**GOOD["1.0"], "backend": "gpu"}},
            """site '1.0': "backend": expected null or one of cpu, cuda, triton,""",
        ),
        (None, "cannot be read"),
    ],
)
def test_bad_decisions(tmp_path, content, message):
    path = tmp_path / "decisions.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as caught:
        swap(two_layers(), decisions=path)
    assert str(caught.value).startswith(f"swap: decisions: {path}: ")
    assert message in str(caught.value)


def test_decisions_of_a_file(tmp_path):
    path = tmp_path / "decisions.json"
    path.write_text(json.dumps(GOOD))
    assert [f.declined for f in fused(swap(two_layers(), decisions=str(path))).values()] == [
        None,
        "slow",
    ]


def test_the_table():
    model = nn.Sequential(*two_layers(), nn.Conv2d(8, 8, 1)).eval()
    explanation = explain(swap(model))
    assert [(r.module, r.pattern, r.backend, r.reason) for r in explanation.rows] == [
        ("0.0", "conv_dw 3x3 + bn + relu6", "cpu", ""),
        ("1.0", "conv 3x3 + bn", "folded", ""),
        ("2", "conv_pw 1x1", "native", "no normalisation follows"),
    ]
    text = str(explanation)
    assert "\x1b" not in text
    for row in explanation.rows:
        assert row.module in text and row.pattern in text and row.reason in text
    assert "2 of 3 rows run fused" in text


def test_repr_tells_what_is_fused():
    assert "fused=norm+relu6" in repr(swap(two_layers()))


# --- bad input ------------------------------------------------------------------------------


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
