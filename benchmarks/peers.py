"""What we are measured against, the part that comes with PyTorch: one function a peer.

A peer is given a :class:`Case` and says how to run it at its best: the layout it likes, BatchNorm
folded, weights packed ahead. It is checked for correctness before it is timed.
"""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

LAST = torch.channels_last


class Missing(Exception):
    """Why a peer cannot run a case, in words."""


@dataclass
class Case:
    """A module in eval mode and an input for it, contiguous, both in the dtype of the row."""

    model: nn.Module
    x: Tensor
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @functools.cached_property
    def in_float32(self) -> nn.Module:
        """The model for engines that take float32 and round by themselves; its parameters are those
        of ``model``, rounded as they are."""
        return copy.deepcopy(self.model).float()

    @functools.cached_property
    def onnx(self) -> bytes:
        """The model as ONNX, in float32, BatchNorm folded by the exporter."""
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter that is ten times as slow is the new one
            torch.onnx.export(
                self.in_float32, (self.x.float(),), file, dynamo=False, opset_version=17,
                input_names=["x"], output_names=["y"],
            )  # fmt: skip
        return file.getvalue()


@dataclass(frozen=True)
class Ready:
    """How to run a case: ``read(run(take(x)))`` is the answer; ``run`` alone is timed."""

    run: Callable[[Any], Any]
    #: A contiguous input as ``run`` wants it.
    take: Callable[[Tensor], Any] = lambda x: x
    read: Callable[[Any], Tensor] = lambda y: y


@dataclass(frozen=True)
class Peer:
    name: str
    #: "torch": comes with PyTorch; "engine": another library.
    family: str
    #: Raises Missing, or whatever its library throws.
    build: Callable[[Case], Ready]
    #: Takes so long to build that the default plan has it in few rows only.
    slow: bool = False


def to_last(x: Tensor) -> Tensor:
    return x.to(memory_format=LAST)


def folded(model: nn.Module) -> nn.Module:
    """A copy with every BatchNorm folded into the convolution before it, activations in place."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        last = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and last is not None:
                setattr(parent, last, fuse_conv_bn_eval(parent.get_submodule(last), child))
                setattr(parent, name, nn.Identity())
                if isinstance(parent, nn.Sequential):
                    del parent._modules[name]  # not even a call is left
            last = name if isinstance(child, nn.Conv2d) else None
            if hasattr(child, "inplace"):
                child.inplace = True
    return model


def eager(case: Case) -> Ready:
    return Ready(case.model)


def eager_last(case: Case) -> Ready:
    return Ready(copy.deepcopy(case.model).to(memory_format=LAST), to_last)


def eager_folded(case: Case) -> Ready:
    return Ready(folded(case.model))


def eager_folded_last(case: Case) -> Ready:
    return Ready(folded(case.model).to(memory_format=LAST), to_last)


def optimized_for_inference(case: Case) -> Ready:
    """oneDNN's fused convolutions on weights packed ahead, in its own layouts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still the fastest in places
        traced = torch.jit.trace(case.model, case.x, check_trace=False)
        run = torch.jit.optimize_for_inference(traced)
    return Ready(run)


@contextmanager
def frozen() -> Iterator[None]:
    """torch.compile freezes only what is first called inside of this."""
    before = torch._inductor.config.freezing
    torch._inductor.config.freezing = True
    try:
        yield
    finally:
        torch._inductor.config.freezing = before


def _compile(case: Case, freeze: bool, **options: Any) -> Ready:
    """torch.compile of a copy.

    Traps: options={"freezing": True} alone freezes nothing, hence `frozen`; but without it two
    peers of the same options are the same backend to torch, and the second silently gets what was
    compiled for the first.
    """
    module = copy.deepcopy(case.model).to(memory_format=LAST)
    run = torch.compile(module, dynamic=False, options={"freezing": freeze, **options})
    with frozen() if freeze else nullcontext(), torch.inference_mode():  # as it is timed
        x = to_last(case.x)
        run(x)
        before = run(x).clone()
        if freeze:  # then it no longer looks at the weights
            next(module.parameters()).mul_(2)
            if not torch.equal(run(x), before):
                raise Missing("torch.compile did not freeze")
    return Ready(run, to_last)


def compiled_default(case: Case) -> Ready:
    return _compile(case, freeze=False)


def compiled_frozen(case: Case) -> Ready:
    return _compile(case, freeze=True)


def compiled_autotuned(case: Case) -> Ready:
    return _compile(case, freeze=True, **torch._inductor.list_mode_options("max-autotune"))


TORCH = [
    Peer("eager", "torch", eager),
    Peer("eager channels_last", "torch", eager_last),
    Peer("folded", "torch", eager_folded),
    Peer("folded channels_last", "torch", eager_folded_last),
    Peer("jit optimize_for_inference", "torch", optimized_for_inference),
    Peer("torch.compile", "torch", compiled_default, slow=True),
    Peer("torch.compile frozen", "torch", compiled_frozen, slow=True),
    Peer("torch.compile max-autotune", "torch", compiled_autotuned, slow=True),
]


def compiled(
    module: nn.Module, x: Tensor, mode: str | None = None, backend: str = "inductor"
) -> Callable[[Tensor], Tensor] | None:
    """torch.compile of a copy of `module` for inputs like x, frozen; None where it fails (no C++
    compiler, say)."""
    module = copy.deepcopy(module)
    run = torch.compile(module, dynamic=False, mode=mode, backend=backend)
    try:
        with frozen():
            run(x), run(x)
    except Exception as error:  # whatever the compiler throws
        print(f"torch.compile ({backend}) is left out: {type(error).__name__}: {error}")
        return None
    return run
