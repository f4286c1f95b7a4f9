"""What the rows are made of: layers and pairs with a trained network's statistics, their work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def row(*values: Any, full: bool = False) -> Any:
    """One line of a parametrised benchmark; ``full``: only --full measures it."""
    name = "-".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)
    return pytest.param(*values, marks=[pytest.mark.full] if full else [], id=name)


def depthwise(channels: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
    )  # fmt: skip
    return [conv, batch_norm(channels), nn.ReLU6()]


def pointwise(channels: int, out_channels: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out_channels, 1, bias=False)
    return [conv, batch_norm(out_channels), nn.ReLU6()]


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 2), norm.bias.normal_()
    return norm


def flops(model: nn.Module, x: Tensor) -> int:
    """Two a multiply-add of every convolution and linear layer."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())
