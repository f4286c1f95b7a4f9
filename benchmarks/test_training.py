"""Training: depthwise layers forward and backward, and whole steps with the optimiser's update.

The layers' rows carry what is kept for backward too, as PyTorch's hooks for saved tensors see it:
the input, and everything that is computed from it, each block of memory once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from peers import LAST
from shapes import shapes
from torch import Tensor, nn

from mnet_kernels import swap
from mnet_kernels.models import mobilenet_v1
from mnet_kernels.training.recipe import nadam, step

LAYERS = shapes("mobilenet_v1")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: network, size, batch
STEPS = [
    ("mobilenet_v1 alpha 0.5", 32, 32), ("mobilenet_v1 alpha 0.5", 32, 128),
    ("mobilenet_v1 alpha 1", 224, 8), ("mobilenet_v1 alpha 1", 224, 32),
    ("mobilenet_v2", 224, 8), ("mobilenet_v3_large", 224, 8),
]  # fmt: skip
Call = Callable[[], Tensor]


def _layer(channels: int, kernel: int, stride: int, dtype: torch.dtype) -> nn.Sequential:
    conv = nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False, dtype=dtype
    )
    bn = nn.BatchNorm2d(channels)
    nn.init.uniform_(bn.weight, 0.5, 2), nn.init.normal_(bn.bias)
    return nn.Sequential(conv, bn, nn.ReLU6()).train()


def _compiled(module: nn.Module, warm_up: Callable[[nn.Module], object]) -> nn.Module | None:
    """torch.compile of a module in training; None where it fails (no C++ compiler, say)."""
    run = torch.compile(module, dynamic=False)
    try:
        warm_up(run), warm_up(run)
    except Exception as error:  # whatever the compiler throws
        print(f"torch.compile is left out: {type(error).__name__}: {error}")
        return None
    return run


def _away_from_kinks(layer: nn.Sequential, x: Tensor, margin: float) -> Tensor:
    """A random gradient of the result, 0 where ReLU6 turns: both derivatives are right there, and
    rounding decides."""
    z = copy.deepcopy(layer[:2]).double()(x.double())
    dy = torch.randn_like(z).to(x.dtype)
    return dy.masked_fill((z.abs() < margin) | ((z - 6).abs() < margin), 0).detach()


def _gradients(module: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """x's; those of the parameters are computed too."""
    return torch.autograd.grad(module(x), [x, *module.parameters()], dy)[0]


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """What a forward keeps for its backward besides parameters, each block of memory once."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            alive.append(t)  # its address is not given to another
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_layer(measure, shape, dtype):
    channels, height, width, kernel, stride, count = shape
    layer = _layer(channels, kernel, stride, DTYPES[dtype])
    ours = swap(copy.deepcopy(layer)).train()
    x = torch.randn(16, channels, height, width, dtype=DTYPES[dtype])
    dy = _away_from_kinks(layer, x, 1e-3 if dtype == "float32" else 0.1)
    exact = copy.deepcopy(layer).double()
    exact = _gradients(exact, x.double().requires_grad_(), dy.double())
    contiguous = x, dy
    last = x.to(memory_format=LAST), dy.to(memory_format=LAST)
    for t in (x, last[0]):
        t.requires_grad_()
    layer_last = copy.deepcopy(layer)
    peers: dict[str, Call] = {
        "eager": lambda: _gradients(layer, *contiguous),
        "eager channels_last": lambda: _gradients(layer_last, *last),
    }
    run = _compiled(copy.deepcopy(layer), lambda module: _gradients(module, *last))
    if run is not None:
        peers["torch.compile"] = lambda: _gradients(run, *last)
    kept = {"ours": kept_bytes(ours, last[0]), "eager": kept_bytes(layer_last, last[0])}
    measure(
        lambda: _gradients(ours, *last), peers, exact,
        tolerance=1e-4 if dtype == "float32" else 6e-2,
        others={"ours contiguous": lambda: _gradients(ours, *contiguous)}, grad=True,
        kind="training", model="mobilenet_v1", shape=list(shape[:5]), count=count, batch=16,
        dtype=dtype, direction="forward+backward", kept_bytes=kept,
        kept_share=kept["ours"] / kept["eager"],
    )  # fmt: skip


def _network(name: str, classes: int) -> nn.Module:
    """Without dropout, which would draw other numbers for everybody."""
    name, _, alpha = name.partition(" alpha ")
    if alpha:
        return mobilenet_v1(float(alpha), classes, dropout=0.0)
    return getattr(torchvision.models, name)(num_classes=classes, dropout=0.0)


@pytest.mark.parametrize("name,size,batch", STEPS)
def test_step(measure, name, size, batch):
    """A step of the recipe: forward, loss, backward, NAdam. Its error is that of the loss."""
    model = _network(name, 10 if size == 32 else 1000).train()
    x, y = torch.randn(batch, 3, size, size), torch.arange(batch) % 10
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(x.double())
    exact = nn.functional.cross_entropy(logits, y)
    last = x.to(memory_format=LAST)

    def stepping(module: nn.Module, x: Tensor) -> Call:
        optimizer = nadam(module, 1e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return lambda: step(module, optimizer, scaler, x, y)[0]

    def copied() -> nn.Module:
        return copy.deepcopy(model).to(memory_format=LAST)

    peers = {
        "eager": stepping(copy.deepcopy(model), x),
        "eager channels_last": stepping(copied(), last),
    }
    run = _compiled(copied(), lambda module: module(last).sum().backward())
    if run is not None:
        run.load_state_dict({f"_orig_mod.{k}": v for k, v in model.state_dict().items()})
        peers["torch.compile"] = stepping(run, last)
    measure(
        stepping(swap(copied()), last), peers, exact, tolerance=1e-3, grad=True, budget_s=12,
        others={"ours contiguous": stepping(swap(copy.deepcopy(model)), x)},
        kind="training", model=name, size=size, batch=batch,
        dtype="float32", direction="forward+backward",
    )  # fmt: skip
