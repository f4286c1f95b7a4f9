"""Which backend serves a convolution's fused call."""

from __future__ import annotations

import functools

import torch

from mnet_kernels import backends, ops

_FUSED: tuple[str, ...] = tuple(name for name in backends.NAMES if name != "native")
#: In a backend's place: the native convolution with folded weights, then the activation.
FOLDED = "folded"


# What backends there are is nothing for torch.compile to trace.
@torch.compiler.assume_constant_result
def depthwise_server(
    backend: str | None,
    preferred: str | None,
    place: str,
    dtype: torch.dtype,
    in_training: bool = False,
) -> tuple[str, str | None]:
    """The backend that serves, or "native" and why neither the named one nor any other does."""
    return _found(backend, preferred, place, dtype, in_training)


@functools.cache
def _found(
    backend: str | None, preferred: str | None, place: str, dtype: torch.dtype, in_training: bool
) -> tuple[str, str | None]:
    device = torch.device(place)
    reasons = []
    usual = _FUSED if backend is None else (backend,)
    for name in usual if preferred is None else (preferred, *usual):
        reason = backends.why_not(name, device=device, dtype=dtype)
        if reason is None and in_training and not _trains(name):
            reason = f"the {name} backend was built without training"
        if reason is None:
            return name, None
        reasons.append(reason)
    return "native", "; ".join(reasons)


def _trains(backend: str) -> bool:
    return backend == "native" or backends.has_kernel("dwconv_bn_act_training", backend)


@functools.cache
def dense_server(backend: str | None, preferred: str | None, place: str, dtype: torch.dtype) -> str:
    """The GPU backend that runs a convolution of one group in one kernel, or "folded"."""
    device = torch.device(place)
    usual = ("cuda", "triton") if backend is None and device.type == "cuda" else (backend,)
    for name in (preferred, *usual):
        if name == FOLDED:
            break
        if (
            ops.has_dense_kernel(name)
            and backends.why_not(name, device=device, dtype=dtype) is None
        ):
            return name
    return FOLDED
