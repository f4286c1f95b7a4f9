"""What a normalisation with fixed statistics comes to, and whether that is still so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mnet_kernels import _C

#: Tensors up to this size are compared whole to see whether a fold is stale, larger ones in
#: some lines spread over them, their address and their version.
_COMPARED_BYTES = 16384
_LINE, _LINES = 64, 16


def fold(dtype: torch.dtype, bias: Tensor | None, norm: Any) -> tuple[Tensor | None, Tensor | None]:
    """What a norm with fixed statistics and a bias come to.

    Args:
        dtype: the input's; scale and shift are float32, or float64 where it is.
        bias: the convolution's, ``(C,)`` or None.
        norm: with ``running_mean``, ``running_var``, ``eps``, and perhaps ``weight``, ``bias``.

    Returns:
        (scale, shift), ``(C,)`` each: ``norm(conv(x) + bias) = conv(x) * scale + shift``.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if norm is None:
        return None, None if bias is None else bias.to(wide)
    mean, var, gamma, beta = statistics_of(norm)
    scale = torch.rsqrt(var.to(wide) + norm.eps)
    mean = mean.to(wide)
    if gamma is not None:
        scale = scale * gamma.to(wide)
    if bias is not None:
        mean = mean - bias.to(wide)
    shift = -mean * scale if beta is None else torch.addcmul(beta.to(wide), mean, scale, value=-1)
    return scale, shift


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """``weight`` ``(C, ...)`` times ``scale`` ``(C,)``, in weight's dtype."""
    if scale is None:
        return weight
    return (weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def statistics_of(norm: nn.Module) -> tuple[Any, ...]:
    """(mean, var, weight, bias), past nn.Module's attribute search, which costs a microsecond."""
    buffers, parameters = norm._buffers, norm._parameters
    return (
        buffers["running_mean"],
        buffers["running_var"],
        parameters.get("weight", buffers.get("weight")),
        parameters.get("bias", buffers.get("bias")),
    )


class Snapshot:
    """What some tensors held, to tell at every call whether they still do.

    Autograd's version counter misses writes through ``.data`` and BatchNorm's own updates of its
    statistics, so what is small and on the CPU is compared itself.

    Args:
        tensors: what a call's constants are made from; their storage is kept alive, so that its
            addresses cannot be given to others meanwhile.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._alive = [t.detach() for t in tensors]
        self._places: list[Any] | None = None  # None: there is nothing to tell by
        self._versions: dict[int, int] = {}  # by index, of those that are not compared whole
        spans = []
        if any(type(t) is not Tensor and type(t) is not nn.Parameter for t in tensors):
            return
        try:
            for i, t in enumerate(tensors):
                readable = t.is_cpu and _is_dense(t)
                whole = readable and t.nbytes <= _COMPARED_BYTES
                if whole:
                    spans.append((t.data_ptr(), t.nbytes, _LINE))
                elif readable:
                    # An odd number of lines: not always the same columns of a matrix.
                    step = (t.nbytes // _LINE // (_LINES + 1) | 1) * _LINE
                    spans.append((t.data_ptr(), _LINES * _LINE, step))
                if not whole:
                    self._versions[i] = t._version
            self._places = _places(tensors)
        except RuntimeError:  # an inference tensor (no version) or one without memory of its own
            return
        self._bytes = _C.Bytes(spans)

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether these are the same memory and hold the same; False if none can tell."""
        try:
            return (
                _places(tensors) == self._places
                and all(tensors[i]._version == version for i, version in self._versions.items())
                and self._bytes.unchanged()
            )
        except RuntimeError:
            return False


def _is_dense(t: Tensor) -> bool:
    """Whether a tensor's memory holds its elements, in any order, and nothing else."""
    return t.is_contiguous() or (
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    )


def _places(tensors: list[Tensor]) -> list[Any]:
    """Where tensors lie, and how."""
    return [(t.data_ptr(), t.is_contiguous() or t.stride()) for t in tensors]


class Watch:
    """A :class:`Snapshot` of tensors that are found in dictionaries, and of these, looked at in one
    go.

    Args:
        tensors: as for :class:`Snapshot`.
        entries: (dictionary, key, value): the very object that must be found there; Ellipsis: none.
        sizes: (dictionary, its length).
    """

    def __init__(
        self,
        tensors: list[Tensor],
        entries: list[tuple[dict[str, Any], str, Any]],
        sizes: list[tuple[dict[Any, Any], int]],
    ) -> None:
        self._snapshot = Snapshot(tensors)
        self._all: Any = None
        if self._snapshot._places is not None:
            kept = 0
            for t in tensors:
                kept = torch.ops.mnet_kernels.watch(t, kept)
            versions = self._snapshot._versions.items()
            versioned = [(tensors[i], version) for i, version in versions]
            self._all = _C.Watch(entries, sizes, kept, versioned)

    def unchanged(self) -> bool:
        """Whether all is as it was; False if nothing can tell."""
        try:
            return (
                self._all is not None
                and self._all.unchanged()
                and self._snapshot._bytes.unchanged()
            )
        except RuntimeError:  # a tensor that has no memory of its own any more
            return False
