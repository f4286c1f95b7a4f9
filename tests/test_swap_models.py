"""swap on the networks that people use: everything found, same answers, nothing else changed."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from mnet_kernels.nn import FusedConv2d
from mnet_kernels.swap import explain, restore, sites, swap

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
models = torchvision.models


def ours(**options):
    return pytest.importorskip("mnet_kernels.models").mobilenet_v1(**options)


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise, no BatchNorm."""

    def __init__(self, channels=16):
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 32), nn.GELU(), nn.Linear(32, channels))

    def forward(self, x):
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


frozen = partial(models.mobilenet_v2, norm_layer=torchvision.ops.FrozenBatchNorm2d)

#: name: (how to make it, sites, of which depthwise). What is not a site is a convolution without
#: BatchNorm: squeeze and excitation, and classifiers.
MODELS = {
    "mobilenet_v1": (ours, 27, 13),
    "mobilenet_v1_torch_padding": (partial(ours, alpha=0.25, padding="torch"), 27, 13),
    "tv_mobilenet_v2": (models.mobilenet_v2, 52, 17),
    "tv_mobilenet_v2_frozen": (frozen, 52, 17),
    "tv_mobilenet_v3_small": (models.mobilenet_v3_small, 34, 11),
    "tv_mobilenet_v3_large": (models.mobilenet_v3_large, 46, 15),
    "tv_mnasnet1_0": (models.mnasnet1_0, 52, 17),
    "tv_efficientnet_b0": (models.efficientnet_b0, 49, 16),
    "tv_resnet18": (models.resnet18, 20, 0),
    "tv_shufflenet": (models.shufflenet_v2_x0_5, 56, 19),
    "mobilenetv1_100": (partial(timm.create_model, "mobilenetv1_100"), 27, 13),
    "mobilenetv2_100": (partial(timm.create_model, "mobilenetv2_100"), 52, 17),
    "mobilenetv3_large_100": (partial(timm.create_model, "mobilenetv3_large_100"), 46, 15),
    "mobilenetv4_conv_small": (partial(timm.create_model, "mobilenetv4_conv_small"), 46, 15),
    "efficientnet_b0": (partial(timm.create_model, "efficientnet_b0"), 49, 16),
    "convnext_atto": (partial(timm.create_model, "convnext_atto"), 12, 12),
    "convnext_block": (lambda: nn.Sequential(nn.Conv2d(3, 16, 4, 4), ConvNeXtBlock()), 1, 1),
}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def made(name):
    """With statistics as after training, so that BatchNorm, activations and scales all matter."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                if module.weight is not None:
                    module.weight.uniform_(0.7, 1.3)
                    module.bias.uniform_(-0.3, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def depthwise(model):
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
    }


def test_model(name, pictures):
    """The whole contract, on one instance because making and swapping takes most of the time."""
    model = made(name)
    _, count, count_dw = MODELS[name]
    with torch.no_grad():
        before = model(pictures)
    attributes = [(type(module), dict(vars(module))) for module in model.modules()]
    fast = swap(model)

    # Everything that can be is fused.
    found = dict(sites(fast))
    assert depthwise(model) <= set(found)
    assert (len(found), len(depthwise(model))) == (count, count_dw)
    assert all(module.why_native("cpu", torch.float32) is None for module in found.values())

    # Answers: no further from float64 than native, twice over, or than a rounding a layer.
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(pictures.double())
        answer = fast(pictures)
    error, native_error = ((y - reference).abs().max() for y in (answer, before))
    rounding = torch.finfo(torch.float32).eps * reference.abs().max()
    assert error <= max(2 * native_error, len(found) * rounding)
    assert answer.stride() == before.stride()

    # The original is as it was; parameters are shared.
    with torch.no_grad():
        assert torch.equal(model(pictures), before)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == attributes
    shared, own = fast.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(shared) == list(own) and all(shared[key] is own[key] for key in own)
    assert restore(fast) is model

    # Copies.
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        torch.testing.assert_close(copied(pictures), answer, rtol=0, atol=0)
    assert all(isinstance(m, FusedConv2d) for _, m in sites(copied))

    # The table has every convolution once.
    rows = [row for row in explain(fast).rows if "conv" in row.pattern.lower()]
    convolutions = {path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {row.module for row in rows} == convolutions and len(rows) == len(convolutions)
    assert all(row.reason for row in rows if row.module not in found)


TRAINED = [
    "mobilenet_v1", "tv_mobilenet_v2_frozen", "tv_mobilenet_v3_small", "tv_resnet18",
    "mobilenetv4_conv_small", "efficientnet_b0",
]  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_natives(name, pictures):
    """In float64, at 64x64: at 32x32 the last norms see so few values that rounding blows up."""
    model = made(name).double()
    fast = swap(copy.deepcopy(model)).train()
    model.train()
    results = []
    for network in (model, fast):
        torch.manual_seed(1)  # dropout, stochastic depth
        y = network(pictures[:, :, :64, :64].double())
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in network.parameters()), *network.buffers()])
    for found, expected in zip(*reversed(results), strict=True):
        allowed = 1e-8 * float(expected.abs().max()) + 1e-12  # some gradients are nothing but noise
        torch.testing.assert_close(found, expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", ["tv_mobilenet_v3_small", "mobilenetv4_conv_small"])
def test_save_and_load(name, pictures, tmp_path):
    fast = swap(made(name))
    torch.save(fast, tmp_path / "fast.pt")
    loaded = torch.load(tmp_path / "fast.pt", weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pictures), fast(pictures), rtol=0, atol=0)
    fresh = made(name)
    fresh.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh(pictures), restore(fast)(pictures), rtol=0, atol=0)


def test_frozen_by_the_user(pictures):
    """Fine-tuning a torchvision network with its BatchNorms in eval mode."""
    model = made("tv_mobilenet_v3_small").double()
    fast = swap(copy.deepcopy(model))
    results = []
    for network in (model, fast):
        y = network(pictures[:1, :, :32, :32].double())
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in network.parameters())])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["tv_mobilenet_v2", "mobilenet_v1"])
def test_compile(name, pictures):
    fast = swap(made(name))
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pictures), fast(pictures), rtol=1e-3, atol=1e-4)


def test_export(pictures):
    fast = swap(made("tv_mobilenet_v2"))
    exported = torch.export.export(fast, (pictures,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(pictures), fast(pictures), rtol=1e-3, atol=1e-4)


def test_mobilenet_v1_absorbs_its_padding():
    fast = swap(made("mobilenet_v1"))
    pads = {path: module.fusion.pad for path, module in sites(fast) if any(module.fusion.pad)}
    assert pads == {"conv1": "same", **{f"conv_dw_{i}": (0, 0, 1, 1) for i in (2, 4, 6, 12)}}
    x = torch.randn(1, 32, 7, 7)
    assert fast.get_submodule("conv1_pad")(x) is fast.get_submodule("conv_pad_2")(x) is x


def test_layout_is_free_in_every_classifier():
    for name in ("tv_mobilenet_v2", "tv_mobilenet_v3_small", "tv_efficientnet_b0", "mobilenet_v1"):
        assert all(module.fusion.free_layout for _, module in sites(swap(made(name)))), name
    features = swap(made("tv_mobilenet_v2").features)
    assert not any(module.fusion.free_layout for _, module in sites(features))
