"""Small networks to swap, and what is asked of them."""

import copy

import torch
from torch import nn

from mnet_kernels.swap import explain, sites


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


def two_layers():
    """A depthwise and a dense site."""
    return randomize(nn.Sequential(dw_bn(act=nn.ReLU6()), dw_bn(groups=1, bias=True)))


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


def watch(module, args, output):
    assert isinstance(output, torch.Tensor)  # not the stand-in of a trace


def hooked(module):
    module.register_forward_hook(watch)
    return module
