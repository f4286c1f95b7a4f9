"""What we are measured against: every way to run the same layer or network in plain PyTorch.

Each peer is checked for correctness before it is timed and given its best: channels_last, BatchNorm
folded beforehand, torch.compile frozen (its own constant folding and weight packing).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Call = Callable[[], Tensor]
LAST = torch.channels_last


@contextmanager
def frozen() -> Iterator[None]:
    """torch.compile freezes only what is first called inside of this."""
    before = torch._inductor.config.freezing
    torch._inductor.config.freezing = True
    try:
        yield
    finally:
        torch._inductor.config.freezing = before


def compiled(
    module: nn.Module, x: Tensor, mode: str | None = None
) -> Callable[[Tensor], Tensor] | None:
    """torch.compile of a copy of `module` for inputs like x, frozen; None where it fails (no C++
    compiler, say)."""
    module = copy.deepcopy(module)
    run = torch.compile(module, dynamic=False, mode=mode)
    try:
        with frozen():
            run(x), run(x)
    except Exception as error:  # whatever the compiler throws
        print(f"torch.compile is left out: {type(error).__name__}: {error}")
        return None
    return run


def layer_peers(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor) -> dict[str, Call]:
    """conv + bn + ReLU6 in eval mode; `x` contiguous."""
    last = x.to(memory_format=LAST)
    act = nn.ReLU6()
    fused = fuse_conv_bn_eval(conv, bn)
    fused_last = copy.deepcopy(fused).to(memory_format=LAST)
    conv_last = copy.deepcopy(conv).to(memory_format=LAST)
    peers: dict[str, Call] = {
        "eager": lambda: act(bn(conv(x))),
        "eager channels_last": lambda: act(bn(conv_last(last))),
        "folded": lambda: nn.functional.relu6(fused(x), inplace=True),
        "folded channels_last": lambda: nn.functional.relu6(fused_last(last), inplace=True),
    }
    run = compiled(nn.Sequential(conv_last, bn, act).eval(), last)
    if run is not None:
        peers["torch.compile"] = lambda: run(last)
    return peers


def network_peers(model: nn.Module, x: Tensor) -> dict[str, Call]:
    """A whole network in eval mode; `x` contiguous."""
    last = x.to(memory_format=LAST)
    model_last = copy.deepcopy(model).to(memory_format=LAST)
    peers: dict[str, Call] = {
        "eager": lambda: model(x),
        "eager channels_last": lambda: model_last(last),
    }
    run = compiled(model_last, last)
    if run is not None:
        peers["torch.compile"] = lambda: run(last)
    return peers
