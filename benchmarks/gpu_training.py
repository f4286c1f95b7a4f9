"""What `make gpu` times of training on a device: depthwise layers forward and backward, and whole
training steps with their memory, ours beside plain PyTorch. How: gpu_timing.py.

The bytes of a layer are those of five passes over memory: the convolution with its statistics, and
with its output; the backward's sums, and all else of it: five times x and three times y. Where the
CUDA backward can be that one pass, its kernels are timed beside those of three steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_networks
import gpu_timing
import torch
from gpu_timing import DTYPES, LAYOUTS, Race, Row, beside, engine, inputs_for
from shapes import shapes
from torch import Tensor, nn

import mnet_kernels
from mnet_kernels import _cuda, backends, models, swap

#: |error| / |gradient| in the norm that is no longer rounding.
TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-4, "float16": 5e-3}
PEERS = 0.1
#: The CUDA kernels of a backward that are forced in turn (_cuda.backward_variants).
BACKWARDS = ("one_pass", "stream")
Results = tuple[Tensor, ...]


def backends_of_ours() -> list[str]:
    device = gpu_timing.DEVICE
    return [n for n in ("cuda", "triton") if backends.why_not(n, device=device) is None]


class Layer(nn.Module):
    """conv + bn + ReLU6 in training mode: in plain PyTorch, or by one of our backends."""

    def __init__(self, shape: tuple[int, ...], backend: str | None = None):
        super().__init__()
        channels, _, _, kernel, stride, *_ = shape
        self.conv = nn.Conv2d(
            channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
        )
        self.bn, self.backend = nn.BatchNorm2d(channels), backend

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = self.conv, self.bn
        # As autocast would have it: activations and this weight in the dtype, the rest in float32.
        weight = conv.weight.to(x.dtype)
        if self.backend is None:
            z = nn.functional.conv2d(x, weight, None, conv.stride, conv.padding, 1, conv.groups)
            return nn.functional.relu6(bn(z))
        return mnet_kernels.dwconv_bn_act_training(
            x, weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, stride=conv.stride,
            padding=conv.padding, activation="relu6", backend=self.backend,
        )  # fmt: skip


def step_of(layer: Callable[[Tensor], Tensor], parameters: list[Tensor], dy: Tensor, x: Tensor):
    """(y, dx, dweight, dgamma, dbeta)."""
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)


def exact_step(layer: Layer, x: Tensor, dy: Tensor) -> Results:
    """In float64, of the weight rounded to x's dtype."""
    wide = copy.deepcopy(layer).double()
    wide.backend = None
    with torch.no_grad():
        wide.conv.weight.copy_(layer.conv.weight.to(x.dtype))
    x = x.detach().double().requires_grad_()
    return step_of(wide, list(wide.parameters()), dy.double(), x)


def off(found: Results, exact: Results) -> float:
    """The worst |error| / |exact| in the norm."""
    errors = [
        ((mine.double() - right).norm() / right.norm()).item()
        for mine, right in zip(found, exact, strict=True)
    ]
    return max(errors)


@torch.enable_grad()
def layer_row(
    model: str, shape: tuple[int, ...], batch: int, dtype: str, modes: tuple[str, ...]
) -> Row:
    """Forward and backward of ours (each backend, both layouts) and every peer, on one layer."""
    channels, height, width, *_, count = shape
    torch.manual_seed(1)
    native = Layer(shape).to(gpu_timing.DEVICE)
    x = torch.randn(batch, channels, height, width, device=gpu_timing.DEVICE).to(DTYPES[dtype])
    with torch.no_grad():
        dy = torch.randn_like(native(x))
    exact = exact_step(native, x, dy)
    nbytes = 5 * x.nbytes + 3 * dy.nbytes
    number = inputs_for(x.nbytes + dy.nbytes)

    def judge(name: str, found: Results) -> tuple[float, bool]:
        error = off(found, exact)
        return error, error <= (TOLERANCE[dtype] if name.startswith("ours") else PEERS)

    race = Race(judge)

    def add(name: str, way: Callable[[Tensor], Tensor], layer: Layer, layout: str) -> None:
        memory_format = LAYOUTS[layout]
        gradient = dy.to(memory_format=memory_format)
        inputs = [x.to(memory_format=memory_format).detach().requires_grad_()]
        inputs += [inputs[0].detach().clone().requires_grad_() for _ in range(number - 1)]
        step = partial(step_of, way, list(layer.parameters()), gradient)
        race.add(name, step, inputs)

    for layout, memory_format in LAYOUTS.items():
        for backend in backends_of_ours():
            ours = copy.deepcopy(native)
            ours.backend = backend
            suffix = "" if backend == "cuda" else f", {backend}"
            add(f"ours {layout}{suffix}", ours, ours, layout)
            if backend == "cuda" and layout == "channels_last":
                for variant in BACKWARDS:
                    _cuda.force_backward(variant)
                    try:
                        add(f"ours {layout}, {variant}", ours, ours, layout)
                    finally:
                        _cuda.force_backward("")
        peer = copy.deepcopy(native).to(memory_format=memory_format)
        for name in ("cudnn", "native"):
            with engine(name):
                add(f"eager {name} {layout}", peer, peer, layout)
        for mode in modes:
            torch._dynamo.reset()
            options = None if mode == "compile" else "max-autotune-no-cudagraphs"
            with engine("cudnn"):
                run = torch.compile(peer, dynamic=False, mode=options)
                add(f"{mode} {layout}", run, peer, layout)
    times, told = race.run(nbytes, number, called=False)
    del told["call_us"]
    return {
        "model": model, "shape": list(shape[:5]), "count": count, "batch": batch, "dtype": dtype,
        **told,
        "ours": {name: beside(times, name, told["best_peer"])
                 for name in times if name.startswith("ours")},
    }  # fmt: skip


# ---- whole steps ----
@torch.enable_grad()
def step_row(name: str, size: int, batch: int, dtype: str, modes: tuple[str, ...]) -> Row:
    """Images per second and peak memory of a training step (loss, backward, SGD) of a network."""
    torch.manual_seed(1)
    model = networks()[name]().train().to(gpu_timing.DEVICE)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # random: losses could not be compared
            module.p = 0.0
    x = torch.randn(batch, 3, size, size, device=gpu_timing.DEVICE)
    target = torch.randint(0, 1000, (batch,), device=gpu_timing.DEVICE)
    half = DTYPES[dtype] if dtype != "float32" else None
    calls, memory, losses = {}, {}, {}
    for way in ("eager contiguous", "eager channels_last", "ours contiguous", "ours channels_last",
                *(f"{mode} channels_last" for mode in modes)):  # fmt: skip
        kind, layout = way.split()
        memory_format = LAYOUTS[layout]
        network = copy.deepcopy(model).to(memory_format=memory_format)
        if kind == "ours":
            network = swap(network).train()
        optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        torch._dynamo.reset()
        run = torch.compile(network, dynamic=False) if kind == "compile" else network
        given = x.to(memory_format=memory_format)
        step = partial(training_step, run, optimiser, given, target, half)
        try:
            losses[way] = step().item()
            step()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
        except Exception as error:  # whatever the compiler throws, or out of memory
            print(f"{way} is left out: {type(error).__name__}: {error}")
            continue
        memory[way] = torch.cuda.max_memory_allocated() - before
        calls[way] = step
    times = gpu_timing.device_times(calls, 1, rounds=7, lead=False)
    slack = 1e-4 if half is None else 2e-2
    right = losses["eager contiguous"]
    return {
        "model": name, "size": size, "batch": batch, "dtype": dtype, "loss": losses,
        "ours_correct": all(abs(losses.get(f"ours {layout}", float("nan")) - right) <= slack * right
                            for layout in LAYOUTS),
        "peak_bytes": memory, "ms": {n: s.summary(1e-3) for n, s in times.items()},
        "images_per_s": {n: batch / s.median for n, s in times.items()},
    }  # fmt: skip


def training_step(run, optimiser, x: Tensor, target: Tensor, half: torch.dtype | None) -> Tensor:
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, half or torch.bfloat16, enabled=half is not None):
        loss = nn.functional.cross_entropy(run(x).float(), target)
    loss.backward()
    optimiser.step()
    return loss.detach()


def networks() -> dict[str, Callable[[], nn.Module]]:
    return gpu_networks.networks() | {
        "mobilenet_v1 alpha 0.5": partial(models.mobilenet_v1, 0.5),
    }


def plan() -> list[tuple[Any, ...]]:
    """(function, its arguments): the rows that matter most first."""
    v1 = [("mobilenet_v1", shape) for shape in shapes("mobilenet_v1")]
    both = ("bfloat16", "float32")
    rows = [(layer_row, *s, 256, dtype, ("compile",)) for dtype in both for s in v1]
    steps = [("mobilenet_v1", 224, 256), ("mobilenet_v1 alpha 0.5", 32, 256),
             ("mobilenet_v2", 224, 256), ("mobilenet_v1", 224, 32)]  # fmt: skip
    rows[9:9] = [
        (step_row, *step, dtype, ("compile",))
        for dtype in both for step in steps if step[0] in networks()
    ]  # fmt: skip
    rows += [(layer_row, *s, 256, "bfloat16", ("max-autotune",)) for s in v1]
    return rows
