"""How kernels are started: compiled on a GPU, or by Triton's interpreter in tests.

TRITON_INTERPRET=1, set before Python starts, turns every kernel into NumPy on the CPU. Nothing can
be timed or traced then, so the first configuration that fits is taken, and the operators are opaque
to torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from mnet_kernels.triton import TRITON_INTERPRETED

#: In the interpreter: which of the fitting configurations runs (tests go through them all).
interpreted_choice = 0


class _Interpreted:
    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Callable) -> Callable:
        def run(*args, **constants) -> None:
            if any(isinstance(a, FakeTensor) for a in args):
                return  # only shapes are asked for
            if not hasattr(self.kernel, "configs"):  # nothing to choose
                self.kernel[grid](*args, **constants)
                return
            fits = self.kernel.early_config_prune(
                self.kernel.configs, dict(zip(self.kernel.arg_names, args, strict=False)),
                **constants,
            )  # fmt: skip
            config = fits[interpreted_choice % len(fits)].kwargs
            self.kernel.fn[grid](*args, **constants, **config)

        return run


class _Compiled:
    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Callable) -> Callable:
        def run(*args, **constants) -> None:
            with device_of(args[0]):
                torch.library.wrap_triton(self.kernel)[grid](*args, **constants)

        return run


def _operator(name: str, *, mutates_args: tuple[str, ...], schema: str) -> Callable:
    """torch.library.triton_op, which before torch 2.14 takes a schema but uses one that it infers
    from annotations; and these cannot say that an int stands for a pair."""

    def register(function: Callable) -> Callable:
        with mock.patch("torch._library.triton.infer_schema", lambda *_, **__: schema):
            return torch.library.triton_op(name, mutates_args=mutates_args, schema=schema)(function)

    return register


def device_of(t: Any) -> AbstractContextManager:
    """Triton starts a kernel on the current device, wherever its tensors are."""
    traced = isinstance(t, FakeTensor | FunctionalTensor)
    return torch.cuda.device_of(t) if t.is_cuda and not traced else nullcontext()


wrap_triton: Callable
operator: Callable
if TRITON_INTERPRETED:
    wrap_triton = _Interpreted
    operator = torch.library.custom_op
else:
    wrap_triton = _Compiled
    operator = _operator
