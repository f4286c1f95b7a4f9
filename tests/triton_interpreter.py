"""Triton's interpreter as the tests run it: mended where it differs from GPUs, and with all
programs of a grid at once.

By itself it runs a grid program by program, and an operation costs 50 us of Python whatever its
size: a 5x5 kernel on 34 small planes takes 3 s. Here the NumPy array of every value has an axis of
programs in front, of length 1 where all have the same, and a kernel's Python runs once for many.
Programs whose loops differ in length run apart.
"""

from __future__ import annotations

import builtins
import functools
import inspect
from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

#: Programs at once: their tiles stay in the cache.
_MOST = 64
_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


class _Diverged(Exception):
    """The programs' loops differ in length.

    Args:
        trips: of each program.
    """

    def __init__(self, trips: np.ndarray) -> None:
        super().__init__()
        self.trips = trips


# ---- the axis of programs ----
def _program_id(self, axis):
    return TensorHandle(self.programs[axis], tl.int32)


def _make_range(self, kind, start, stop):
    return TensorHandle(np.arange(start, stop, dtype=np.int32)[None], tl.int32)


def _splat(self, kind, arg):
    data = arg.data.reshape(-1, *(1 for _ in kind.shape))
    return TensorHandle(np.broadcast_to(data, (len(data), *kind.shape)), arg.dtype.scalar)


def _broadcast(self, arg, shape):
    return TensorHandle(np.broadcast_to(arg.data, (len(arg.data), *shape)), arg.dtype.scalar)


def _expand_dims(self, arg, axis):
    return TensorHandle(np.expand_dims(arg.data, axis + 1), arg.dtype.scalar)


def _reshape(self, arg, shape, allow_reorder):
    return TensorHandle(arg.data.reshape(len(arg.data), *shape), arg.dtype.scalar)


def _join(self, lhs, rhs):
    left, right = np.broadcast_arrays(lhs.data, rhs.data)
    return TensorHandle(np.stack([left, right], axis=-1), lhs.dtype.scalar)


def _masked_load(self, ptrs, mask, other, *policies):
    kind = ptrs.get_element_ty()
    dtype = interpreter._get_np_dtype(kind)
    zeros = np.zeros((), dtype) if other is None else other.data
    arrays = np.broadcast_arrays(ptrs.data, mask.data, zeros)
    return TensorHandle(interpreter._interpreter.load(*arrays, dtype), kind)


def _masked_store(self, ptrs, value, mask, *policies):
    arrays = np.broadcast_arrays(ptrs.data, value.data, mask.data)
    return interpreter._interpreter.store(*arrays)


def _sum(self, input):
    data = input.handle.data.sum(axis=self.axis + 1, keepdims=self.keep_dims)
    shape = list(data.shape[1:])
    kind = tl.block_type(input.dtype, shape) if shape else input.dtype
    return tl.tensor(TensorHandle(data, input.dtype.scalar), kind)


def _no_overflow(self, lhs, rhs, operation):
    """The same check in fewer steps."""
    if lhs.type.scalar.int_bitwidth < 64:
        left, right = lhs.handle.data, rhs.handle.data
        exact = _OPERATIONS[operation.__name__](left.astype(np.int64), right.astype(np.int64))
        limits = np.iinfo(left.dtype)
        assert limits.min <= exact.min() and exact.max() <= limits.max, "an integer overflows"


def _patch_tensor(patch):
    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__bool__ = _bool

    return patched


def _bool(self) -> bool:
    values = np.unique(self.handle.data)
    if len(values) != 1:
        raise NotImplementedError("programs that take different branches")
    return bool(values[0])


def _range(*args) -> Iterator:
    """range(), of which a kernel may give bounds that differ from program to program."""
    if not any(isinstance(a, tl.tensor) for a in args):
        return builtins.range(*args)
    bounds = [a.handle.data if isinstance(a, tl.tensor) else np.array([int(a)]) for a in args]
    return _turns(*bounds) if len(bounds) > 1 else _turns(np.array([0]), *bounds)


def _turns(start, stop, step=1) -> Iterator:
    trips = np.maximum(-((start - stop) // step), 0)  # rounds up
    if len(np.unique(trips)) > 1:
        raise _Diverged(trips)
    for turn in builtins.range(trips[0]):
        yield tl.tensor(TensorHandle((start + turn * step).astype(np.int32), tl.int32), tl.int32)


# ---- a grid ----
def _at_once(fn, grid):
    """fn for one call that runs all programs of the grid."""

    def run(programs: np.ndarray, args: dict) -> None:
        interpreter.interpreter_builder.programs = programs
        try:
            fn(**args)
        except _Diverged as split:
            for length in np.unique(split.trips):
                run(programs[:, split.trips == length], args)

    @functools.wraps(fn)
    def every(**args):
        size = grid(args) if callable(grid) else grid
        programs = np.indices(size, np.int32).reshape(len(size), -1)
        for first in builtins.range(0, programs.shape[1], _MOST):
            run(programs[:, first : first + _MOST], args)

    every.__signature__ = inspect.signature(fn)
    return every


def _patch_executor(init):
    @functools.wraps(init)
    def patched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.fn, self.grid = _at_once(self.fn, self.grid), (1,)

    return patched


# ---- what differs from GPUs ----
def _exact(convert):
    """It cuts a float32 off to bfloat16 where every GPU rounds it."""

    def exact(values, source, target, rounding):
        flat = values.reshape(-1)
        if (source.name, target.name) == ("fp32", "bf16"):
            narrow = torch.from_numpy(flat.copy()).bfloat16()
            return narrow.view(torch.int16).numpy().view("uint16").reshape(values.shape)
        if (source.name, target.name) == ("bf16", "fp32"):
            wide = flat.astype(np.uint32) << 16
            return wide.view(np.float32).reshape(values.shape)
        return convert(values, source, target, rounding)

    return exact


def _product(dot):
    """It multiplies matrices of bfloat16 by their bits."""

    def product(self, a, b, *rest):
        a, b = (
            TensorHandle(interpreter._convert_float(t.data, t.dtype.scalar, tl.float32, None),
                         tl.float32)
            if t.dtype.scalar.name == "bf16" else t
            for t in (a, b)
        )  # fmt: skip
        return dot(self, a, b, *rest)

    return product


def _device_function(call):
    """It prepares triton.language again at every call within a kernel."""

    def prepared(self, *args, **kwargs):
        ours = self.fn.__module__.startswith("mnet_kernels.")
        return self.rewrite()(*args, **kwargs) if ours else call(self, *args, **kwargs)

    return prepared


def mend() -> None:
    """Before the first kernel runs."""
    interpreter._convert_float = _exact(interpreter._convert_float)
    interpreter._patch_lang_tensor = _patch_tensor(interpreter._patch_lang_tensor)
    interpreter.range = _range  # kernels find it there
    interpreter.InterpretedFunction.__call__ = _device_function(
        interpreter.InterpretedFunction.__call__
    )
    interpreter.GridExecutor.__init__ = _patch_executor(interpreter.GridExecutor.__init__)
    interpreter.ReduceOps.sum = _sum
    type(interpreter.interpreter_semantic).binary_op_sanitize_overflow_impl = _no_overflow
    for name, method in {
        "get_program_id": _program_id, "make_range": _make_range, "splat": _splat,
        "broadcast": _broadcast, "expand_dims": _expand_dims, "reshape": _reshape,
        "join": _join, "masked_load": _masked_load, "masked_store": _masked_store,
        "dot": _product(InterpreterBuilder.create_dot),
    }.items():  # fmt: skip
        setattr(InterpreterBuilder, f"create_{name}", method)
