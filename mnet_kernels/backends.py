"""Which backends can serve a call, and the sentence that says why not.

Each backend has one predicate; choosing a backend and refusing one use the same sentence.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from mnet_kernels import _C
from mnet_kernels.triton import TRITON_INTERPRETED


def _load_cuda() -> str | None:
    """Import the CUDA kernels, which registers them with torch; the reason where it fails."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) has no CUDA"
    if reason := _C.build_info().get("why_no_cuda"):
        return f"the CUDA kernels are not there: {reason}"
    try:
        import_module("mnet_kernels._cuda")
    except (ImportError, OSError) as error:
        return f"the CUDA kernels cannot be loaded: {' '.join(str(error).split())}"
    return None


_why_no_cuda = _load_cuda()

#: Fused kernels first; ``native`` is plain PyTorch and always there.
NAMES: tuple[str, ...] = ("cpu", "cuda", "triton", "native")

_HAS_TRITON = find_spec("triton") is not None

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the cpu backend serves CPU tensors, not {device.type}"
    return _floating("cpu", dtype)


def _cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the cuda backend serves CUDA tensors, not {device.type}"
    if _why_no_cuda is not None:
        return _why_no_cuda
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if dtype == torch.float64:
        return "the cuda backend serves float32, float16 and bfloat16, not float64"
    return _compiled_for(device) or _floating("cuda", dtype)


@cache
def _compiled_for(device: torch.device) -> str | None:
    """None if the CUDA kernels run on this GPU: machine code of its generation, or PTX."""
    compiled = cuda_info()["architectures"]
    gpu = torch.cuda.get_device_capability(device)
    for name in compiled.split():
        number, _, ptx = name.partition("+")
        specific = number[-1] in "af"
        major, minor = map(int, number.rstrip("af").split("."))
        architecture = major, minor
        same = gpu == architecture if specific else gpu[0] == major
        if gpu >= architecture and (same or (ptx and not specific)):
            return None
    return f"the CUDA kernels are compiled for {compiled}, this GPU has {gpu[0]}.{gpu[1]}"


def cuda_info() -> dict[str, Any]:
    """What the CUDA kernels were built with and for; they must be loaded."""
    return import_module("mnet_kernels._cuda").build_info()


def _triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _HAS_TRITON:
        return "the triton backend needs the package triton, which is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return (
            "the triton backend serves float32, float16 and bfloat16, "
            f"not {str(dtype).removeprefix('torch.')}"
        )
    if TRITON_INTERPRETED and device.type in ("cpu", "cuda"):
        return None
    if device.type != "cuda":
        return (
            f"the triton backend serves GPU tensors, not {device.type} "
            "(Triton's interpreter, TRITON_INTERPRET=1, is not enabled)"
        )
    if not torch.cuda.is_available():
        return "the triton backend needs a GPU, and torch sees none"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the triton backend needs a GPU of compute capability 8.0 or newer"
    return None


def _native(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _floating(name: str, dtype: torch.dtype) -> str | None:
    if dtype not in _FLOATING:
        return f"the {name} backend serves floating dtypes, not {str(dtype).removeprefix('torch.')}"
    return None


_PREDICATES: dict[str, Callable[[torch.device, torch.dtype], str | None]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "triton": _triton,
    "native": _native,
}


def why_not(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> str | None:
    """None if backend `name` can serve tensors of this device and dtype, else the reason."""
    if name not in _PREDICATES:
        return f"there is no backend {name!r}; the backends are {', '.join(NAMES)}"
    return _PREDICATES[name](torch.device(device), dtype)


def select(op: str, name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for a call of `op`: `name` if it can serve, or the first that can for None.

    Raises:
        RuntimeError: `name` cannot serve; the message names operator, expected and actual.
    """
    if name is not None:
        reason = _refusal(name, str(device), dtype)
        if reason is not None:
            raise RuntimeError(
                f"{op}: backend: expected one that can serve x, got {name!r}: {reason}"
            )
        return name
    chosen = _automatic(str(device), dtype)
    if chosen == "native" and dtype in _FLOATING:  # other dtypes are an error of the call itself
        _warn_native(op, device.type)
    return chosen


@torch.compiler.assume_constant_result
def has_kernel(op: str, backend: str) -> bool:
    """Whether a fused backend has an operator of its own by this name."""
    if backend == "triton":
        return triton_operator(op) is not None
    return _dispatches(op, backend.upper())


@cache
def _dispatches(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"mnet_kernels::{op}", key)


def triton_operator(op: str) -> Any:
    """The Triton backend's operator of this name, or None."""
    from mnet_kernels.triton import operators  # importing triton takes a second

    return getattr(operators, op, None)


# What devices are there is nothing for torch.compile to trace.
@torch.compiler.assume_constant_result
def _refusal(name: str, device: str, dtype: torch.dtype) -> str | None:
    return why_not(name, device=device, dtype=dtype)


@torch.compiler.assume_constant_result
def _automatic(device: str, dtype: torch.dtype) -> str:
    return _first(device, dtype)


@cache
def _first(device: str, dtype: torch.dtype) -> str:
    return next(b for b in NAMES if why_not(b, device=device, dtype=dtype) is None)


@cache  # once an operator and device type
def _warn_native(op: str, device_type: str) -> None:
    reasons = "; ".join(r for b in NAMES if (r := why_not(b, device=device_type)) is not None)
    warnings.warn(
        f"mnet_kernels: {op} on {device_type} runs native PyTorch: {reasons}", stacklevel=4
    )


@dataclass(frozen=True)
class BackendRow:
    """One line of :func:`table`."""

    backend: str
    available: bool
    reason: str  # what is used, or why it is not there


def table() -> list[BackendRow]:
    """Every backend: whether it is there, and what it uses or why it is missing."""
    info = _C.build_info()
    details = {
        "cpu": lambda: (
            f"instruction set {info['instruction_set']} (compiled and running here: "
            f"{', '.join(info['instruction_sets'])})"
        ),
        "cuda": lambda: (
            f"{torch.cuda.get_device_name()} (compiled for {cuda_info()['architectures']} by nvcc "
            f"{cuda_info()['nvcc']})"
        ),
        "triton": lambda: (
            f"Triton {import_module('triton').__version__}"
            + " (its interpreter)" * TRITON_INTERPRETED
        ),
        "native": lambda: f"PyTorch {torch.__version__}",
    }
    devices = {"cpu": "cpu", "native": "cpu", "cuda": "cuda", "triton": "cuda"}
    rows = []
    for name in NAMES:
        reason = why_not(name, device=devices[name])
        rows.append(BackendRow(name, reason is None, reason or details[name]()))
    return rows
